"""Negative log-likelihood of target tokens, in chunks: the [rows, vocabulary] logits never exist whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from alto_kernels.token_nll import is_in_place, logits_of
from alto_kernels.token_nll import token_nll as logits_nll

# Bytes of logits that exist at a time. A chunk reads the head's weight twice: on a GPU it must be of some hundred rows,
# or that takes longer than its products (a vocabulary of 128,256: 1,046 rows in 16 bits; with 65 rows four times as
# long).
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class OutputHead:
    """The frozen map from a hidden state to logits: softcap(scale * (W h + bias)).

    `weight_VH` is [V, H], `bias_V` [V] or None. `softcap` c > 0 means c * tanh(x / c) (Gemma 2).
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def product(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Return W h + bias, a new [R, V], in the format of `hidden_RH`."""
        return torch.nn.functional.linear(hidden_RH, self.weight_VH, self.bias_V)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [R, V]."""
        return logits_of(self.product(hidden_RH), self.scale, self.softcap)


def token_nll(hidden_RH: torch.Tensor, targets_R: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Return -log p(target) for each row, [R] in fp32, differentiable by `hidden_RH` [R, H]; `targets_R` is int64.

    Rows never mix: a row that is not finite makes its own answer and gradient not finite, and no other.
    """
    nll: torch.Tensor = _TokenNll.apply(hidden_RH, targets_R, head)  # type: ignore[no-untyped-call]
    return nll


class _TokenNll(torch.autograd.Function):
    """Finds d nll / d hidden in the forward pass, while a chunk's probabilities are at hand; backward scales rows."""

    @staticmethod
    def forward(ctx: Any, hidden_RH: torch.Tensor, targets_R: torch.Tensor, head: OutputHead) -> torch.Tensor:
        rows = hidden_RH.shape[0]
        nll_R = torch.empty(rows, dtype=torch.float32, device=hidden_RH.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_RH = torch.empty_like(hidden_RH) if needs_gradient else None
        vocabulary = head.weight_VH.shape[0]
        row_bytes = vocabulary * (hidden_RH.element_size() if is_in_place(hidden_RH, vocabulary) else 4)
        chunk = max(1, _CHUNK_BYTES[hidden_RH.device.type] // row_bytes)
        for start in range(0, rows, chunk):
            here = slice(start, start + chunk)
            z_CV = head.product(hidden_RH[here])
            nll_R[here], gradient_CV = logits_nll(z_CV, targets_R[here], head.scale, head.softcap, needs_gradient)
            if gradient_RH is not None and gradient_CV is not None:
                torch.mm(gradient_CV, head.weight_VH, out=gradient_RH[here])
        if gradient_RH is not None:
            ctx.save_for_backward(gradient_RH)
        return nll_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_RH,) = ctx.saved_tensors
        (upstream_R,) = grad_outputs
        return (gradient_RH * upstream_R[:, None]).to(gradient_RH.dtype), None, None
