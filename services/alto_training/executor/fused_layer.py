"""A decoder layer as one step of autograd, forward and back: it then costs the host little more than its launches.

Every operator that autograd sees, and every module that is called, takes the host as long as a launch or longer, and a
layer has some thirty: with a thousand tokens a tick the device waits for the host. For layers of Llama's kind, in 16
bits on a GPU; others stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from alto_kernels.elementwise import gated_silu_backward, gated_silu_forward, rotate
from alto_kernels.norm import rms_norm, rms_norm_backward
from torch import nn

from alto_training.executor import attention
from alto_training.executor.attention import AttentionOptions, attend, attend_backward
from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.fused_norm import rms_epsilon
from alto_training.executor.lora_backend import ReferenceBackend
from alto_training.executor.lora_linear import MultiLoraLinear
from alto_training.executor.projections import Projections
from alto_training.executor.tick import CurrentTick, Item, PackedSequence, Share, Tick, build_tick

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_PROBE_WIDTH, _PROBE_QUERY_HEADS, _PROBE_KEY_HEADS = 16, 4, 2
_PROBE_LENGTHS = (5, 3)


def fuse_layers(decoder: nn.Module) -> int:
    """Have each layer of `decoder` that does the same as `FusedLayer` be run by one; return how many are.

    The modules stay where they are, with their weights and hooks; those within a layer are no longer called.
    """
    fused = 0
    for module in decoder.modules():
        options = _options_of(module)
        if options is not None:
            object.__setattr__(module, "forward", partial(_forward, module, FusedLayer(module, options)))
            fused += 1
    return fused


class Norm(NamedTuple):
    """An RMSNorm; its weight is looked up at each use."""

    module: Any
    epsilon: float

    @property
    def weight(self) -> torch.Tensor:
        """The weight, [K]."""
        weight: torch.Tensor = self.module.weight
        return weight


class FusedLayer:
    """h = x + attention(norm(x)), y = h + down(silu(gate(n)) up(n)) with n = norm(h), and the gradient of x.

    Queries and keys may have norms of their own. Tensors are [T, H]; what `forward` keeps for `backward` is a list for
    each step, in the order of the pass.
    """

    def __init__(self, module: Any, options: AttentionOptions) -> None:
        own, mlp = module.self_attn, module.mlp
        self.current: CurrentTick = own.q_proj.current
        self.head_width = int(own.head_dim)
        self._options = options
        self._input_norm = _norm(module.input_layernorm)
        self._qkv = Projections((own.q_proj, own.k_proj, own.v_proj))
        self._head_norms = tuple(_norm(getattr(own, name)) for name in _HEAD_NORMS if hasattr(own, name))
        self._output = Projections((own.o_proj,))
        self._mlp_norm = _norm(module.post_attention_layernorm)
        self._gate_up = Projections((mlp.gate_proj, mlp.up_proj))
        self._down = Projections((mlp.down_proj,))
        self._projections = (self._qkv, self._output, self._gate_up, self._down)

    def adapted_in(self, tick: Tick) -> bool:
        """Return whether an adapter of the tick adapts the layer."""
        return any(one.adapted_in(tick) for one in self._projections)

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, list[Sequence[torch.Tensor]]]:
        """Return y and what `backward` needs; cos and sin are [1, T, D]."""
        _, normed_TH = rms_norm(x_TH, self._input_norm.weight, self._input_norm.epsilon)
        projected, of_qkv = self._qkv.forward(normed_TH, tick)
        q_THD, k_THD, v_THD = (one.view(one.shape[0], -1, self.head_width) for one in projected)
        of_heads: list[torch.Tensor] = []
        if self._head_norms:
            of_heads = [q_THD, k_THD]
            q_THD, k_THD = (
                rms_norm(heads, norm.weight, norm.epsilon)[1]
                for heads, norm in zip(of_heads, self._head_norms, strict=True)
            )
        q_THD, k_THD = rotate(q_THD, k_THD, cos, sin)
        attended_THD, of_attention = attend(q_THD, k_THD, v_THD, tick, self._options)
        (attended_TH,), of_output = self._output.forward(attended_THD.view(x_TH.shape[0], -1), tick)
        h_TH, normed_TH = rms_norm(attended_TH, self._mlp_norm.weight, self._mlp_norm.epsilon, added=x_TH)
        (gate_TN, up_TN), of_gate_up = self._gate_up.forward(normed_TH, tick)
        (y_TH,), of_down = self._down.forward(gated_silu_forward(gate_TN, up_TN), tick)
        y_TH.add_(h_TH)
        return y_TH, [(x_TH, h_TH), of_qkv, of_heads, of_attention, of_output, of_gate_up, (gate_TN, up_TN), of_down]

    def backward(
        self,
        dy_TH: torch.Tensor,
        kept: Sequence[Sequence[torch.Tensor]],
        cos: torch.Tensor,
        sin: torch.Tensor,
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """Add the adapters' gradients; return that of x, None where nobody needs it. Goes no further than needed."""
        (x_TH, h_TH), of_qkv, of_heads, of_attention, of_output, of_gate_up, gate_and_up, of_down = kept
        needs_qkv = needs_dx or self._qkv.adapted_in(tick)
        needs_output = needs_qkv or self._output.adapted_in(tick)
        needs_gate_up = needs_output or self._gate_up.adapted_in(tick)

        d_gated = self._down.backward([dy_TH], of_down, tick, needs_gate_up)
        if d_gated is None:
            return None
        d_gate_up = gated_silu_backward(d_gated, *gate_and_up)
        d_normed = self._gate_up.backward(d_gate_up, of_gate_up, tick, needs_output)
        if d_normed is None:
            return None
        dh_TH = rms_norm_backward(d_normed, h_TH, self._mlp_norm.weight, self._mlp_norm.epsilon, beside=dy_TH)
        d_attended = self._output.backward([dh_TH], of_output, tick, needs_qkv)
        if d_attended is None:
            return None
        tokens = dy_TH.shape[0]
        d_attended = d_attended.view(tokens, -1, self.head_width)
        dq_THD, dk_THD, dv_THD = attend_backward(d_attended, of_attention, tick, self._options)
        dq_THD, dk_THD = rotate(dq_THD, dk_THD, cos, sin, backwards=True)
        if self._head_norms:
            dq_THD, dk_THD = (
                rms_norm_backward(gradient, heads, norm.weight, norm.epsilon)
                for gradient, heads, norm in zip((dq_THD, dk_THD), of_heads, self._head_norms, strict=True)
            )
        dqkv = [one.view(tokens, -1) for one in (dq_THD, dk_THD, dv_THD)]
        d_normed = self._qkv.backward(dqkv, of_qkv, tick, needs_dx)
        if d_normed is None:
            return None
        return rms_norm_backward(d_normed, x_TH, self._input_norm.weight, self._input_norm.epsilon, beside=dh_TH)


