"""RMSNorm with the sum before it, and its gradient with the sum after it: one launch each.

In 16 bits on a GPU that the CUDA build is for, in fp32 between and rounded once (the sum too); anything else goes
through torch. Outside of autograd; the weight is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alto_kernels.availability import require_compiled
from alto_kernels.lines import LINE, in_lines, takes_lines
from alto_kernels.streams import current_stream

_WIDEST = 16384  # kWidestNorm of norm.hpp


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return y = x + added (x itself without `added`), and y / sqrt(mean of squares of a row + epsilon) * weight.

    All are [..., K] but for `weight`, [K].
    """
    if not _serves(x, weight):
        total = x if added is None else x + added
        wide = _wide(total)
        return total, (wide * _scales(wide, epsilon) * weight).to(x.dtype)
    x = in_lines(x)
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    width = x.shape[-1]
    other = None if added is None else in_lines(added)
    require_compiled().rms_norm(
        x.data_ptr(),
        0 if other is None else other.data_ptr(),
        in_lines(weight).data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        epsilon,
        x.dtype == torch.float16,
        current_stream(x.device),
    )
    return total, out


def rms_norm_backward(
    gradient: Tensor, total: Tensor, weight: Tensor, epsilon: float, beside: Tensor | None = None
) -> Tensor:
    """Return the gradient of `total`, y, from that of what it is normalised to; `beside` is added, another of y's."""
    if not _serves(total, weight):
        wide = _wide(total)
        scales = _scales(wide, epsilon)
        of_scaled = gradient * weight
        along = scales.square() * (of_scaled * wide).mean(-1, keepdim=True)
        found = (scales * (of_scaled - wide * along)).to(total.dtype)
        return found if beside is None else found + beside
    gradient, total = in_lines(gradient), in_lines(total)
    found = torch.empty_like(total)
    width = total.shape[-1]
    other = None if beside is None else in_lines(beside)
    require_compiled().rms_norm_backward(
        gradient.data_ptr(),
        total.data_ptr(),
        in_lines(weight).data_ptr(),
        0 if other is None else other.data_ptr(),
        found.data_ptr(),
        total.numel() // width,
        width,
        epsilon,
        total.dtype == torch.float16,
        current_stream(total.device),
    )
    return found


def _wide(total: Tensor) -> Tensor:
    return total if total.dtype == torch.float64 else total.float()


def _scales(wide: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


def _serves(x: Tensor, weight: Tensor) -> bool:
    width = x.shape[-1]
    return takes_lines(x) and weight.dtype == x.dtype and width % LINE == 0 and width <= _WIDEST
