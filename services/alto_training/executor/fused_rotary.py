"""Rotary position embedding in three operators forward and three back; transformers' own takes five and about ten."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FUNCTION = "apply_rotary_pos_emb"
Rotary = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fuse_rotary(decoder: nn.Module) -> int:
    """Have the modules of transformers that `decoder` is made of rotate by ours, where theirs gives the same.

    They look their function up by name at each call, so that it changes for every model of the architecture. Returns
    how many rotate so now.
    """
    fused = 0
    for name in {type(module).__module__ for module in decoder.modules()}:
        own: Rotary | None = getattr(sys.modules.get(name), _FUNCTION, None)
        if own is not None and own is not rotated and _gives_the_same(own):
            setattr(sys.modules[name], _FUNCTION, rotated)
            own = rotated
        fused += own is rotated
    return fused


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k, each times cos plus (minus its second half, its first half) times sin.

    q and k are [1, heads, T, D]; cos and sin [1, T, D] get their dimension for heads at `unsqueeze_dim`.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    """Differentiable by what is rotated alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        first_sin, second_sin = sin.chunk(2, dim=-1)
        return _rotate(x, cos, first_sin, second_sin, -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first_sin, second_sin = sin.chunk(2, dim=-1)
        return _rotate(grad_outputs[0], cos, second_sin, first_sin, 1), None, None


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, first_sin: torch.Tensor, second_sin: torch.Tensor, sign: int
) -> torch.Tensor:
    """Return x cos, with `sign` times the second half of x added to the first, and the first taken from the second."""
    y = x * cos
    (x_first, x_second), (y_first, y_second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_first.addcmul_(x_second, first_sin, value=sign)
    y_second.addcmul_(x_first, second_sin, value=-sign)
    return y


def _gives_the_same(own: Rotary) -> bool:
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=draws) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=draws) for _ in range(2))
    try:
        pairs = list(zip(own(q, k, cos, sin), rotated(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5) for theirs, ours in pairs)
