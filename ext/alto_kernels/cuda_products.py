"""Back end `cutlass`: frozen products of one x with all their adapters in a launch, their backward pass in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alto_kernels.cuda_pools import CudaPools
from alto_kernels.plan import TickPlan
from alto_kernels.streams import current_stream

_MAX_MODULES = 4  # of one launch


def linears_forward(
    x_TK: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], plan: TickPlan, modules: Sequence[int]
) -> list[Tensor]:
    """Return the outputs of the modules and then their S blocks, see `linear`. All tensors are of the pools' dtype."""
    dtype, device = _dtype(plan), x_TK.device
    x_TK = _matrix(x_TK, "x_TK", dtype)
    tokens = x_TK.shape[0]
    outputs = [torch.empty(tokens, weight.shape[0], dtype=dtype, device=device) for weight in weights]
    saved = [torch.empty(plan.saved_rows, plan.saved_columns, dtype=dtype, device=device) for _ in weights]
    if plan.tokens == 0:
        return outputs + saved
    weights = [_matrix(weight, "weight_NK", dtype) for weight in weights]
    given = [None if bias is None else _matrix(bias, "bias_N", dtype) for bias in biases]
    stream = current_stream(device)
    for part in _parts(len(weights), _MAX_MODULES):
        launch, tables = planned_launch(plan, modules[part], backward=False, wants_output=True)
        launch.forward(
            tables,
            x_TK.data_ptr(),
            _addresses(weights[part]),
            [0 if bias is None else bias.data_ptr() for bias in given[part]],
            _addresses(saved[part]),
            _addresses(outputs[part]),
            stream,
        )
    return outputs + saved


def linears_backward(
    dys: Sequence[Tensor],
    x_TK: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    plan: TickPlan,
    modules: Sequence[int],
    needs_dx: bool,
) -> Tensor | None:
    """Return dx of all modules together, None where it is not needed; add to the gradients of A and B.

    One launch sums dx in fp32. With dropout there is a launch for each module, whose mask is its own, and with more
    than four modules there are several: then each adds to dx in its dtype.
    """
    dtype = _dtype(plan)
    x_TK = _matrix(x_TK, "x_TK", dtype)
    dx_TK = torch.empty_like(x_TK)
    if plan.tokens == 0:
        return dx_TK if needs_dx else None
    dys = [_matrix(dy, "dy_TN", dtype) for dy in dys]
    weights = [_matrix(weight, "weight_NK", dtype) for weight in weights]
    assert plan.jobs is not None
    s_gradients = plan.jobs.block_gradients(len(saved), dtype)
    stream = current_stream(x_TK.device)
    for part in _parts(len(weights), 1 if plan.row_keys is not None else _MAX_MODULES):
        launch, tables = planned_launch(plan, modules[part], backward=True, wants_output=needs_dx)
        launch.backward(
            tables,
            _addresses(dys[part]),
            x_TK.data_ptr(),
            _addresses(weights[part]),
            _addresses(saved[part]),
            s_gradients[part],
            dx_TK.data_ptr(),
            part.start > 0,
            stream,
        )
    return dx_TK if needs_dx else None


def planned_launch(plan: TickPlan, modules: Sequence[int], *, backward: bool, wants_output: bool) -> tuple[Any, Any]:
    """Return a C++ `Launch` of these modules, and what it needs of this tick."""
    pools = plan.table.pools
    assert isinstance(pools, CudaPools)
    assert plan.jobs is not None
    launch, shape = pools.launch(tuple(modules), backward, wants_output)
    return launch, plan.jobs.tables(shape)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _dtype(plan: TickPlan) -> torch.dtype:
    return plan.table.dtype


def _matrix(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: dtype {tensor.dtype}, the table's back end 'cutlass' takes {dtype}")
    return tensor.contiguous()
