"""Policy `paper`: the three rules of arXiv 2604.05426, as published.

Divergence and overfitting are watched at every evaluation (`trajectory`); at the end of warm-up the best
`keep_fraction` of the trials by validation loss carry on (`rung`), once every trial that is still alive has come there.
The source leaves ties open: they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.halving import Halving
from alto_training.early_exit.policy import Decision, Observation, State, check_state


class PaperPolicy:
    """One rung, at the end of warm-up."""

    name = "paper"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._trial_ids = list(trial_ids)
        self._halving = Halving(settings, trial_ids, [settings.warmup_fraction])

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Apply the three rules to one more evaluation."""
        return self._halving.observe(trial_id, observation)

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Release the trials that waited for this one at the end of warm-up, if it was the last."""
        return self._halving.trial_ended(trial_id)

    def state_dict(self) -> State:
        """Return the windows, counts and the rung."""
        return {"policy": self.name, "trial_ids": self._trial_ids, "halving": self._halving.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        check_state(state, self.name, self._trial_ids)
        self._halving.load_state_dict(state["halving"])
