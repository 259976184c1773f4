"""What a decoder does between its products, in one launch each: rotation of queries and keys, and the gated SiLU.

In 16 bits on a GPU that the CUDA build is for; anything else goes through torch, in as many operators as that takes.
Both compute in fp32 and round once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from alto_kernels.availability import cuda_kernels, require_compiled
from alto_kernels.streams import current_stream

_LINE = 8  # elements that are read at once


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q [1, Hq, T, D] and k [1, Hk, T, D], each times cos plus (minus its second half, its first) times sin.

    cos and sin are [1, T, D]. Differentiable by q and k. What is returned lies in memory as [1, T, H, D].
    """
    alike = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[2:] == k.shape[2:]
    fits = q.shape[0] == k.shape[0] == 1 and cos.shape == sin.shape == (1, *q.shape[2:])
    if _takes(q) and alike and fits and q.shape[-1] % (2 * _LINE) == 0:
        q_rotated, k_rotated = _Rotated.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]  # torch has no types for it
        return q_rotated, k_rotated
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape. Differentiable; gate and up are all that is kept for backward."""
    if _takes(gate) and up.dtype == gate.dtype and gate.shape == up.shape and gate.numel() % _LINE == 0:
        out: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]  # nor for this
        return out
    return torch.nn.functional.silu(gate) * up


def _takes(tensor: Tensor) -> bool:
    return tensor.is_cuda and _has_kernels(tensor.dtype)


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    return bool(cuda_kernels(dtype))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class _Rotated(torch.autograd.Function):
    """Differentiable by what is rotated alone: backward rotates back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = _aligned(cos), _aligned(sin)
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk = _rotate(gradients[0], gradients[1], cos, sin, backwards=True)
        return dq, dk, None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    _, _, tokens, width = q.shape
    q, k = _by_lines(q), _by_lines(k)
    outputs = [torch.empty(1, tokens, one.shape[1], width, dtype=one.dtype, device=one.device) for one in (q, k)]
    require_compiled().rotate(
        *(
            (one.data_ptr(), one.stride(2), one.stride(1), out.data_ptr(), one.shape[1])
            for one, out in zip((q, k), outputs, strict=True)
        ),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        width,
        backwards,
        q.dtype == torch.float16,
        current_stream(q.device),
    )
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


def _by_lines(x: Tensor) -> Tensor:
    """Return x with each token's head in one piece, at an address and strides that lines of it can be read by."""
    _, head_stride, token_stride, stride = x.stride()
    together = stride == 1 and head_stride % _LINE == 0 and token_stride % _LINE == 0 and x.data_ptr() % 16 == 0
    return x if together else x.clone(memory_format=torch.contiguous_format)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = _aligned(gate), _aligned(up)
        ctx.save_for_backward(gate, up)
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

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient = _aligned(gradients[0])
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


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
