"""A frozen linear product with the adapters of a tick, as torch operators with shape functions and gradients.

The gradients of A and B are added to the table's buffers by the backward pass; they are no outputs of autograd. The
operators return a zero gradient for the table's `anchor`, so that a compiler keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alto_kernels import cpu_products, reference
from alto_kernels.availability import CudaKernels
from alto_kernels.plan import TickPlan, plan_of


def lora_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: TickPlan, module_index: int) -> Tensor:
    """Return y_TN = x W^T + bias + scale_i (dropout_i(x) A_i^T) B_i^T for the tokens of each adapter i.

    Differentiable in x. Backward adds to grad_A and grad_B in the plan's table; the frozen weight and bias get no
    gradient. Without an adapter for `module_index`, or for tokens of none, it is the frozen product.
    """
    return lora_linears(x_TK, [weight_NK], plan, [module_index], [bias_N])[0]


def lora_linears(
    x_TK: Tensor,
    weights_NK: Sequence[Tensor],
    plan: TickPlan,
    module_indices: Sequence[int],
    biases_N: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return `lora_linear` for several projections of one x (q, k, v; gate, up), which is then read fewer times."""
    biases = [None] * len(weights_NK) if biases_N is None else list(biases_N)
    if not len(weights_NK) == len(module_indices) == len(biases):
        raise ValueError("weights_NK, module_indices, biases_N: must have the same length")
    _check_shapes(x_TK, weights_NK, plan, module_indices)
    if type(x_TK) in _EAGER_TYPES and not torch.compiler.is_compiling():
        plan.check_current()
        outputs = _EagerLinears.apply(x_TK, plan.table.anchor, plan, tuple(module_indices), tuple(biases), *weights_NK)  # type: ignore[no-untyped-call]
        return list(outputs)
    outputs = torch.ops.alto_kernels.lora_linears(
        x_TK,
        list(weights_NK),
        biases,
        plan.table.anchor,
        plan.handle,
        list(module_indices),
        plan.saved_rows,
        plan.saved_columns,
    )
    return list(outputs[: len(weights_NK)])


def low_rank_forward(y_TN: Tensor, x_TK: Tensor, plan: TickPlan, module_index: int) -> Tensor:
    """Add the low-rank part to `y_TN` in place; return what `low_rank_backward` needs."""
    plan.check_current()
    return _products(plan).low_rank_forward(y_TN, x_TK, plan, module_index)  # type: ignore[no-any-return]


def low_rank_backward(
    dy_TN: Tensor, x_TK: Tensor, saved: Tensor, plan: TickPlan, module_index: int, dx_TK: Tensor | None
) -> None:
    """Add the gradients of A and B to the table's buffers and, unless None, the low-rank part to `dx_TK`, in place."""
    plan.check_current()
    plan.clear_fresh(module_index)
    _products(plan).low_rank_backward(dy_TN, x_TK, saved, plan, module_index, dx_TK)


def _products(plan: TickPlan) -> ModuleType:
    if plan.table.backend == "cutlass":
        from alto_kernels import grouped_products

        return grouped_products
    return cpu_products if plan.table.backend == "cpu" else reference


def _check_shapes(x_TK: Tensor, weights_NK: Sequence[Tensor], plan: TickPlan, module_indices: Sequence[int]) -> None:
    shapes = plan.table.module_shapes
    if x_TK.dim() != 2:
        raise ValueError(f"x_TK: {x_TK.dim()} dimensions, must be 2")
    if x_TK.shape[0] != plan.tokens:
        raise ValueError(f"x_TK: {x_TK.shape[0]} rows, must be the plan's {plan.tokens} tokens")
    for weight_NK, module in zip(weights_NK, module_indices, strict=True):
        if not 0 <= module < len(shapes):
            raise ValueError(f"module_index={module}: must be in [0, {len(shapes)})")
        in_features, out_features = shapes[module]
        if weight_NK.shape[0] != out_features or weight_NK.shape[1] != in_features:
            raise ValueError(f"weight_NK: must be ({out_features}, {in_features}), module {module}'s shape")
        if x_TK.shape[1] != in_features:
            raise ValueError(f"x_TK: {x_TK.shape[1]} columns, module {module} has {in_features} in_features")


