"""A decoder layer as one step of autograd, forward and back: it then costs the host little more than its launches.

Every operator that autograd sees, and every module that is called, takes the host as long as a launch or longer, and a
layer has some thirty: with a thousand tokens a tick the device waits for the host. For layers of Llama's kind, in 16
bits on a GPU; others stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from alto_kernels.lines import in_lines
from torch import nn

from alto_training.executor import attention
from alto_training.executor.attention import AttentionOptions, WatchedTick
from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.fused_norm import rms_epsilon
from alto_training.executor.layer_steps import HEAD_NORMS, LayerParts, Steps, steps_of
from alto_training.executor.lora_backend import ReferenceBackend
from alto_training.executor.lora_linear import MultiLoraLinear
from alto_training.executor.tick import CurrentTick, Item, PackedSequence, Share, Tick, build_tick

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_PROBE_WIDTH, _PROBE_QUERY_HEADS, _PROBE_KEY_HEADS = 16, 4, 2
_PROBE_LENGTHS = (5, 3)
_PROBE_POSITION = 10_000  # some attentions change with positions, far out alone
# Of what reaches the products, each times those before: some models clamp what is large. Gradients are compared for the
# first alone, for beyond it those of the softmax are differences of large numbers.
_PROBE_SIZES = (1.0, 30.0, 1000.0)


def fuse_layers(decoder: nn.Module) -> int:
    """Have each layer of `decoder` that is of Llama's kind be a step of autograd; return how many are.

    The modules stay where they are, with their weights and hooks; those within a layer are no longer called.
    """
    fused = 0
    with _one_thread():
        for module in decoder.modules():
            options = _options_of(module)
            if options is not None:
                object.__setattr__(module, "forward", partial(_forward, module, LayerParts(module, options)))
                fused += 1
    return fused


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch use the calling thread: probes are tiny, and all ranks' threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Fused(torch.autograd.Function):
    """`anchor`, there where an adapter of the tick adapts the layer, only makes the graph reach here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor | None,
        steps: Steps,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tick: Tick,
    ) -> torch.Tensor:
        y_TH, kept = steps.forward(hidden.reshape(-1, hidden.shape[-1]), cos, sin, tick)
        if tick.training:
            ctx.save_for_backward(cos, sin, *chain.from_iterable(kept))
            ctx.counts = [len(of_step) for of_step in kept]
            ctx.steps, ctx.tick = steps, tick
        return y_TH.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        cos, sin, *saved = ctx.saved_tensors
        following = iter(saved)
        kept = [list(islice(following, count)) for count in ctx.counts]
        dy_TH = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        dx_TH = ctx.steps.backward(dy_TH, kept, cos, sin, ctx.tick, ctx.needs_input_grad[0])
        return None if dx_TH is None else dx_TH.view(gradients[0].shape), None, None, None, None, None


def _forward(module: Any, parts: LayerParts, hidden_states: torch.Tensor, *more: Any, **options: Any) -> Any:
    """Stand where the layer's own `forward` stood, which is taken where positions are encoded otherwise."""
    angles = options.get("position_embeddings")
    if angles is None or not _turns_whole_heads(angles[0], hidden_states, parts.head_width):
        return type(module).forward(module, hidden_states, *more, **options)
    tick = parts.linears[0].current.require()
    anchor = None if parts.modules.isdisjoint(tick.adapted_layers) else tick.anchor
    cos, sin = in_lines(angles[0]), in_lines(angles[1])
    return _Fused.apply(hidden_states.contiguous(), anchor, steps_of(parts, tick), cos, sin, tick)  # type: ignore[no-untyped-call]  # torch has no types


def _turns_whole_heads(cos: torch.Tensor, hidden_states: torch.Tensor, head_width: int) -> bool:
    """Return whether angles are for all of a head, in the activations' format; GPT-NeoX turns a part, OLMo in fp32."""
    return cos.shape == (1, hidden_states.shape[1], head_width) and cos.dtype == hidden_states.dtype


def _options_of(module: Any) -> AttentionOptions | None:
    """Return what a layer asks of attention; None if a fused one would not do the same.

    Asked of a copy with small weights of its own, which runs both ways: the module's may be elsewhere.
    """
    try:
        return _options_if_alike(module) if _has_the_parts(module) else None
    except Exception:  # whatever code that we do not know says of being used so: it stays as it is
        return None


