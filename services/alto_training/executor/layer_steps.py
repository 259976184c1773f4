"""The steps of a decoder layer of Llama's kind, forward and back, outside of autograd.

`PlainSteps` takes them one by one, whatever the back end; `CompiledSteps` takes all that lies before or after the
attention in one call, on Hopper, in ticks that adapt every product of the layer and drop nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from alto_kernels.decoder_layer import DecoderLayer, LayerWeights
from alto_kernels.elementwise import gated_silu_backward, gated_silu_forward, rotate
from alto_kernels.norm import rms_norm, rms_norm_backward
from alto_kernels.plan import TickPlan

from alto_training.executor.attention import AttentionOptions, attend, attend_backward
from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.fused_norm import rms_epsilon
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.lora_linear import MultiLoraLinear
from alto_training.executor.projections import Projections
from alto_training.executor.tick import Tick

HEAD_NORMS = ("q_norm", "k_norm")
Kept = Sequence[Sequence[torch.Tensor]]  # for each step, what its backward pass needs


class Norm(NamedTuple):
    """An RMSNorm; its weight is looked up at each use."""

    module: Any
    epsilon: float

    @property
    def weight(self) -> torch.Tensor:
        """The weight, [K]."""
        weight: torch.Tensor = self.module._parameters["weight"]  # a module's attributes are found slowly
        return weight


class LayerParts:
    """What a layer is made of: two norms, seven products, the attention's options and perhaps norms of heads."""

    def __init__(self, module: Any, options: AttentionOptions) -> None:
        own, mlp = module.self_attn, module.mlp
        self.options = options
        self.head_width = int(own.head_dim)
        self.input_norm = _norm(module.input_layernorm)
        self.mlp_norm = _norm(module.post_attention_layernorm)
        head_norms = (getattr(own, name, None) for name in HEAD_NORMS)
        self.head_norms = tuple(_norm(norm) for norm in head_norms if norm is not None)
        linears = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.linears: tuple[MultiLoraLinear, ...] = linears
        self.qkv, self.output = Projections(linears[:3]), Projections(linears[3:4])
        self.gate_up, self.down = Projections(linears[4:6]), Projections(linears[6:])
        self.dense = tuple(linear.frozen for linear in linears if isinstance(linear.frozen, DenseLinear))
        self.modules = frozenset(linear.index for linear in linears)
        self._indices = tuple(linear.index for linear in linears)
        self._head_epsilons = {norm.epsilon for norm in self.head_norms}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms, those of heads last."""
        return self.input_norm, self.mlp_norm, *self.head_norms

    def kernels(self) -> DecoderLayer | None:
        """Return the compiled kernels of the back end that the products have now; None where they do not serve."""
        backend = self.linears[0].backend
        if not isinstance(backend, KernelBackend) or len(self._head_epsilons) > 1:
            return None
        epsilons = self.input_norm.epsilon, self.mlp_norm.epsilon, next(iter(self._head_epsilons), None)
        return backend.decoder_layer(self._indices, self.head_width, epsilons)


class Steps(Protocol):
    """Tensors are [T, H]; cos and sin are [1, T, D]."""

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """Return y and what `backward` needs."""
        ...

    def backward(
        self, dy_TH: torch.Tensor, kept: Kept, cos: torch.Tensor, sin: torch.Tensor, tick: Tick, needs_dx: bool
    ) -> torch.Tensor | None:
        """Add the adapters' gradients; return that of x, None where nobody needs it. Goes no further than needed."""
        ...


