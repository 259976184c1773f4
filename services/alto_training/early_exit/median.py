"""Policy `median`: the median stopping rule (Golovin et al., Google Vizier, KDD 2017).

After warm-up a trial stops when its best validation loss so far is worse than the median of what the other trials
averaged up to the same fraction of their own steps. It needs at least three others that have come as far.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.policy import Decision, Observation, State, Verdict, check_state, non_finite

MIN_PEERS = 3


class MedianPolicy:
    """Remembers every evaluation as (fraction of the trial's steps, validation loss), also of trials that ended."""

    name = "median"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._trial_ids = list(trial_ids)
        self._alive = set(trial_ids)
        self._warmup_fraction = settings.warmup_fraction
        self._curves: dict[str, list[tuple[float, float]]] = {trial_id: [] for trial_id in trial_ids}

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Compare the trial with what the others had averaged when they were as far."""
        if not observation.is_finite:
            self._alive.discard(trial_id)
            return [non_finite(trial_id, observation)]
        fraction = observation.step / observation.total_steps
        self._curves[trial_id].append((fraction, observation.validation_loss))
        early = not observation.has_reached(self._warmup_fraction)
        if early or observation.is_last or trial_id not in self._alive:
            return []
        averages = [
            average
            for other, curve in self._curves.items()
            if other != trial_id and (average := _average_up_to(curve, fraction)) is not None
        ]
        if len(averages) < MIN_PEERS:
            return []
        best = min(loss for _, loss in self._curves[trial_id])
        median = statistics.median(averages)
        if best <= median:
            return []
        self._alive.remove(trial_id)
        return [
            Decision(
                trial_id,
                Verdict.STOP,
                "median",
                f"Stopped at {fraction:.0%} of its steps: its best validation loss so far, {best:.4g}, is worse than "
                f"{median:.4g}, the median of what {len(averages)} other trials averaged up to there.",
                {"best_validation_loss": best, "median": median, "others": float(len(averages))},
                median,
            )
        ]

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Judge the trial no more; its curve still counts for the others."""
        self._alive.discard(trial_id)
        return []

    def state_dict(self) -> State:
        """Return every curve."""
        return {
            "policy": self.name,
            "trial_ids": self._trial_ids,
            "alive": sorted(self._alive),
            "curves": {trial_id: [list(point) for point in curve] for trial_id, curve in self._curves.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        check_state(state, self.name, self._trial_ids)
        self._alive = set(state["alive"])
        self._curves = {
            trial_id: [(fraction, loss) for fraction, loss in curve] for trial_id, curve in state["curves"].items()
        }


def _average_up_to(curve: list[tuple[float, float]], fraction: float) -> float | None:
    """Return the mean loss of `curve` up to its first point at or past `fraction`; None if it has not come so far."""
    losses = []
    for reached, loss in curve:
        losses.append(loss)
        if reached >= fraction - 1e-9:
            return statistics.fmean(losses)
    return None
