"""The executable specification in plain torch: the same functions, one adapter after another.

Tests hold every back end against these, in float64. They are also the back end `reference`.
"""

from __future__ import annotations

import math

import torch

from alto_kernels.optimizer_settings import AdapterStep
from alto_kernels.plan import TickPlan

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


def keep_mask(row_keys_T: torch.Tensor, module: int, features: int, probability: float) -> torch.Tensor:
    """Return the boolean [T, features] mask of what dropout keeps; the same bits on every device.

    `row_keys_T` int32 stands for (seed, sequence, position) of each token. Two rounds of the murmur3 finaliser mix in
    the module and the feature; the lowest share `probability` of the signed 32-bit integers is dropped.
    """
    feature_keys = torch.arange(features, dtype=torch.int32, device=row_keys_T.device) * _int32(0x9E3779B1)
    rows = (row_keys_T ^ _int32(module)) * _int32(0x85EBCA6B)
    rows = rows ^ _shifted(rows, 15)
    bits = (rows[:, None] ^ feature_keys[None, :]) * _int32(0x85EBCA6B)
    bits = (bits ^ _shifted(bits, 13)) * _int32(0xC2B2AE35)
    bits = bits ^ _shifted(bits, 16)
    return bits >= int(probability * 2**32) - 2**31


def low_rank_forward(
    y_TN: torch.Tensor, x_TK: torch.Tensor, plan: TickPlan, module: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Add scale B (A dropout(x)) to `y_TN` in place for every adapted token; return S = A dropout(x), [T, max rank].

    Rows and columns of S that belong to no adapter stay unwritten. `dtype` is that of the arithmetic, x's by default.
    """
    dtype = dtype or x_TK.dtype
    saved_TR = torch.empty(plan.saved_rows, plan.saved_columns, dtype=dtype, device=x_TK.device)
    for segment in plan.segments:
        weights = plan.weights(segment, module)
        if weights is None:
            continue
        rows = slice(segment.start, segment.stop)
        kept_tK = _dropped(x_TK[rows].to(dtype), plan, rows, module, segment.dropout)
        s_tR = kept_tK @ weights.a_RK.to(dtype).t()
        saved_TR[rows, : segment.rank] = s_tR
        y_TN[rows] += (segment.scale * (s_tR @ weights.b_NR.to(dtype).t())).to(y_TN.dtype)
    return saved_TR


def low_rank_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    saved_TR: torch.Tensor,
    plan: TickPlan,
    module: int,
    dx_TK: torch.Tensor | None,
) -> None:
    """Add to the gradients of A and B of every segment and, unless None, the low-rank part to `dx_TK`, in place.

    What is added keeps the arithmetic's format until it is in the sum, which is then rounded to the gradients' own.
    """
    dtype = saved_TR.dtype
    for segment in plan.segments:
        weights = plan.weights(segment, module)
        if weights is None:
            continue
        rows = slice(segment.start, segment.stop)
        dy_tN = dy_TN[rows].to(dtype)
        kept_tK = _dropped(x_TK[rows].to(dtype), plan, rows, module, segment.dropout)
        ds_tR = segment.scale * (dy_tN @ weights.b_NR.to(dtype))
        weights.grad_b_NR.add_(segment.scale * (dy_tN.t() @ saved_TR[rows, : segment.rank]))
        weights.grad_a_RK.add_(ds_tR.t() @ kept_tK)
        if dx_TK is not None:
            part_tK = _dropped(ds_tR @ weights.a_RK.to(dtype), plan, rows, module, segment.dropout)
            dx_TK[rows] += part_tK.to(dx_TK.dtype)


def adamw_step(adapter: AdapterStep) -> tuple[float, bool]:
    """Step one adapter as clip_grad_norm_ and torch.optim.AdamW would; return (gradient norm, whether it is finite).

    An adapter whose gradient is not finite is left as it is.
    """
    grad_P = adapter.grad.float() * adapter.grad_scale
    norm = float(torch.linalg.vector_norm(grad_P.double()))
    if not math.isfinite(norm):
        return norm, False
    if adapter.max_grad_norm > 0.0:
        grad_P = grad_P * min(1.0, adapter.max_grad_norm / (norm + _CLIP_EPSILON))
    beta1, beta2 = adapter.betas
    for part, lr in ((slice(0, adapter.b_start), adapter.lr), (slice(adapter.b_start, None), adapter.lr_b)):
        param, grad = adapter.param[part], grad_P[part]
        exp_avg, exp_avg_sq = adapter.exp_avg[part], adapter.exp_avg_sq[part]
        param.mul_(1.0 - lr * adapter.weight_decay)
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**adapter.step)).add_(adapter.eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - beta1**adapter.step))
    return norm, True


def _dropped(rows_tK: torch.Tensor, plan: TickPlan, rows: slice, module: int, probability: float) -> torch.Tensor:
    if probability == 0.0 or plan.row_keys is None:
        return rows_tK
    # where, not a product with the mask: a value that is not finite must not survive as 0 * inf.
    keep_tK = keep_mask(plan.row_keys[rows], module, rows_tK.shape[1], probability)
    return torch.where(keep_tK, rows_tK * (1.0 / (1.0 - probability)), 0.0)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    # A logical shift: torch's own fills with the sign, which would leave the sign of the result constant.
    return (words >> by) & ((1 << (32 - by)) - 1)


def _int32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