class PlainSteps:
    """h = x + attention(norm(x)), y = h + down(silu(gate(m)) up(m)) with m = norm(h)."""

    def __init__(self, parts: LayerParts) -> None:
        self._parts = parts

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """See `Steps.forward`."""
        attended_TH, of_attention = self._attention(x_TH, cos, sin, tick)
        y_TH, of_mlp = self._mlp(x_TH, attended_TH, tick)
        return y_TH, [*of_attention, *of_mlp]

    def backward(
        self, dy_TH: torch.Tensor, kept: Kept, cos: torch.Tensor, sin: torch.Tensor, tick: Tick, needs_dx: bool
    ) -> torch.Tensor | None:
        """See `Steps.backward`."""
        needs_qkv = needs_dx or self._parts.qkv.adapted_in(tick)
        needs_output = needs_qkv or self._parts.output.adapted_in(tick)
        dh_TH = self._mlp_backward(dy_TH, kept[5:], tick, needs_output)
        if dh_TH is None:
            return None
        return self._attention_backward(dh_TH, kept[:5], cos, sin, tick, needs_qkv, needs_dx)

    def _attention(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """Return what is added to x."""
        parts = self._parts
        _, normed_TH = rms_norm(x_TH, parts.input_norm.weight, parts.input_norm.epsilon)
        projected, of_qkv = parts.qkv.forward(normed_TH, tick)
        q_THD, k_THD, v_THD = (one.view(one.shape[0], -1, parts.head_width) for one in projected)
        of_heads: list[torch.Tensor] = []
        if parts.head_norms:
            of_heads = [q_THD, k_THD]
            q_THD, k_THD = (
                rms_norm(heads, norm.weight, norm.epsilon)[1]
                for heads, norm in zip(of_heads, parts.head_norms, strict=True)
            )
        q_THD, k_THD = rotate(q_THD, k_THD, cos, sin)
        attended_THD, of_attention = attend(q_THD, k_THD, v_THD, tick, parts.options)
        (attended_TH,), of_output = parts.output.forward(attended_THD.view(x_TH.shape[0], -1), tick)
        return attended_TH, [[x_TH], of_qkv, of_heads, of_attention, of_output]

    def _mlp(self, x_TH: torch.Tensor, attended_TH: torch.Tensor, tick: Tick) -> tuple[torch.Tensor, Kept]:
        """Return y."""
        parts, norm = self._parts, self._parts.mlp_norm
        h_TH, normed_TH = rms_norm(attended_TH, norm.weight, norm.epsilon, added=x_TH)
        gate_and_up, of_gate_up = parts.gate_up.forward(normed_TH, tick)
        (y_TH,), of_down = parts.down.forward(gated_silu_forward(*gate_and_up), tick)
        return y_TH.add_(h_TH), [[h_TH], of_gate_up, gate_and_up, of_down]

    def _mlp_backward(self, dy_TH: torch.Tensor, kept: Kept, tick: Tick, needs_dh: bool) -> torch.Tensor | None:
        """Return the gradient of h, None where nobody needs it."""
        (h_TH,), of_gate_up, gate_and_up, of_down = kept
        parts, norm = self._parts, self._parts.mlp_norm
        d_gated = parts.down.backward([dy_TH], of_down, tick, needs_dh or parts.gate_up.adapted_in(tick))
        if d_gated is None:
            return None
        d_gate_up = gated_silu_backward(d_gated, *gate_and_up)
        del d_gated
        d_normed = parts.gate_up.backward(d_gate_up, of_gate_up, tick, needs_dh)
        if d_normed is None:
            return None
        return rms_norm_backward(d_normed, h_TH, norm.weight, norm.epsilon, beside=dy_TH)

    def _attention_backward(
        self,
        dh_TH: torch.Tensor,
        kept: Kept,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tick: Tick,
        needs_qkv: bool,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """Return the gradient of x, None where nobody needs it."""
        (x_TH,), of_qkv, of_heads, of_attention, of_output = kept
        parts = self._parts
        tokens = x_TH.shape[0]
        d_attended = parts.output.backward([dh_TH], of_output, tick, needs_qkv)
        if d_attended is None:
            return None
        d_attended = d_attended.view(tokens, -1, parts.head_width)
        dq_THD, dk_THD, dv_THD = attend_backward(d_attended, of_attention, tick, parts.options)
        dq_THD, dk_THD = rotate(dq_THD, dk_THD, cos, sin, backwards=True)
        if parts.head_norms:
            dq_THD, dk_THD = (
                rms_norm_backward(gradient, heads, norm.weight, norm.epsilon)
                for gradient, heads, norm in zip((dq_THD, dk_THD), of_heads, parts.head_norms, strict=True)
            )
        dqkv = [one.view(tokens, -1) for one in (dq_THD, dk_THD, dv_THD)]
        d_normed = parts.qkv.backward(dqkv, of_qkv, tick, needs_dx)
        if d_normed is None:
            return None
        return rms_norm_backward(d_normed, x_TH, parts.input_norm.weight, parts.input_norm.epsilon, beside=dh_TH)


class CompiledSteps:
    """The same launches with the same bits, for ticks that adapt every product and drop nothing."""

    def __init__(self, parts: LayerParts, kernels: DecoderLayer, plan: TickPlan) -> None:
        self._parts = parts
        self._kernels = kernels
        self._plan = plan

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """See `Steps.forward`."""
        weights = self._weights()
        q_THD, k_THD, v_THD, kept = self._kernels.before_attention(x_TH, weights, cos, sin, self._plan)
        attended_THD, of_attention = attend(q_THD, k_THD, v_THD, tick, self._parts.options)
        y_TH = self._kernels.after_attention(x_TH, attended_THD, weights, kept, self._plan)
        return y_TH, [(x_TH, kept, attended_THD), of_attention]

    def backward(
        self, dy_TH: torch.Tensor, kept: Kept, cos: torch.Tensor, sin: torch.Tensor, tick: Tick, needs_dx: bool
    ) -> torch.Tensor | None:
        """See `Steps.backward`."""
        weights = self._weights()
        (x_TH, of_layer, attended_THD), of_attention = kept
        d_attended, scratch = self._kernels.backward_to_attention(dy_TH, attended_THD, weights, of_layer, self._plan)
        gradients = attend_backward(d_attended, of_attention, tick, self._parts.options)
        return self._kernels.backward_from_attention(
            gradients, x_TH, weights, cos, sin, of_layer, scratch, self._plan, needs_dx
        )

    def _weights(self) -> LayerWeights:
        parts = self._parts
        return LayerWeights(
            [norm.weight for norm in parts.norms],
            [one.weight_NK for one in parts.dense],
            [one.bias_N for one in parts.dense],
        )


def steps_of(parts: LayerParts, tick: Tick) -> Steps:
    """Return the way to take for this tick."""
    if parts.modules <= tick.adapted_layers and (kernels := parts.kernels()) is not None:
        backend = parts.linears[0].backend
        assert isinstance(backend, KernelBackend)  # whose kernels they are
        plan = backend.plan(tick)
        if kernels.serves(plan):
            return CompiledSteps(parts, kernels, plan)
    return PlainSteps(parts)


def _norm(module: Any) -> Norm:
    epsilon = rms_epsilon(module)
    assert epsilon is not None  # whoever makes a layer's parts has looked
    return Norm(module, epsilon)
