"""Negative log-likelihood of target tokens, in chunks: the [rows, vocabulary] logits never exist whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Logits that exist at a time. A chunk reads the head's weight twice: on a GPU it must be of some hundred rows, or that
# takes longer than its products (a vocabulary of 128,256: 523 rows, 256 MiB in fp32; with 65 rows four times as long).
_CHUNK_ELEMENTS = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True)
class OutputHead:
    """The frozen map from a hidden state to logits: softcap(scale * (W h + bias)).

    `weight_VH` is [V, H], `bias_V` [V] or None. `softcap` c > 0 means c * tanh(x / c) (Gemma 2).
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [R, V]."""
        logits_RV = torch.nn.functional.linear(hidden_RH, self.weight_VH, self.bias_V).float()
        if self.scale != 1.0:
            logits_RV = logits_RV.mul_(self.scale)
        if self.softcap is not None:
            logits_RV = logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_RV


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
        chunk = max(1, _CHUNK_ELEMENTS[hidden_RH.device.type] // head.weight_VH.shape[0])
        for start in range(0, rows, chunk):
            here = slice(start, start + chunk)
            logits_CV = head.logits(hidden_RH[here])
            target_C1 = targets_R[here, None]
            target_logit_C = logits_CV.gather(1, target_C1).squeeze(1)
            largest_C1 = logits_CV.amax(dim=1, keepdim=True)
            slope_CV = 1.0 - (logits_CV / head.softcap).square_() if needs_gradient and head.softcap else None
            exponential_CV = logits_CV.sub_(largest_C1).exp_()
            sum_C1 = exponential_CV.sum(dim=1, keepdim=True)
            nll_R[here] = (sum_C1.log() + largest_C1).squeeze(1) - target_logit_C
            if gradient_RH is None:
                continue
            gradient_CV = exponential_CV.div_(sum_C1)
            gradient_CV.scatter_add_(1, target_C1, torch.full_like(sum_C1, -1.0))
            if slope_CV is not None:
                gradient_CV.mul_(slope_CV)
            weight_VH = head.weight_VH
            gradient_CH = gradient_CV.to(weight_VH.dtype) @ weight_VH
            gradient_RH[here] = gradient_CH if head.scale == 1.0 else gradient_CH * head.scale
        if gradient_RH is not None:
            ctx.save_for_backward(gradient_RH)
        return nll_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_RH,) = ctx.saved_tensors
        (upstream_R,) = grad_outputs
        return (gradient_RH * upstream_R[:, None]).to(gradient_RH.dtype), None, None
