"""A linear layer of the frozen backbone, with the adapters of the tick that is being run."""

from __future__ import annotations

import torch
from torch import nn

from alto_training.executor.lora_backend import FrozenLinear, LoraBackend
from alto_training.executor.projections import Projections, SharedInput
from alto_training.executor.tick import CurrentTick


class MultiLoraLinear(nn.Module):
    """The backbone's linear layer number `index`, with the adapters of the current tick."""

    def __init__(self, frozen: FrozenLinear, index: int, path: str, backend: LoraBackend, current: CurrentTick) -> None:
        super().__init__()
        self.frozen = frozen
        self.index = index
        self.path = path
        self.backend = backend
        self.current = current
        self.shared_input: SharedInput | None = None
        self.runs_once = True  # in a pass; not where the model uses a layer in several places, or in none
        self._alone = Projections((self,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., K] to [..., N]; the leading dimensions hold the tick's T tokens in order."""
        tick = self.current.require()
        if self.shared_input is None:
            (y_TN,) = self._alone.outputs(x, tick)
        else:
            y_TN = self.shared_input.output(self, x, tick)
        return y_TN.view(*x.shape[:-1], self.frozen.out_features)
