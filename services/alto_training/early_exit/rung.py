"""A rung: the point, at one fraction of everyone's own steps, where trials wait for each other and the worse leave."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from alto_training.early_exit.policy import Decision, Observation, State, Verdict


@dataclass(frozen=True)
class Ranking:
    """The order of the trials at a rung: `kept` and `cut` hold trial ids, best first; `cut_loss` is the worst kept."""

    kept: tuple[str, ...]
    cut: tuple[str, ...]
    cut_loss: float


class Rung:
    """Collects one validation loss a trial and ranks them once all members that are still alive have given theirs.

    Trials have different numbers of steps, so each is taken at its first evaluation at or past `fraction` of its own:
    equal shares of the data seen. The best ceil(keep_fraction x members alive) stay, and whoever ties with the last of
    them.
    """

    def __init__(self, fraction: float, keep_fraction: float, members: Iterable[str]) -> None:
        self.fraction = fraction
        self.keep_fraction = keep_fraction
        self.losses: dict[str, float] = {}
        self.decided = False
        self._members = list(members)

    def is_awaited(self, trial_id: str, observation: Observation) -> bool:
        """Return whether this evaluation is the one that the rung wants of this trial."""
        return (
            not self.decided
            and trial_id in self._members
            and trial_id not in self.losses
            and observation.has_reached(self.fraction)
        )

    def reach(self, trial_id: str, validation_loss: float) -> Ranking | None:
        """Note the loss of a trial; return the ranking if it was the last one awaited."""
        self.losses[trial_id] = validation_loss
        return self._ranking()

    def leave(self, trial_ids: Collection[str]) -> Ranking | None:
        """Strike trials that ended; return the ranking if all others were waiting for them."""
        if self.decided or not any(trial_id in self._members for trial_id in trial_ids):
            return None
        self._members = [trial_id for trial_id in self._members if trial_id not in trial_ids]
        self.losses = {trial_id: loss for trial_id, loss in self.losses.items() if trial_id not in trial_ids}
        return self._ranking()

    def _ranking(self) -> Ranking | None:
        if not self._members or len(self.losses) < len(self._members):
            return None
        self.decided = True
        order = sorted(self._members, key=lambda trial_id: self.losses[trial_id])
        places = math.ceil(self.keep_fraction * len(order) - 1e-9)
        cut_loss = self.losses[order[max(1, places) - 1]]
        kept = tuple(trial_id for trial_id in order if self.losses[trial_id] <= cut_loss)
        return Ranking(kept, tuple(order[len(kept) :]), cut_loss)

    def wait(self, trial_id: str) -> Decision:
        """Return the decision that parks a trial here until the others have come."""
        waiting_for = len(self._members) - len(self.losses)
        return Decision(
            trial_id,
            Verdict.PAUSE,
            "rung_wait",
            f"Paused at {self.fraction:.0%} of its steps with validation loss {self.losses[trial_id]:.4g}, until all "
            f"{len(self._members)} trials have come as far ({waiting_for} more) and the best can be chosen.",
            {"validation_loss": self.losses[trial_id], "waiting_for": float(waiting_for)},
        )

    def verdicts(self, ranking: Ranking) -> list[Decision]:
        """Return the decisions that follow from the ranking: keep the best, stop the rest."""
        order = ranking.kept + ranking.cut
        decisions = []
        for place, trial_id in enumerate(order, start=1):
            loss = self.losses[trial_id]
            stays = trial_id in ranking.kept
            begin = "Kept" if stays else "Stopped as underperforming"
            decisions.append(
                Decision(
                    trial_id,
                    Verdict.KEEP if stays else Verdict.STOP,
                    "underperformance",
                    f"{begin}: at {self.fraction:.0%} of the steps its validation loss {loss:.4g} is number {place} of "
                    f"{len(order)}; the best {len(ranking.kept)} (up to {ranking.cut_loss:.4g}) carry on.",
                    {"validation_loss": loss, "place": float(place), "trials": float(len(order))},
                    ranking.cut_loss,
                )
            )
        return decisions

    def state_dict(self) -> State:
        """Return who is still awaited and what was measured."""
        return {"members": self._members, "losses": self.losses, "decided": self.decided}

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        self._members = list(state["members"])
        self.losses = dict(state["losses"])
        self.decided = state["decided"]