def _options_if_alike(module: Any) -> AttentionOptions | None:
    current = WatchedTick()
    current.tick = _probe_tick()
    draws = torch.Generator().manual_seed(0)
    probe = _small_copy(module, current, draws)
    tokens = sum(_PROBE_LENGTHS)
    cos, sin = torch.randn(2, 1, tokens, int(module.self_attn.head_dim), generator=draws)
    more = {  # what a decoder gives its layers
        "attention_mask": None,
        "position_ids": current.tick.position_ids_1T + _PROBE_POSITION,
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": (cos, sin),
    }
    with torch.no_grad():
        type(module).forward(probe, torch.randn(1, tokens, _PROBE_WIDTH, generator=draws), **more)
    if len(current.asked) != 1 or current.asked[0].softcap is not None:
        return None
    parts = LayerParts(probe, current.asked[0])
    for size in _PROBE_SIZES:
        for norm in (probe.input_layernorm, probe.post_attention_layernorm):
            norm.weight.mul_(size)
        hidden, upstream = torch.randn(2, 1, tokens, _PROBE_WIDTH, generator=draws)
        own = _value_and_gradient(partial(type(module).forward, probe), hidden, upstream, more)
        ours = _value_and_gradient(partial(_forward, probe, parts), hidden, upstream, more)
        if not _close(own[0], ours[0]) or (size == _PROBE_SIZES[0] and not _close(own[1], ours[1])):
            return None
    return parts.options if len(set(current.asked)) == 1 else None


def _value_and_gradient(
    forward: Callable[..., torch.Tensor], hidden: torch.Tensor, upstream: torch.Tensor, more: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        x = hidden.clone().requires_grad_()
        y = forward(x, **more)
    (dx,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), dx


def _close(own: torch.Tensor, ours: torch.Tensor) -> bool:
    return own.shape == ours.shape and bool((own - ours).abs().max() <= 1e-4 * own.abs().max())


def _has_the_parts(module: Any) -> bool:
    children = dict(module.named_children())
    if set(children) != _LAYER or next(module.parameters(recurse=False), None) is not None:
        return False
    own, mlp = module.self_attn, module.mlp
    if not isinstance(getattr(own, "head_dim", None), int):
        return False
    linears = [getattr(owner, name, None) for owner, names in ((own, _ATTENTION), (mlp, _MLP)) for name in names]
    if not all(isinstance(linear, MultiLoraLinear) and linear.runs_once for linear in linears):
        return False
    inner = set(dict(own.named_children())) - set(_ATTENTION)
    if inner and inner != set(HEAD_NORMS):
        return False
    norms = [module.input_layernorm, module.post_attention_layernorm, *(getattr(own, name) for name in inner)]
    if any(rms_epsilon(norm) is None for norm in norms):
        return False
    weights = [norm.weight for norm in norms]
    for linear in linears:
        if isinstance(linear, MultiLoraLinear) and isinstance(linear.frozen, DenseLinear):
            weights += [one for one in (linear.frozen.weight_NK, linear.frozen.bias_N) if one is not None]
    # What a product of two formats gives differs from class to class, and the kernels take one.
    return len({weight.dtype for weight in weights}) == 1


def _small_copy(module: Any, current: CurrentTick, draws: torch.Generator) -> Any:
    """Return a copy of a layer that shares its settings, over weights of its own, and runs its classes' code."""
    head = int(module.self_attn.head_dim)
    q_width, k_width, mlp_width = _PROBE_QUERY_HEADS * head, _PROBE_KEY_HEADS * head, 2 * _PROBE_WIDTH
    widths = {"q_proj": (_PROBE_WIDTH, q_width), "k_proj": (_PROBE_WIDTH, k_width), "v_proj": (_PROBE_WIDTH, k_width)}
    widths |= {"o_proj": (q_width, _PROBE_WIDTH), "down_proj": (mlp_width, _PROBE_WIDTH)}
    widths |= dict.fromkeys(("gate_proj", "up_proj"), (_PROBE_WIDTH, mlp_width))

    def copied(one: Any, name: str) -> Any:
        if name in widths:
            linear = nn.Linear(*widths[name])
            _draw(linear, draws)
            return MultiLoraLinear(DenseLinear(linear, *widths[name]), 0, name, ReferenceBackend(), current)
        if one is None:
            return None
        other = copy.copy(one)
        vars(other).pop("forward", None)  # ours, of the original
        other._modules = {inner: copied(child, inner) for inner, child in one._modules.items()}
        if name.endswith("norm"):
            other._parameters = {"weight": nn.Parameter(torch.empty(head if name in HEAD_NORMS else _PROBE_WIDTH))}
            _draw(other, draws)
        return other

    probe = copied(module, "")
    probe.requires_grad_(False)
    attention.attach(probe, current)
    return probe


def _draw(module: nn.Module, draws: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.5)


def _probe_tick() -> Tick:
    rows = [np.zeros(length, dtype=np.int32) for length in _PROBE_LENGTHS]
    items = [Item((PackedSequence(ids, ids == 0),), denominator=1) for ids in rows]
    return build_tick([Share(None, items)], training=True, device=torch.device("cpu"))
