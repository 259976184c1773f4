"""Counting the passes that a backbone went through on this rank, with work and without."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from alto_training.executor.backbone_weights import BackboneWeights
from alto_training.executor.losses import OutputHead


class CountedPasses:
    """`BackboneWeights` that count: `training` and `inference` passes with work, and `idle` ones of either kind."""

    def __init__(self, weights: BackboneWeights) -> None:
        self.weights = weights
        self.fingerprint = weights.fingerprint
        self.parameters = weights.parameters
        self.training = 0
        self.inference = 0
        self.idle_training = 0
        self.idle_inference = 0

    def head(self) -> AbstractContextManager[OutputHead]:
        """See `BackboneWeights.head`: once a pass."""
        if torch.is_grad_enabled():
            self.training += 1
        else:
            self.inference += 1
        return self.weights.head()

    def idle_pass(self, training: bool) -> None:
        """See `BackboneWeights.idle_pass`."""
        if training:
            self.idle_training += 1
        else:
            self.idle_inference += 1
        self.weights.idle_pass(training)
