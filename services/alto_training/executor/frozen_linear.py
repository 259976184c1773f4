"""The backbone's own matrix products: dense, whichever way its weight lies."""

from __future__ import annotations

import torch
from torch import nn


class DenseLinear:
    """A frozen dense weight. `weight_NK` is [N, K] (a transposed view where the model stores [K, N]), `bias_N` [N]."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight_NK.shape
        self._weight_NK = weight_NK
        self._bias_N = bias_N

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return W x + bias, a new [T, N]."""
        return torch.nn.functional.linear(x_TK, self._weight_NK, self._bias_N)

    def input_gradient(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """Return dY W, a new [T, K]."""
        return dy_TN @ self._weight_NK


def dense_linear(module: nn.Module) -> DenseLinear | None:
    """Return `module` as a frozen dense product, None if it is no linear layer. GPT-2's Conv1D keeps [K, N]."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return DenseLinear(module.weight.data, None if module.bias is None else module.bias.data)
    if isinstance(module, Conv1D):
        return DenseLinear(module.weight.data.t(), module.bias.data)
    return None
