"""RMSNorm with the sum before it, and its gradient with the sum after it: one launch each.

In 16 bits on a GPU that the CUDA build is for, in fp32 between and rounded once (the sum too); anything else goes
through torch. Outside of autograd; the weight is frozen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alto_kernels.availability import require_compiled
from alto_kernels.lines import LINE, in_lines, takes_lines
from alto_kernels.streams import current_stream


class Normed(NamedTuple):
    """`total` is x + added, or x itself; `out` is what the norm makes of it; `scales` [rows], fp32, its 1 / rms."""

    total: Tensor
    out: Tensor
    scales: Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None) -> Normed:
    """Normalise the rows of x, or of x + added: y / sqrt(mean of squares of y + epsilon) * weight, [..., K]."""
    if not _serves(x, weight):
        total = x if added is None else x + added
        wide = total if total.dtype == torch.float64 else total.float()
        scales = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return Normed(total, (wide * scales * weight).to(x.dtype), scales.flatten())
    x, width = in_lines(x), x.shape[-1]
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    other = None if added is None else in_lines(added)
    rows = x.numel() // width
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    require_compiled().rms_norm(
        x.data_ptr(),
        0 if other is None else other.data_ptr(),
        in_lines(weight).data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        scales.data_ptr(),
        rows,
        width,
        epsilon,
        x.dtype == torch.float16,
        current_stream(x.device),
    )
    return Normed(total, out, scales)


def rms_norm_backward(
    gradient: Tensor, total: Tensor, weight: Tensor, scales: Tensor, beside: Tensor | None = None
) -> Tensor:
    """Return the gradient of `total` from that of `out`; `beside` is one that it has besides, and is added."""
    if not _serves(total, weight):
        wide, scales = total.to(scales.dtype), scales.view(*total.shape[:-1], 1)
        of_scaled = gradient * weight
        along = scales.square() * (of_scaled * wide).mean(-1, keepdim=True)
        found = (scales * (of_scaled - wide * along)).to(total.dtype)
        return found if beside is None else found + beside
    gradient, total = in_lines(gradient), in_lines(total)
    width = total.shape[-1]
    other = None if beside is None else in_lines(beside)
    found = torch.empty_like(total)
    require_compiled().rms_norm_backward(
        gradient.data_ptr(),
        total.data_ptr(),
        in_lines(weight).data_ptr(),
        scales.data_ptr(),
        0 if other is None else other.data_ptr(),
        found.data_ptr(),
        total.numel() // width,
        width,
        total.dtype == torch.float16,
        current_stream(total.device),
    )
    return found


def _serves(x: Tensor, weight: Tensor) -> bool:
    width = x.shape[-1]
    return (
        takes_lines(x)
        and weight.dtype == x.dtype
        and width % LINE == 0
        and width <= int(require_compiled().WIDEST_NORM)
    )
