"""What a decoder does between its products, in one launch each: rotation of queries and keys, and the gated SiLU.

In 16 bits on a GPU that the CUDA build is for; anything else goes through torch, in as many operators as that takes.
Both compute in fp32 and round once. `rotated` and `gated_silu` are differentiable; the others are their passes, for
whoever sees to gradients himself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alto_kernels.availability import require_compiled
from alto_kernels.lines import LINE, in_lines, takes_lines
from alto_kernels.streams import current_stream


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q [1, Hq, T, D] and k [1, Hk, T, D], each times cos plus (minus its second half, its first) times sin.

    cos and sin are [1, T, D]. Differentiable by q and k. What the kernel returns lies in memory as [1, T, H, D].
    """
    q_THD, k_THD = (one.squeeze(0).transpose(0, 1) if one.shape[0] == 1 else one for one in (q, k))
    if _rotates(q_THD, k_THD, cos, sin):
        turned = _Rotated.apply(q_THD, k_THD, cos, sin)  # type: ignore[no-untyped-call]  # torch has no types for it
        return turned[0].transpose(0, 1).unsqueeze(0), turned[1].transpose(0, 1).unsqueeze(0)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def rotate(q_THD: Tensor, k_THD: Tensor, cos: Tensor, sin: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Return q [T, Hq, D] and k [T, Hk, D] rotated as by `rotated`, contiguous; cos and sin are [1, T, D].

    `backwards`: the transposed map, from gradients of what is rotated to those of q and k.
    """
    if _rotates(q_THD, k_THD, cos, sin):
        return _rotate(q_THD, k_THD, in_lines(cos), in_lines(sin), backwards)
    cos_T1D, sin_T1D = cos.transpose(0, 1), sin.transpose(0, 1)
    if backwards:
        return q_THD * cos_T1D - _turned(q_THD * sin_T1D), k_THD * cos_T1D - _turned(k_THD * sin_T1D)
    return q_THD * cos_T1D + _turned(q_THD) * sin_T1D, k_THD * cos_T1D + _turned(k_THD) * sin_T1D


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape. Differentiable; gate and up are all that is kept for backward."""
    if not _gates(gate, up):
        return torch.nn.functional.silu(gate) * up
    out: Tensor = _GatedSilu.apply(in_lines(gate), in_lines(up))  # type: ignore[no-untyped-call]  # nor for this
    return out


def gated_silu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape."""
    if not _gates(gate, up):
        return torch.nn.functional.silu(gate) * up
    gate, up = in_lines(gate), in_lines(up)
    out = torch.empty_like(gate)
    require_compiled().gated_silu(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.numel(),
        gate.dtype == torch.float16,
        current_stream(gate.device),
    )
    return out


def gated_silu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    if not _gates(gate, up):
        open_ = torch.sigmoid(gate)
        return gradient * up * open_ * (1.0 + gate * (1.0 - open_)), gradient * gate * open_
    gate, up, gradient = in_lines(gate), in_lines(up), in_lines(gradient)
    gate_gradient, up_gradient = torch.empty_like(gate), torch.empty_like(up)
    require_compiled().gated_silu_backward(
        gradient.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        gate_gradient.data_ptr(),
        up_gradient.data_ptr(),
        gate.numel(),
        gate.dtype == torch.float16,
        current_stream(gate.device),
    )
    return gate_gradient, up_gradient


def _rotates(q_THD: Tensor, k_THD: Tensor, cos: Tensor, sin: Tensor) -> bool:
    dtype, width = q_THD.dtype, q_THD.shape[-1]
    alike = k_THD.dtype == dtype and cos.dtype == dtype and sin.dtype == dtype and q_THD.dim() == 3
    if not alike or not takes_lines(q_THD) or width % (2 * LINE) or k_THD.shape[-1] != width:
        return False
    angles = (1, q_THD.shape[0], width)
    return k_THD.shape[0] == angles[1] and cos.shape == angles and sin.shape == angles


def _gates(gate: Tensor, up: Tensor) -> bool:
    return takes_lines(gate) and up.dtype == gate.dtype and gate.shape == up.shape and gate.numel() % LINE == 0


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class _Rotated(torch.autograd.Function):
    """Differentiable by what is rotated alone: backward rotates back."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_THD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = in_lines(cos), in_lines(sin)
        ctx.save_for_backward(cos, sin)
        return _rotate(q_THD, k_THD, cos, sin, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        dq_THD, dk_THD = _rotate(gradients[0], gradients[1], cos, sin, backwards=True)
        return dq_THD, dk_THD, None, None


def _rotate(q_THD: Tensor, k_THD: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    q_THD, k_THD = _by_lines(q_THD), _by_lines(k_THD)
    q_out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k_THD, memory_format=torch.contiguous_format)
    tokens, query_heads, width = q_THD.shape
    q_strides, k_strides = q_THD.stride(), k_THD.stride()
    require_compiled().rotate(
        (q_THD.data_ptr(), q_strides[0], q_strides[1], q_out.data_ptr(), query_heads),
        (k_THD.data_ptr(), k_strides[0], k_strides[1], k_out.data_ptr(), k_THD.shape[1]),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        width,
        backwards,
        q_THD.dtype == torch.float16,
        current_stream(q_THD.device),
    )
    return q_out, k_out


def _by_lines(x_THD: Tensor) -> Tensor:
    """Return x with each token's head in one piece, at an address and strides that lines of it can be read by."""
    token_stride, head_stride, stride = x_THD.stride()
    together = stride == 1 and head_stride % LINE == 0 and token_stride % LINE == 0 and x_THD.data_ptr() % 16 == 0
    return x_THD if together else x_THD.clone(memory_format=torch.contiguous_format)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated_silu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gated_silu_backward(gradients[0], *ctx.saved_tensors)
