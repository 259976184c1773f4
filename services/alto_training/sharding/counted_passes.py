"""Counting the passes that a backbone went through on this rank, with work and without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from alto_training.executor.backbone_weights import BackboneWeights
from alto_training.executor.losses import OutputHead


class CountedPasses:
    """`BackboneWeights` that count: `training` and `inference` passes with work, and `idle` ones of either kind.

    `beat` is called at each: an evaluation is many passes without a word to the other ranks.
    """

    def __init__(self, weights: BackboneWeights, beat: Callable[[], None] = lambda: None) -> None:
        self._beat = beat
        self.weights = weights
        self.fingerprint = weights.fingerprint
        self.parameters = weights.parameters
        self.in_lock_step = weights.in_lock_step
        self.training = 0
        self.inference = 0
        self.idle_training = 0
        self.idle_inference = 0

    @property
    def uncounted_bytes(self) -> int:
        """See `BackboneWeights`."""
        return self.weights.uncounted_bytes

    def head(self) -> AbstractContextManager[OutputHead]:
        """See `BackboneWeights.head`: once a pass."""
        self._beat()
        if torch.is_grad_enabled():
            self.training += 1
        else:
            self.inference += 1
        return self.weights.head()

    def idle_pass(self, training: bool) -> None:
        """See `BackboneWeights.idle_pass`."""
        self._beat()
        if training:
            self.idle_training += 1
        else:
            self.idle_inference += 1
        self.weights.idle_pass(training)
