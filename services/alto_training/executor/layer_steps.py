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
        self.head_norms = tuple(_norm(getattr(own, name)) for name in HEAD_NORMS if hasattr(own, name))
        linears = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.linears: tuple[MultiLoraLinear, ...] = linears


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
        q, k, v, o, gate, up, down = parts.linears
        self._parts = parts
        self._qkv, self._output = Projections((q, k, v)), Projections((o,))
        self._gate_up, self._down = Projections((gate, up)), Projections((down,))

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """See `Steps.forward`."""
        parts = self._parts
        _, normed_TH = rms_norm(x_TH, parts.input_norm.weight, parts.input_norm.epsilon)
        projected, of_qkv = self._qkv.forward(normed_TH, tick)
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
        (attended_TH,), of_output = self._output.forward(attended_THD.view(x_TH.shape[0], -1), tick)
        h_TH, normed_TH = rms_norm(attended_TH, parts.mlp_norm.weight, parts.mlp_norm.epsilon, added=x_TH)
        (gate_TN, up_TN), of_gate_up = self._gate_up.forward(normed_TH, tick)
        (y_TH,), of_down = self._down.forward(gated_silu_forward(gate_TN, up_TN), tick)
        y_TH.add_(h_TH)
        return y_TH, [(x_TH, h_TH), of_qkv, of_heads, of_attention, of_output, of_gate_up, (gate_TN, up_TN), of_down]

    def backward(
        self,
        dy_TH: torch.Tensor,
        kept: Kept,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """See `Steps.backward`."""
        parts = self._parts
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
        dh_TH = rms_norm_backward(d_normed, h_TH, parts.mlp_norm.weight, parts.mlp_norm.epsilon, beside=dy_TH)
        d_attended = self._output.backward([dh_TH], of_output, tick, needs_qkv)
        if d_attended is None:
            return None
        tokens = dy_TH.shape[0]
        d_attended = d_attended.view(tokens, -1, parts.head_width)
        dq_THD, dk_THD, dv_THD = attend_backward(d_attended, of_attention, tick, parts.options)
        dq_THD, dk_THD = rotate(dq_THD, dk_THD, cos, sin, backwards=True)
        if parts.head_norms:
            dq_THD, dk_THD = (
                rms_norm_backward(gradient, heads, norm.weight, norm.epsilon)
                for gradient, heads, norm in zip((dq_THD, dk_THD), of_heads, parts.head_norms, strict=True)
            )
        dqkv = [one.view(tokens, -1) for one in (dq_THD, dk_THD, dv_THD)]
        d_normed = self._qkv.backward(dqkv, of_qkv, tick, needs_dx)
        if d_normed is None:
            return None
        return rms_norm_backward(d_normed, x_TH, parts.input_norm.weight, parts.input_norm.epsilon, beside=dh_TH)


class CompiledSteps:
    """The same launches with the same bits, for ticks that `serve` says yes to."""

    def __init__(self, parts: LayerParts, backend: KernelBackend, kernels: DecoderLayer) -> None:
        self._parts = parts
        self._backend = backend
        self._kernels = kernels
        self._modules = frozenset(linear.index for linear in parts.linears)
        self._dense = [linear.frozen for linear in parts.linears if isinstance(linear.frozen, DenseLinear)]

    def serve(self, tick: Tick) -> bool:
        """Return whether the steps of this tick can be taken so."""
        return self._modules <= tick.adapted_layers and self._kernels.serves(self._backend.plan(tick))

    def forward(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tick: Tick
    ) -> tuple[torch.Tensor, Kept]:
        """See `Steps.forward`."""
        plan, weights = self._backend.plan(tick), self._weights()
        q_THD, k_THD, v_THD, kept = self._kernels.before_attention(x_TH, weights, cos, sin, plan)
        attended_THD, of_attention = attend(q_THD, k_THD, v_THD, tick, self._parts.options)
        y_TH = self._kernels.after_attention(x_TH, attended_THD, weights, kept, plan)
        return y_TH, [(x_TH, kept, attended_THD), of_attention]

    def backward(
        self, dy_TH: torch.Tensor, kept: Kept, cos: torch.Tensor, sin: torch.Tensor, tick: Tick, needs_dx: bool
    ) -> torch.Tensor | None:
        """See `Steps.backward`."""
        plan, weights = self._backend.plan(tick), self._weights()
        (x_TH, of_layer, attended_THD), of_attention = kept
        d_attended, scratch = self._kernels.backward_to_attention(dy_TH, attended_THD, weights, of_layer, plan)
        gradients = attend_backward(d_attended, of_attention, tick, self._parts.options)
        return self._kernels.backward_from_attention(
            gradients, x_TH, weights, cos, sin, of_layer, scratch, plan, needs_dx
        )

    def _weights(self) -> LayerWeights:
        parts = self._parts
        norms = [norm.weight for norm in (parts.input_norm, parts.mlp_norm, *parts.head_norms)]
        return LayerWeights(norms, [one.weight_NK for one in self._dense], [one.bias_N for one in self._dense])


def compiled_steps(parts: LayerParts) -> CompiledSteps | None:
    """Return a layer's steps by the compiled kernels, None where they do not serve its back end or its widths."""
    backend = parts.linears[0].backend
    if not isinstance(backend, KernelBackend) or not backend.fuses_products:
        return None
    head_epsilons = {norm.epsilon for norm in parts.head_norms}
    if len(head_epsilons) > 1:
        return None
    try:
        kernels = DecoderLayer(
            backend.table,
            [linear.index for linear in parts.linears],
            parts.head_width,
            parts.input_norm.epsilon,
            parts.mlp_norm.epsilon,
            next(iter(head_epsilons), None),
        )
    except ValueError:
        return None
    return CompiledSteps(parts, backend, kernels)


def _norm(module: Any) -> Norm:
    epsilon = rms_epsilon(module)
    assert epsilon is not None  # whoever makes a layer's parts has looked
    return Norm(module, epsilon)
