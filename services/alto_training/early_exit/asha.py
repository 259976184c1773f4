"""Policy `asha`: asynchronous successive halving in its stopping form (Li et al., MLSys 2020; as in Ray Tune).

Rungs lie at warmup_fraction x eta^k of a trial's steps, eta = 1 / keep_fraction. Nobody waits: a trial that comes to a
rung carries on if it is among the best keep_fraction of those that have come there so far, itself included, and stops
otherwise. Ties are kept. Early comers are judged mildly: that is the price of not waiting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.hyperband import rung_fractions
from alto_training.early_exit.policy import Decision, Observation, State, Verdict, check_state, non_finite


class AshaPolicy:
    """One ladder of rungs, each remembering every loss that was brought to it, also by trials that have ended."""

    name = "asha"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._trial_ids = list(trial_ids)
        self._alive = set(trial_ids)
        self._keep_fraction = settings.keep_fraction
        self._fractions = rung_fractions(settings)
        self._losses: list[dict[str, float]] = [{} for _ in self._fractions]

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Judge the trial at every rung that it reaches with this evaluation."""
        if not observation.is_finite:
            self._alive.discard(trial_id)
            return [non_finite(trial_id, observation)]
        decisions = []
        for fraction, losses in zip(self._fractions, self._losses, strict=True):
            if trial_id not in self._alive or trial_id in losses or not observation.has_reached(fraction):
                continue
            losses[trial_id] = observation.validation_loss
            if observation.is_last:
                continue
            decision = self._judge(trial_id, fraction, losses)
            decisions.append(decision)
            if decision.verdict is Verdict.STOP:
                self._alive.remove(trial_id)
        return decisions

    def _judge(self, trial_id: str, fraction: float, losses: dict[str, float]) -> Decision:
        loss = losses[trial_id]
        places = max(1, math.ceil(self._keep_fraction * len(losses) - 1e-9))
        cut_loss = sorted(losses.values())[places - 1]
        stays = loss <= cut_loss
        return Decision(
            trial_id,
            Verdict.KEEP if stays else Verdict.STOP,
            "asha_rung",
            f"{'Kept' if stays else 'Stopped'} at {fraction:.0%} of its steps: validation loss {loss:.4g}, where the "
            f"best {places} of {len(losses)} that have come this far reach {cut_loss:.4g}.",
            {"validation_loss": loss, "trials": float(len(losses)), "places": float(places)},
            cut_loss,
        )

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Judge the trial no more; its losses still count for those who come later."""
        self._alive.discard(trial_id)
        return []

    def state_dict(self) -> State:
        """Return every rung."""
        return {
            "policy": self.name,
            "trial_ids": self._trial_ids,
            "alive": sorted(self._alive),
            "losses": [dict(losses) for losses in self._losses],
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        check_state(state, self.name, self._trial_ids)
        self._alive = set(state["alive"])
        self._losses = [dict(losses) for losses in state["losses"]]
