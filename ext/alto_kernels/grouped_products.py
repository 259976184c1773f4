"""Grouped kernels of back end `cutlass`: the low-rank part beside a frozen product, in launches that adapters share."""

from __future__ import annotations

import torch

from alto_kernels.grouped_jobs import GroupedJobs
from alto_kernels.plan import TickPlan
from alto_kernels.streams import current_stream


def low_rank_forward(y_TN: torch.Tensor, x_TK: torch.Tensor, plan: TickPlan, module: int) -> torch.Tensor:
    """Add scale B (A dropout(x)) to `y_TN` in place for every adapted token; return S, [T, R], for backward.

    Rows of S that belong to no adapter, and columns beyond a row's rank, stay unwritten.
    """
    jobs = _jobs(plan)
    saved_TR = torch.empty(*jobs.saved_shape, dtype=x_TK.dtype, device=x_TK.device)
    # Bound to a name, like all operands here: the memory of a copy must not be handed out before the launch.
    operand_TK, output_TN = _operand(x_TK, "x_TK", plan), _in_place(y_TN, "y_TN", plan)
    jobs.launch(module).forward(
        operand_TK.data_ptr(), saved_TR.data_ptr(), output_TN.data_ptr(), current_stream(operand_TK.device)
    )
    return saved_TR


def low_rank_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    saved_TR: torch.Tensor,
    plan: TickPlan,
    module: int,
    dx_TK: torch.Tensor | None,
) -> None:
    """Add to the gradients of A and B of every segment and, unless None, the low-rank part to `dx_TK`, in place."""
    gradient_TN, operand_TK = _operand(dy_TN, "dy_TN", plan), _operand(x_TK, "x_TK", plan)
    ds_TR = torch.empty_like(saved_TR)
    _jobs(plan).launch(module).backward(
        gradient_TN.data_ptr(),
        operand_TK.data_ptr(),
        saved_TR.data_ptr(),
        ds_TR.data_ptr(),
        0 if dx_TK is None else _in_place(dx_TK, "dx_TK", plan).data_ptr(),
        current_stream(operand_TK.device),
    )


def _jobs(plan: TickPlan) -> GroupedJobs:
    if plan.grouped_jobs is None:
        plan.grouped_jobs = GroupedJobs(plan)
    return plan.grouped_jobs


def _operand(tensor: torch.Tensor, name: str, plan: TickPlan) -> torch.Tensor:
    if tensor.dtype != plan.table.dtype:
        raise ValueError(f"{name}: dtype {tensor.dtype}, the table is for {plan.table.dtype}")
    return tensor.contiguous()


def _in_place(tensor: torch.Tensor, name: str, plan: TickPlan) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, it is written in place")
    return _operand(tensor, name, plan)
