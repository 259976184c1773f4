"""Block-diagonal causal attention over packed sequences, plugged into transformers as `alto_varlen`.

Every model family that goes through transformers' AttentionInterface uses it: each sequence of the tick attends to
itself alone, so no sequence can see, or be made not finite by, another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from alto_training.executor.errors import UnsupportedBackboneError
from alto_training.executor.tick import CurrentTick, Tick

IMPLEMENTATION = "alto_varlen"
PLAIN_IMPLEMENTATION = "eager"  # every model's own, in plain torch, and what ours is checked against
_TICK_ATTRIBUTE = "alto_current_tick"


def register() -> None:
    """Make transformers know the implementation by name. Doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, varlen_attention)


def attach(model: nn.Module, current: CurrentTick) -> None:
    """Give every module of `model` the tick that its attention will ask for the lengths of its sequences."""
    for module in model.modules():
        object.__setattr__(module, _TICK_ATTRIBUTE, current)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence: query [1, Hq, T, D], key and value [1, Hkv, T, D] give [1, T, Hq, D].

    A token sees itself and at most `sliding_window - 1` tokens before it. `softcap` c maps scores to c tanh(score / c).
    """
    if s_aux is not None:
        raise UnsupportedBackboneError("the model uses attention sinks", "choose a model without them")
    tick = getattr(module, _TICK_ATTRIBUTE).require()
    lengths = tick.sequence_lengths
    window = sliding_window if sliding_window is not None and sliding_window < tick.longest else None
    half_precision = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half_precision and softcap is None and query.shape[-1] % 8 == 0:
        return _varlen_kernel(query, key, value, tick, scaling, window), None
    # split and cat, not slices: the backward pass of a slice would fill all T tokens with zeros for each sequence.
    queries, keys, values = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    attended = [
        _attend(one_query, one_key, one_value, scaling, window, softcap)
        for one_query, one_key, one_value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if softcap is not None:
        return _attend_softcapped(query, key, value, scaling, window, softcap)
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = _window_mask(length, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _attend_softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    length, depth = query.shape[2], query.shape[3]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (depth**-0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_window_mask(length, window or length, query.device), float("-inf"))
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tick: Tick,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend in one kernel over all sequences, however many (CUDA, half precision)."""
    query_THD, key_THD, value_THD = (
        (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).squeeze(0).transpose(0, 1)
        for tensor in (query, key, value)
    )
    left = -1 if window is None else window - 1
    attended_THD: torch.Tensor = _FlashAttention.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
        query_THD, key_THD, value_THD, tick.sequence_offsets, tick.longest, scaling, left
    )
    return attended_THD.unsqueeze(0)


class _FlashAttention(torch.autograd.Function):
    """torch's flash attention over packed sequences: each token sees itself and what lies before it, `left` at most.

    It is what `torch.nn.attention.varlen.varlen_attn` calls within a Python operator, whose dispatch takes the host a
    quarter of a millisecond a layer: as long as the device has work at a thousand tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: torch.Tensor,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        offsets: torch.Tensor,
        longest: int,
        scaling: float | None,
        left: int,
    ) -> torch.Tensor:
        ctx.lengths = (offsets, offsets, longest, longest, 0.0, left == -1)
        ctx.options = {"scale": scaling, "window_size_left": left, "window_size_right": 0}
        found = torch.ops.aten._flash_attention_forward(
            query_THD, key_THD, value_THD, *ctx.lengths, False, **ctx.options
        )
        attended_THD: torch.Tensor = found[0]
        logsumexp, random_state, unused, _ = found[1:]
        ctx.save_for_backward(query_THD, key_THD, value_THD, attended_THD, logsumexp, random_state, unused)
        return attended_THD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, random_state, unused = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(), *saved, *ctx.lengths, random_state, unused, **ctx.options
        )
        return *found, None, None, None, None
