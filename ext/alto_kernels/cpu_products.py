"""Back end `cpu`: the low-rank products by the compiled fp32 kernels. Other float types are converted around them."""

from __future__ import annotations

from typing import Any

import torch

from alto_kernels.availability import require_compiled
from alto_kernels.plan import TickPlan


def low_rank_forward(y_TN: torch.Tensor, x_TK: torch.Tensor, plan: TickPlan, module: int) -> torch.Tensor:
    """See `reference.low_rank_forward`; S is fp32."""
    saved_TR = torch.empty(plan.saved_rows, plan.saved_columns)
    if plan.tokens == 0:
        return saved_TR
    x32_TK = _fp32(x_TK)
    y32_TN = _fp32(y_TN)
    require_compiled().cpu_forward(
        layer=_layer(plan, module),
        x=_rows(x32_TK),
        y=_rows(y32_TN),
        saved=_rows(saved_TR),
        threads=torch.get_num_threads(),
    )
    if y32_TN is not y_TN:
        y_TN.copy_(y32_TN)
    return saved_TR


def low_rank_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    saved_TR: torch.Tensor,
    plan: TickPlan,
    module: int,
    dx_TK: torch.Tensor | None,
) -> None:
    """See `reference.low_rank_backward`."""
    if plan.tokens == 0:
        return
    dx32_TK = None if dx_TK is None else _fp32(dx_TK)
    x32_TK, dy32_TN = _fp32(x_TK), _fp32(dy_TN)
    require_compiled().cpu_backward(
        layer=_layer(plan, module),
        x=_rows(x32_TK),
        dy=_rows(dy32_TN),
        saved=_rows(saved_TR),
        dx=(0, 0) if dx32_TK is None else _rows(dx32_TK),
        threads=torch.get_num_threads(),
    )
    if dx_TK is not None and dx32_TK is not None and dx32_TK is not dx_TK:
        dx_TK.copy_(dx32_TK)


def _layer(plan: TickPlan, module: int) -> Any:
    found = plan.cpu_layers.get(module)
    if found is not None:
        return found
    in_features, out_features = plan.table.module_shapes[module]
    segments = []
    for segment in plan.segments:
        weights = plan.weights(segment, module)
        if weights is not None and segment.start < segment.stop:
            addresses = tuple(tensor.data_ptr() for tensor in weights)
            segments.append((segment.start, segment.stop, segment.rank, *addresses, segment.scale, segment.dropout))
    layer = require_compiled().CpuLayer(
        in_features=in_features,
        out_features=out_features,
        module=module,
        tokens=plan.tokens,
        segments=segments,
        row_keys=0 if plan.row_keys is None else plan.row_keys.data_ptr(),
        gradients_are_bfloat16=plan.table.gradient_dtype == torch.bfloat16,
    )
    plan.cpu_layers[module] = layer
    return layer


def _fp32(rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype == torch.float32 and rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
        return rows
    return rows.to(torch.float32).contiguous()


def _rows(matrix: torch.Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), max(matrix.stride(0), matrix.shape[1])
