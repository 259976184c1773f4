"""Policy `none`: every trial runs to its end, unless its numbers stop being finite."""

from __future__ import annotations

from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.policy import Decision, Observation, State, check_state, non_finite


class NoPolicy:
    """Stops nothing but the non-finite: the exhaustive search that others are compared with."""

    name = "none"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._trial_ids = list(trial_ids)

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Stop the trial if its numbers are not finite."""
        return [] if observation.is_finite else [non_finite(trial_id, observation)]

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Return nothing: no trial waits for another."""
        return []

    def state_dict(self) -> State:
        """Return whose state this is."""
        return {"policy": self.name, "trial_ids": self._trial_ids}

    def load_state_dict(self, state: State) -> None:
        """Check that the state is ours."""
        check_state(state, self.name, self._trial_ids)