class _EagerLinears(torch.autograd.Function):
    """The same without the operators' dispatch, which takes the host longer than the launches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        plan: TickPlan,
        modules: tuple[int, ...],
        biases: tuple[Tensor | None, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        results = linears_forward(x, weights, biases, plan, modules)
        ctx.save_for_backward(x, *weights, *results[len(weights) :])
        ctx.plan, ctx.modules = plan, modules
        return tuple(results[: len(weights)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        count = len(ctx.modules)
        ctx.plan.check_current()
        dys = [gradient.contiguous() for gradient in gradients]
        dx = linears_backward(dys, x, rest[:count], rest[count:], ctx.plan, ctx.modules, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *([None] * count)


_EAGER_TYPES = (Tensor, torch.nn.Parameter)


def linears_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], plan: TickPlan, modules: Sequence[int]
) -> list[Tensor]:
    """Return the outputs and then what each module keeps for backward."""
    if plan.table.kernels == CudaKernels.HOPPER:
        from alto_kernels import cuda_products

        return cuda_products.linears_forward(x, weights, biases, plan, modules)
    products = _products(plan)
    outputs, saved = [], []
    for weight, bias, module in zip(weights, biases, modules, strict=True):
        y_TN = torch.nn.functional.linear(x, weight, bias)
        saved.append(products.low_rank_forward(y_TN, x, plan, module))
        outputs.append(y_TN)
    return outputs + saved


def linears_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    plan: TickPlan,
    modules: Sequence[int],
    needs_dx: bool,
) -> Tensor | None:
    """Return dx of all modules together, None where it is not needed; add to the gradients of A and B."""
    if plan.table.kernels == CudaKernels.HOPPER:
        from alto_kernels import cuda_products

        return cuda_products.linears_backward(dys, x, weights, saved, plan, modules, needs_dx)
    products = _products(plan)
    total_TK: Tensor | None = None
    for dy_TN, weight, saved_TR, module in zip(dys, weights, saved, modules, strict=True):
        plan.clear_fresh(module)
        if needs_dx:
            total_TK = dy_TN @ weight if total_TK is None else total_TK.addmm_(dy_TN, weight)
        products.low_rank_backward(dy_TN, x, saved_TR, plan, module, total_TK)
    return total_TK


@torch.library.custom_op("alto_kernels::lora_linears", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    anchor: Tensor,
    handle: Tensor,
    modules: Sequence[int],
    saved_rows: int,
    saved_columns: int,
) -> list[Tensor]:
    return linears_forward(x, weights, biases, plan_of(handle), modules)


@_forward.register_fake
def _forward_shapes(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    anchor: Tensor,
    handle: Tensor,
    modules: Sequence[int],
    saved_rows: int,
    saved_columns: int,
) -> list[Tensor]:
    saved_dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return outputs + [x.new_empty(saved_rows, saved_columns, dtype=saved_dtype) for _ in weights]


@torch.library.custom_op("alto_kernels::lora_linears_backward", mutates_args=())
def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    handle: Tensor,
    modules: Sequence[int],
    needs_dx: bool,
) -> list[Tensor]:
    total_TK = linears_backward(dys, x, weights, saved, plan_of(handle), modules, needs_dx)
    return [x.new_empty(0) if total_TK is None else total_TK, x.new_zeros((), dtype=torch.float32)]


@_backward.register_fake
def _backward_shapes(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    handle: Tensor,
    modules: Sequence[int],
    needs_dx: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape if needs_dx else (0,)), x.new_empty((), dtype=torch.float32)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, _, handle, modules, _, _ = inputs
    ctx.save_for_backward(x, handle, *weights, *output[len(weights) :])
    ctx.modules = list(modules)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    count = len(ctx.modules)
    x, handle, *rest = ctx.saved_tensors
    weights, saved = rest[:count], rest[count:]
    dys = []
    for gradient, weight in zip(gradients[:count], weights, strict=True):
        given = gradient if gradient is not None else x.new_zeros(x.shape[0], weight.shape[0])
        dys.append(given.contiguous())
    needs_dx = bool(ctx.needs_input_grad[0])
    dx_TK, anchor_gradient = torch.ops.alto_kernels.lora_linears_backward(
        dys, x, weights, saved, handle, ctx.modules, needs_dx
    )
    dx = dx_TK if needs_dx else None
    return dx, [None] * count, None, anchor_gradient, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
