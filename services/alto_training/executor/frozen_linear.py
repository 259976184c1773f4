"""The backbone's own matrix products: dense, whichever way its weight lies, or with a weight in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alto_training.executor.nf4 import Nf4Linear


class DenseLinear:
    """A frozen dense layer; its weight is looked up at each use, for a sharded backbone lets go of it between passes.

    `module` holds `weight` as [N, K], or as [K, N] where `transposed`, and `bias` [N] or None.
    """

    def __init__(self, module: Any, in_features: int, out_features: int, transposed: bool = False) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.module = module
        self._held: dict[str, torch.Tensor | None] = module._parameters  # a module's attributes are found slowly
        self._transposed = transposed

    @property
    def weight_NK(self) -> torch.Tensor:
        """The weight, [N, K]: a view."""
        weight = self._held["weight"]
        assert weight is not None
        return weight.t() if self._transposed else weight

    @property
    def bias_N(self) -> torch.Tensor | None:
        """The bias, [N], None without one."""
        return self._held["bias"]

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return W x + bias, a new [T, N]."""
        return torch.nn.functional.linear(x_TK, self.weight_NK, self.bias_N)

    def input_gradient(self, dy_TN: torch.Tensor, onto_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Return dY W, [T, K]: a new tensor, or `onto_TK` with it added."""
        return _product_onto(dy_TN, self.weight_NK, onto_TK)


class QuantisedLinear:
    """A frozen layer in NF4: its weight is dense within a product alone, and nothing keeps it for the backward pass."""

    def __init__(self, module: Nf4Linear) -> None:
        self.in_features, self.out_features = module.in_features, module.out_features
        self.module = module

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return W x + bias, a new [T, N]."""
        y_TN: torch.Tensor = self.module(x_TK)
        return y_TN

    def input_gradient(self, dy_TN: torch.Tensor, onto_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Return dY W, [T, K]: a new tensor, or `onto_TK` with it added."""
        return _product_onto(dy_TN, self.module.weight, onto_TK)


def frozen_linear(module: nn.Module) -> DenseLinear | QuantisedLinear | None:
    """Return `module` as a frozen product, None if it is no linear layer. GPT-2's Conv1D keeps [K, N]."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Nf4Linear):
        return QuantisedLinear(module)
    # Not a subclass that does something else besides, as routers of experts do.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return DenseLinear(module, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return DenseLinear(module, module.nx, module.nf, transposed=True)
    return None


def _product_onto(dy_TN: torch.Tensor, weight_NK: torch.Tensor, onto_TK: torch.Tensor | None) -> torch.Tensor:
    return dy_TN @ weight_NK if onto_TK is None else onto_TK.addmm_(dy_TN, weight_NK)
