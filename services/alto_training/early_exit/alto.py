"""Policy `alto`: the paper's three rules with guards against the noise of a small validation set.

1. At the end of warm-up, trials beyond the cut are compared with the last one kept example by example: differences on
   the same validation examples cancel most of the noise. Clearly worse (by more than `CUT_SIGMAS` standard errors) is
   stopped; what is too close to call is paused.
2. A paused trial comes back, best first, when one of those that carry on ends before its last step, or when none of
   them has improved for twice the patience. When all of them have ended, the rest is stopped.
3. Divergence and overfitting stop a trial only if its validation loss has also risen above its own best by more than
   `RISE_SIGMAS` standard errors of the paired difference: a gap alone, while validation still improves, stops nothing.

Where the executor gives no losses by example there is no estimate of the noise: every difference then counts as clear.
A first version: its constants follow from experience with few searches, not from calibration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from alto_common.tuning import EarlyExit

from alto_training.early_exit.policy import Decision, Observation, State, Verdict, check_state, non_finite
from alto_training.early_exit.rung import Ranking, Rung
from alto_training.early_exit.trajectory import Trajectory

CUT_SIGMAS = 2.0
RISE_SIGMAS = 3.0


@dataclass(frozen=True)
class Measured:
    """A validation loss with, where there are, the losses of its examples."""

    loss: float
    examples: tuple[float, ...] = ()

    def excess_over(self, other: Measured) -> tuple[float, float]:
        """Return how much this loss is above `other`, and the standard error of that (0 where it is not known)."""
        differences = [mine - its for mine, its in zip(self.examples, other.examples, strict=False)]
        if len(differences) < 2 or len(self.examples) != len(other.examples):
            return self.loss - other.loss, 0.0
        return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


class AltoPolicy:
    """One guarded rung, guarded trajectories, and a bench of paused trials."""

    name = "alto"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._settings = settings
        self._trial_ids = list(trial_ids)
        self._alive = list(trial_ids)
        self._trajectories = {trial_id: Trajectory(settings) for trial_id in trial_ids}
        self._rung = Rung(settings.warmup_fraction, settings.keep_fraction, trial_ids)
        self._at_rung: dict[str, Measured] = {}
        self._best: dict[str, Measured] = {}
        self._evaluations_since_best = dict.fromkeys(trial_ids, 0)
        self._bench: list[str] = []
        self._completed: list[str] = []

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Apply the guarded rules to one more evaluation."""
        if not observation.is_finite:
            return [non_finite(trial_id, observation), *self.trial_ended(trial_id)]
        if trial_id not in self._alive:
            return []
        if observation.is_last:
            self._completed.append(trial_id)
            return []
        measured = Measured(observation.validation_loss, observation.validation_losses or ())
        decision = self._guarded_trajectory(trial_id, observation, measured)
        if decision is not None:
            return [decision, *self.trial_ended(trial_id)]
        decisions: list[Decision] = []
        if self._settings.keep_fraction < 1 and self._rung.is_awaited(trial_id, observation):
            self._at_rung[trial_id] = measured
            ranking = self._rung.reach(trial_id, observation.validation_loss)
            decisions += self._settle(ranking) if ranking else [self._rung.wait(trial_id)]
        elif self._leaders_stall():
            decisions += self._call_up("those that carry on have stopped improving")
        return decisions

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Fill the place of a trial that left early; end the bench when nobody is left to replace."""
        if trial_id not in self._alive:
            return []
        self._alive.remove(trial_id)
        was_benched = trial_id in self._bench
        self._bench = [one for one in self._bench if one != trial_id]
        ranking = self._rung.leave([trial_id])
        decisions = self._settle(ranking) if ranking else []
        if self._rung.decided and not was_benched and ranking is None:
            if trial_id not in self._completed:
                decisions += self._call_up(f"{trial_id} left before its last step")
            if not self._leaders():
                decisions += self._dismiss_bench()
        return decisions

    def _guarded_trajectory(self, trial_id: str, observation: Observation, measured: Measured) -> Decision | None:
        decision = self._trajectories[trial_id].observe(trial_id, observation)
        best = self._best.get(trial_id)
        if best is None or measured.loss < best.loss:
            self._best[trial_id] = measured
            self._evaluations_since_best[trial_id] = 0
            return None
        self._evaluations_since_best[trial_id] += 1
        rise, error = measured.excess_over(best)
        if decision is None or rise <= RISE_SIGMAS * error:
            return None
        return Decision(
            trial_id,
            decision.verdict,
            decision.rule,
            f"{decision.reason} Its validation loss is {rise:.4g} above its own best, more than {RISE_SIGMAS:g} times "
            f"the noise ({error:.2g}).",
            {**decision.evidence, "rise": rise, "rise_standard_error": error},
            decision.threshold,
        )

    def _settle(self, ranking: Ranking) -> list[Decision]:
        """Keep the best, stop what is clearly worse than the last of them, bench what is too close to call."""
        decisions = []
        last_kept = self._at_rung[ranking.kept[-1]]
        for decision in self._rung.verdicts(ranking):
            if decision.verdict is Verdict.KEEP:
                decisions.append(decision)
                continue
            excess, error = self._at_rung[decision.trial_id].excess_over(last_kept)
            evidence = {**decision.evidence, "excess": excess, "standard_error": error}
            measured = f"{excess:.4g} above {ranking.kept[-1]} on the same examples, standard error {error:.2g}"
            if excess <= CUT_SIGMAS * error:
                self._bench.append(decision.trial_id)
                reason = f"Paused, too close to call: its validation loss is {measured}. It comes back if it is needed."
                decision = Decision(decision.trial_id, Verdict.PAUSE, "too_close", reason, evidence, CUT_SIGMAS * error)
            else:
                self._alive.remove(decision.trial_id)
                reason = f"{decision.reason} The difference is clear: {measured}."
                decision = Decision(
                    decision.trial_id, Verdict.STOP, decision.rule, reason, evidence, decision.threshold
                )
            decisions.append(decision)
        return decisions

    def _leaders(self) -> list[str]:
        return [one for one in self._alive if one not in self._bench and one not in self._completed]

    def _leaders_stall(self) -> bool:
        stall = 2 * self._settings.patience
        return self._rung.decided and all(self._evaluations_since_best[one] >= stall for one in self._leaders())

    def _call_up(self, occasion: str) -> list[Decision]:
        """Bring back the best paused trial."""
        if not self._bench:
            return []
        trial_id = self._bench.pop(0)
        loss = self._at_rung[trial_id].loss
        reason = f"Resumed, the best of those paused (validation loss {loss:.4g} at the cut): {occasion}."
        return [Decision(trial_id, Verdict.KEEP, "called_up", reason, {"validation_loss": loss})]

    def _dismiss_bench(self) -> list[Decision]:
        decisions = []
        for trial_id in self._bench:
            loss = self._at_rung[trial_id].loss
            reason = (
                f"Stopped: it was paused with validation loss {loss:.4g}, and the trials ahead of it went through to "
                "their last step without needing a replacement."
            )
            decisions.append(Decision(trial_id, Verdict.STOP, "not_needed", reason, {"validation_loss": loss}))
        self._alive = [one for one in self._alive if one not in self._bench]
        self._bench = []
        return decisions

    def state_dict(self) -> State:
        """Return the rung, the curves' bests and the bench."""
        return {
            "policy": self.name,
            "trial_ids": self._trial_ids,
            "alive": self._alive,
            "trajectories": {trial_id: one.state_dict() for trial_id, one in self._trajectories.items()},
            "rung": self._rung.state_dict(),
            "at_rung": {trial_id: [one.loss, *one.examples] for trial_id, one in self._at_rung.items()},
            "best": {trial_id: [one.loss, *one.examples] for trial_id, one in self._best.items()},
            "evaluations_since_best": self._evaluations_since_best,
            "bench": self._bench,
            "completed": self._completed,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        check_state(state, self.name, self._trial_ids)
        self._alive = list(state["alive"])
        for trial_id, saved in state["trajectories"].items():
            self._trajectories[trial_id].load_state_dict(saved)
        self._rung.load_state_dict(state["rung"])
        self._at_rung = {trial_id: Measured(one[0], tuple(one[1:])) for trial_id, one in state["at_rung"].items()}
        self._best = {trial_id: Measured(one[0], tuple(one[1:])) for trial_id, one in state["best"].items()}
        self._evaluations_since_best = dict(state["evaluations_since_best"])
        self._bench = list(state["bench"])
        self._completed = list(state["completed"])
