"""Negative log-likelihood of a token a row, and its gradient, from logits that are overwritten: one launch.

In 16 bits on a GPU that the CUDA build is for, where a row is read twice and written once; anything else goes through
torch. Both compute in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alto_kernels.availability import require_compiled
from alto_kernels.lines import LINE, in_lines, takes_lines
from alto_kernels.streams import current_stream


def token_nll(
    z_RV: Tensor, targets_R: Tensor, scale: float = 1.0, softcap: float | None = None, wants_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return -log p(target) of each row, [R] in fp32, and its gradient by `z_RV`, in the format and place of that.

    Logits are softcap(scale z), with c tanh(x / c) for a `softcap` c. `targets_R` is int64, each below V. Rows never
    mix: one that is not finite makes its own answer and gradient not finite, and no other.
    """
    if is_in_place(z_RV, z_RV.shape[1]):
        return _by_kernel(z_RV, targets_R, scale, softcap, wants_gradient)
    logits_RV = logits_of(z_RV, scale, softcap)
    target_R1 = targets_R[:, None]
    target_logit_R = logits_RV.gather(1, target_R1).squeeze(1)
    largest_R1 = logits_RV.amax(dim=1, keepdim=True)
    slope_RV = 1.0 - (logits_RV / softcap).square_() if wants_gradient and softcap else None
    exponential_RV = logits_RV.sub_(largest_R1).exp_()
    sum_R1 = exponential_RV.sum(dim=1, keepdim=True)
    nll_R = (sum_R1.log() + largest_R1).squeeze(1) - target_logit_R
    if not wants_gradient:
        return nll_R, None
    gradient_RV = exponential_RV.div_(sum_R1)
    gradient_RV.scatter_add_(1, target_R1, torch.full_like(sum_R1, -1.0))
    if slope_RV is not None:
        gradient_RV.mul_(slope_RV)
    if scale != 1.0:
        gradient_RV.mul_(scale)
    return nll_R, gradient_RV.to(z_RV.dtype)


def logits_of(z_RV: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Return the fp32 logits of `token_nll`, [R, V]; in the place of `z_RV` where that is fp32."""
    logits_RV = z_RV.float()
    if scale != 1.0:
        logits_RV = logits_RV.mul_(scale)
    if softcap is not None:
        logits_RV = logits_RV.div_(softcap).tanh_().mul_(softcap)
    return logits_RV


def is_in_place(like: Tensor, vocabulary: int) -> bool:
    """Return whether logits in the format and place of `like` are overwritten; torch needs fp32 copies of them."""
    return takes_lines(like) and vocabulary % LINE == 0


def _by_kernel(
    z_RV: Tensor, targets_R: Tensor, scale: float, softcap: float | None, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    rows, vocabulary = z_RV.shape
    z_RV, targets_R = in_lines(z_RV), targets_R.contiguous()
    nll_R = torch.empty(rows, dtype=torch.float32, device=z_RV.device)
    require_compiled().token_nll(
        z_RV.data_ptr(),
        targets_R.data_ptr(),
        nll_R.data_ptr(),
        rows,
        vocabulary,
        scale,
        softcap or 0.0,
        wants_gradient,
        z_RV.dtype == torch.float16,
        current_stream(z_RV.device),
    )
    return nll_R, z_RV if wants_gradient else None
