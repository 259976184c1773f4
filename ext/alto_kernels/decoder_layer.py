"""Back end `cutlass` on Hopper: what a decoder layer does before and after its attention, each in one call.

The launches are those of `cuda_products`, `norm` and `elementwise`, in the same order and with the same bits; what one
pass of a layer keeps lies in one tensor. It is for the host, which takes as long for each of some twenty tensors and
calls as for a launch. Outside of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alto_kernels.availability import CudaKernels, require_compiled
from alto_kernels.cuda_products import planned_launch
from alto_kernels.plan import TickPlan
from alto_kernels.streams import current_stream
from alto_kernels.table import AdapterTable

_QKV, _OUTPUT, _GATE_UP, _DOWN = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)


class LayerWeights(NamedTuple):
    """The frozen weights of a layer: `norms` of the input, of the MLP's input and, where there are, of q and k.

    `products` and `biases` are of q, k, v, o, gate, up and down, [N, K] and [N] or None.
    """

    norms: Sequence[Tensor]
    products: Sequence[Tensor]
    biases: Sequence[Tensor | None]


class DecoderLayer:
    """A layer of Llama's kind: h = x + o(attention(rotate(q n), rotate(k n), v n)), y = h + down(silu(gate m) up m).

    n = norm(x), m = norm(h). `modules` are the numbers of q, k, v, o, gate, up and down in the table, all of which the
    plans of each call adapt; `head_epsilon` is that of norms of q and k, None where there are none. Tensors are [T, H]
    in the table's format.
    """

    def __init__(
        self,
        table: AdapterTable,
        modules: Sequence[int],
        head_width: int,
        input_epsilon: float,
        mlp_epsilon: float,
        head_epsilon: float | None = None,
    ) -> None:
        """Raise ValueError for widths that the kernels do not take."""
        if table.kernels != CudaKernels.HOPPER:
            raise ValueError("table: its kernels must be those for Hopper")
        self._dtype = table.dtype
        self._modules = tuple(modules)
        (hidden, self._query_width), (_, self._key_width) = (table.module_shapes[module] for module in modules[:2])
        self._head_width = head_width
        self._shape = require_compiled().LayerShape(
            hidden=hidden,
            query_width=self._query_width,
            key_width=self._key_width,
            head_width=head_width,
            mlp_width=table.module_shapes[modules[4]][1],
            input_epsilon=input_epsilon,
            mlp_epsilon=mlp_epsilon,
            head_epsilon=-1.0 if head_epsilon is None else head_epsilon,
            is_float16=table.dtype == torch.float16,
        )

    @staticmethod
    def serves(plan: TickPlan) -> bool:
        """Return whether a plan's ticks can be run: dropout takes a launch for each module, and no tokens take none."""
        return plan.row_keys is None and plan.tokens > 0

    def before_attention(
        self, x_TH: Tensor, weights: LayerWeights, cos: Tensor, sin: Tensor, plan: TickPlan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and v, [T, heads, D], rotated by cos and sin ([1, T, D]), and what is kept, which holds them.

        `after_attention` fills what is kept, and both backward passes need it.
        """
        plan.check_current()
        self._check(x_TH, plan, "x_TH")
        elements, queries, keys, values = self._shape.kept(plan.tokens, plan.saved_rows)
        kept = torch.empty(elements, dtype=self._dtype, device=x_TH.device)
        self._shape.before_attention(
            self._addresses(weights),
            planned_launch(plan, self._modules[_QKV], backward=False, wants_output=True),
            x_TH.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            kept.data_ptr(),
            current_stream(x_TH.device),
        )
        q_THD = self._heads(kept, queries, self._query_width, plan.tokens)
        k_THD, v_THD = (self._heads(kept, start, self._key_width, plan.tokens) for start in (keys, values))
        return q_THD, k_THD, v_THD, kept

    def after_attention(
        self, x_TH: Tensor, attended_THD: Tensor, weights: LayerWeights, kept: Tensor, plan: TickPlan
    ) -> Tensor:
        """Return y, [T, H]."""
        y_TH = torch.empty_like(x_TH)
        self._shape.after_attention(
            self._addresses(weights),
            *self._after(plan, backward=False),
            x_TH.data_ptr(),
            attended_THD.data_ptr(),
            kept.data_ptr(),
            y_TH.data_ptr(),
            current_stream(x_TH.device),
        )
        return y_TH

    def backward_to_attention(
        self, dy_TH: Tensor, attended_THD: Tensor, weights: LayerWeights, kept: Tensor, plan: TickPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of what attention gave, [T, heads, D], and what `backward_from_attention` needs."""
        plan.check_current()
        self._check(dy_TH, plan, "dy_TH")
        elements, attended = self._shape.scratch(plan.tokens)
        scratch = torch.empty(elements, dtype=self._dtype, device=dy_TH.device)
        self._shape.backward_to_attention(
            self._addresses(weights),
            *self._after(plan, backward=True),
            dy_TH.data_ptr(),
            attended_THD.data_ptr(),
            kept.data_ptr(),
            scratch.data_ptr(),
            self._block_gradients(plan),
            current_stream(dy_TH.device),
        )
        return self._heads(scratch, attended, self._query_width, plan.tokens), scratch

    def backward_from_attention(
        self,
        gradients_THD: tuple[Tensor, Tensor, Tensor],
        x_TH: Tensor,
        weights: LayerWeights,
        cos: Tensor,
        sin: Tensor,
        kept: Tensor,
        scratch: Tensor,
        plan: TickPlan,
        needs_dx: bool,
    ) -> Tensor | None:
        """Return the gradient of x from those of q, k and v, contiguous, which are overwritten; None if not needed."""
        dx_TH = torch.empty_like(x_TH) if needs_dx else None
        self._shape.backward_from_attention(
            self._addresses(weights),
            planned_launch(plan, self._modules[_QKV], backward=True, wants_output=needs_dx),
            *(gradient.data_ptr() for gradient in gradients_THD),
            x_TH.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            kept.data_ptr(),
            scratch.data_ptr(),
            0 if dx_TH is None else dx_TH.data_ptr(),
            self._block_gradients(plan),
            current_stream(x_TH.device),
        )
        return dx_TH

    def _after(self, plan: TickPlan, backward: bool) -> list[tuple[Any, Any]]:
        return [
            planned_launch(plan, self._modules[part], backward=backward, wants_output=True)
            for part in (_OUTPUT, _GATE_UP, _DOWN)
        ]

    def _block_gradients(self, plan: TickPlan) -> list[int]:
        assert plan.jobs is not None
        return plan.jobs.block_gradients(3, self._dtype)

    def _heads(self, whole: Tensor, start: int, width: int, tokens: int) -> Tensor:
        """Return the [T, heads, D] that begins at element `start`."""
        head = self._head_width
        return whole.as_strided((tokens, width // head, head), (width, head, 1), start)

    def _addresses(self, weights: LayerWeights) -> tuple[list[int], list[int], list[int]]:
        for weight in (*weights.norms, *weights.products, *weights.biases):
            if weight is not None and (weight.dtype != self._dtype or not weight.is_contiguous()):
                raise ValueError(f"weights: {weight.dtype}, must be contiguous and {self._dtype}")
        norms = [norm.data_ptr() for norm in weights.norms]
        return (
            norms + [0] * (4 - len(norms)),
            [weight.data_ptr() for weight in weights.products],
            [0 if bias is None else bias.data_ptr() for bias in weights.biases],
        )

    def _check(self, tensor: Tensor, plan: TickPlan, name: str) -> None:
        whole = tensor.dtype == self._dtype and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        if not whole or tensor.shape[0] != plan.tokens:
            raise ValueError(f"{name}: must be contiguous, aligned, {self._dtype}, of the plan's {plan.tokens} tokens")
