"""Block-diagonal causal attention over packed sequences, plugged into transformers as `alto_varlen`.

Every model family that goes through transformers' AttentionInterface uses it: each sequence of the tick attends to
itself alone, so no sequence can see, or be made not finite by, another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from alto_training.executor.errors import UnsupportedBackboneError
from alto_training.executor.tick import CurrentTick, Tick

IMPLEMENTATION = "alto_varlen"
PLAIN_IMPLEMENTATION = "eager"  # every model's own, in plain torch, and what ours is checked against
_TICK_ATTRIBUTE = "alto_current_tick"


class AttentionOptions(NamedTuple):
    """What a layer asks of attention.

    Scores are multiplied by `scaling` (None: D^-0.5) and, with a `softcap` c, mapped to c tanh(score / c); a token sees
    itself and at most `window - 1` before it (None: all).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


class WatchedTick(CurrentTick):
    """A tick whose attention puts down what each call asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[AttentionOptions] = []


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

    See `AttentionOptions` for `scaling`, `sliding_window` and `softcap`.
    """
    if s_aux is not None:
        raise UnsupportedBackboneError("the model uses attention sinks", "choose a model without them")
    current: CurrentTick = getattr(module, _TICK_ATTRIBUTE)
    tick = current.require()
    options = AttentionOptions(scaling, sliding_window, softcap)
    if isinstance(current, WatchedTick):
        current.asked.append(options)
    if flash_serves(query, options):
        query_THD, key_THD, value_THD = (
            (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).squeeze(0).transpose(0, 1)
            for tensor in (query, key, value)
        )
        attended_THD: torch.Tensor = _FlashAttention.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            query_THD, key_THD, value_THD, tick, options
        )
        return attended_THD.unsqueeze(0), None
    return _attend_each(query, key, value, tick, options).transpose(1, 2).contiguous(), None


def attend(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, tick: Tick, options: AttentionOptions
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return [T, Hq, D], and what `attend_backward` needs: the pass by itself, outside of autograd."""
    if flash_serves(query_THD, options):
        return _flash_forward(query_THD, key_THD, value_THD, tick, options)
    attended_THD = _attend_packed(query_THD, key_THD, value_THD, tick, options)
    return attended_THD, [query_THD, key_THD, value_THD]


def attend_backward(
    gradient_THD: torch.Tensor, kept: Sequence[torch.Tensor], tick: Tick, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, contiguous."""
    if flash_serves(kept[0], options):
        return _flash_backward(gradient_THD, kept, tick, options)
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in kept]
        attended_THD = _attend_packed(leaves[0], leaves[1], leaves[2], tick, options)
    dq_THD, dk_THD, dv_THD = torch.autograd.grad(attended_THD, leaves, gradient_THD)
    return dq_THD.contiguous(), dk_THD.contiguous(), dv_THD.contiguous()


def flash_serves(query: torch.Tensor, options: AttentionOptions) -> bool:
    """Return whether one kernel attends over all sequences, however many (CUDA, half precision)."""
    half_precision = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half_precision and options.softcap is None and query.shape[-1] % 8 == 0


def _attend_packed(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, tick: Tick, options: AttentionOptions
) -> torch.Tensor:
    query, key, value = (one.transpose(0, 1).unsqueeze(0) for one in (query_THD, key_THD, value_THD))
    return _attend_each(query, key, value, tick, options).squeeze(0).transpose(0, 1).contiguous()


def _attend_each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tick: Tick, options: AttentionOptions
) -> torch.Tensor:
    """Attend sequence by sequence: [1, Hq, T, D], [1, Hkv, T, D] twice, give [1, Hq, T, D]."""
    # split and cat, not slices: the backward pass of a slice would fill all T tokens with zeros for each sequence.
    lengths = tick.sequence_lengths
    queries, keys, values = (torch.split(tensor, list(lengths), 2) for tensor in (query, key, value))
    attended = [
        _attend(one_query, one_key, one_value, options)
        for one_query, one_key, one_value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, dim=2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    length = query.shape[2]
    scaling, window, softcap = options
    grouped = query.shape[1] != key.shape[1]
    if softcap is not None:
        return _attend_softcapped(query, key, value, scaling, window or length, softcap)
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = _window_mask(length, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _attend_softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int,
    softcap: float,
) -> torch.Tensor:
    length, depth = query.shape[2], query.shape[3]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (depth**-0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_window_mask(length, window, query.device), float("-inf"))
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _flash_forward(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, tick: Tick, options: AttentionOptions
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Attend by torch's flash attention over packed sequences.

    It is what `torch.nn.attention.varlen.varlen_attn` calls within a Python operator, whose dispatch takes the host a
    quarter of a millisecond a layer: as long as the device has work at a thousand tokens.
    """
    found = torch.ops.aten._flash_attention_forward(
        query_THD, key_THD, value_THD, *_lengths(tick, options), False, **_flash_options(tick, options)
    )
    attended_THD, logsumexp, random_state, unused, _ = found
    return attended_THD, [query_THD, key_THD, value_THD, attended_THD, logsumexp, random_state, unused]


def _flash_backward(
    gradient_THD: torch.Tensor, kept: Sequence[torch.Tensor], tick: Tick, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *saved, random_state, unused = kept
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        gradient_THD.contiguous(),
        *saved,
        *_lengths(tick, options),
        random_state,
        unused,
        **_flash_options(tick, options),
    )
    return found


def _lengths(tick: Tick, options: AttentionOptions) -> tuple[Any, ...]:
    """Return offsets and longest sequences of queries and keys, the probability of dropout, and whether all is seen."""
    whole = _window(tick, options) is None
    return tick.sequence_offsets, tick.sequence_offsets, tick.longest, tick.longest, 0.0, whole


def _flash_options(tick: Tick, options: AttentionOptions) -> dict[str, Any]:
    window = _window(tick, options)
    left = -1 if window is None else window - 1
    return {"scale": options.scaling, "window_size_left": left, "window_size_right": 0}


def _window(tick: Tick, options: AttentionOptions) -> int | None:
    """Return the window, None where no sequence is longer."""
    return options.window if options.window is not None and options.window < tick.longest else None


class _FlashAttention(torch.autograd.Function):
    """The same for attention modules of the model's own."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: torch.Tensor,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        tick: Tick,
        options: AttentionOptions,
    ) -> torch.Tensor:
        attended_THD, kept = _flash_forward(query_THD, key_THD, value_THD, tick, options)
        ctx.save_for_backward(*kept)
        ctx.tick, ctx.options = tick, options
        return attended_THD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_flash_backward(gradients[0], list(ctx.saved_tensors), ctx.tick, ctx.options), None, None