class _Fused(torch.autograd.Function):
    """`anchor`, there where an adapter of the tick adapts the layer, only makes the graph reach here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor | None,
        layer: FusedLayer,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tick: Tick,
    ) -> torch.Tensor:
        y_TH, kept = layer.forward(hidden.reshape(-1, hidden.shape[-1]), cos, sin, tick)
        if tick.training:
            ctx.save_for_backward(cos, sin, *chain.from_iterable(kept))
            ctx.counts = [len(of_step) for of_step in kept]
            ctx.layer, ctx.tick = layer, tick
        return y_TH.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        cos, sin, *saved = ctx.saved_tensors
        following = iter(saved)
        kept = [list(islice(following, count)) for count in ctx.counts]
        dy_TH = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        dx_TH = ctx.layer.backward(dy_TH, kept, cos, sin, ctx.tick, ctx.needs_input_grad[0])
        return None if dx_TH is None else dx_TH.view(gradients[0].shape), None, None, None, None, None


def _forward(module: Any, layer: FusedLayer, hidden_states: torch.Tensor, *more: Any, **options: Any) -> Any:
    """Stand where the layer's own `forward` stood, which is taken where positions are encoded otherwise."""
    cos, sin = options.get("position_embeddings") or (None, None)
    tokens = hidden_states.shape[:-1].numel()
    if cos is None or cos.shape != (1, tokens, layer.head_width) or cos.dtype != hidden_states.dtype:
        return type(module).forward(module, hidden_states, *more, **options)
    tick = layer.current.require()
    anchor = tick.anchor if layer.adapted_in(tick) else None
    return _Fused.apply(hidden_states, anchor, layer, cos, sin, tick)  # type: ignore[no-untyped-call]  # torch has no types


def _norm(module: nn.Module) -> Norm:
    epsilon = rms_epsilon(module)
    assert epsilon is not None  # `_options_of` looked
    return Norm(module, epsilon)


def _options_of(module: Any) -> AttentionOptions | None:
    """Return what a layer asks of attention; None if a fused one would not do the same.

    Asked of a copy with small weights of its own, which runs both ways: the module's may be elsewhere.
    """
    if not _has_the_parts(module):
        return None
    current = CurrentTick()
    current.tick = _probe_tick()
    draws = torch.Generator().manual_seed(0)
    probe = _small_copy(module, current, draws)
    tokens = sum(_PROBE_LENGTHS)
    # Of all sizes: some models clamp what is large.
    hidden = torch.randn(1, tokens, _PROBE_WIDTH, generator=draws) * torch.logspace(-1, 2, tokens)[:, None]
    cos, sin = torch.randn(2, 1, tokens, int(module.self_attn.head_dim), generator=draws)
    upstream = torch.randn(hidden.shape, generator=draws)
    try:
        with attention.options_seen() as seen, torch.enable_grad():
            own_x = hidden.clone().requires_grad_()
            own_y = type(module).forward(probe, own_x, position_embeddings=(cos, sin))
            if not isinstance(own_y, torch.Tensor) or len(seen) != 1 or seen[0].softcap is not None:
                return None
            our_x = hidden.clone().requires_grad_()
            our_y = _forward(probe, FusedLayer(probe, seen[0]), our_x, position_embeddings=(cos, sin))
        own_dx, our_dx = (torch.autograd.grad(y, x, upstream)[0] for y, x in ((own_y, own_x), (our_y, our_x)))
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return None
    same = all(torch.allclose(own, ours, rtol=1e-4, atol=1e-4) for own, ours in ((own_y, our_y), (own_dx, our_dx)))
    return seen[0] if same else None


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
    if inner and inner != set(_HEAD_NORMS):
        return False
    norms = [module.input_layernorm, module.post_attention_layernorm, *(getattr(own, name) for name in inner)]
    return all(rms_epsilon(norm) is not None for norm in norms)


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
        other = copy.copy(one)
        vars(other).pop("forward", None)  # ours, of the original
        other._modules = {inner: copied(child, inner) for inner, child in one._modules.items()}
        if name.endswith("norm"):
            other._parameters = {"weight": nn.Parameter(torch.empty(head if name in _HEAD_NORMS else _PROBE_WIDTH))}
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
