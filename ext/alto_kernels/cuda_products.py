"""Back end `cutlass`: a frozen product with all its adapters in one launch, and its whole backward pass in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alto_kernels.availability import require_compiled
from alto_kernels.cuda_jobs import LaunchShape, TickJobs
from alto_kernels.cuda_pools import CudaPools
from alto_kernels.plan import TickPlan


def linears_forward(
    x_TK: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], plan: TickPlan, modules: Sequence[int]
) -> list[Tensor]:
    """Return the outputs of the modules and then their S blocks, see `linear`. All tensors are bf16."""
    x_TK = _matrix(x_TK, "x_TK")
    outputs = [_empty(x_TK, x_TK.shape[0], weight.shape[0]) for weight in weights]
    saved = [_empty(x_TK, plan.saved_rows, plan.saved_columns) for _ in weights]
    if plan.tokens == 0:
        return outputs + saved
    stream = torch.cuda.current_stream(x_TK.device).cuda_stream
    for weight, bias, y_TN, blocks, module in zip(weights, biases, outputs, saved, modules, strict=True):
        shape = LaunchShape.forward(*plan.table.module_shapes[module])
        _launch(plan, module, shape).forward(
            x_TK.data_ptr(),
            _matrix(weight, "weight_NK").data_ptr(),
            0 if bias is None else _matrix(bias, "bias_N").data_ptr(),
            blocks.data_ptr(),
            y_TN.data_ptr(),
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
    """Return dx of all modules together, None where it is not needed; add to the gradients of A and B."""
    x_TK = _matrix(x_TK, "x_TK")
    stream = torch.cuda.current_stream(x_TK.device).cuda_stream
    dx_TK = _empty(x_TK, *x_TK.shape)
    for i, (dy, weight, s_blocks, module) in enumerate(zip(dys, weights, saved, modules, strict=True)):
        if plan.tokens > 0:
            shape = LaunchShape.backward(*plan.table.module_shapes[module], needs_dx)
            _launch(plan, module, shape).backward(
                _matrix(dy, "dy_TN").data_ptr(),
                x_TK.data_ptr(),
                _matrix(weight, "weight_NK").data_ptr(),
                s_blocks.data_ptr(),
                _empty(s_blocks, *s_blocks.shape).data_ptr(),
                dx_TK.data_ptr(),
                i > 0,
                stream,
            )
    return dx_TK if needs_dx else None


def _launch(plan: TickPlan, module: int, shape: LaunchShape) -> Any:
    jobs = plan.jobs
    assert isinstance(jobs, TickJobs)
    found = jobs.launches.get((module, shape))
    if found is not None:
        return found
    pools = plan.table.pools
    assert isinstance(pools, CudaPools)
    schedule = jobs.schedule(shape)
    in_features, out_features = plan.table.module_shapes[module]
    launch = require_compiled().Launch(
        backward=shape.grad_b_features > 0,
        a_pool=(pools.a_PK[module].data_ptr(), *pools.a_PK[module].shape),
        b_pool=(pools.b_NP[module].data_ptr(), *pools.b_NP[module].shape),
        addresses={
            "items": schedule.items,
            "item_offsets": schedule.offsets,
            "extras": jobs.extras,
            "ready_target": jobs.ready_target,
            "ready": jobs.ready.data_ptr(),
            "slots": pools.pointers[module].data_ptr(),
            "slot_is_bad": pools.slot_is_bad.data_ptr(),
            "row_keys": 0 if plan.row_keys is None else plan.row_keys.data_ptr(),
            "thresholds": jobs.thresholds,
            "keep_factors": jobs.keep_factors,
        },
        tokens=plan.tokens,
        in_features=in_features,
        out_features=out_features,
        saved_rows=plan.saved_rows,
        module=module,
        clusters=jobs.clusters,
    )
    jobs.launches[module, shape] = launch
    return launch


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=like.dtype, device=like.device)


def _matrix(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype != torch.bfloat16:
        raise ValueError(f"{name}: dtype {tensor.dtype}, back end 'cutlass' takes torch.bfloat16")
    return tensor.contiguous()
