"""Trajectory rules plus a ladder of rungs: the frame that the paper's policy and Hyperband's brackets share."""

from __future__ import annotations

from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.policy import Decision, Observation, State, non_finite
from alto_training.early_exit.rung import Ranking, Rung
from alto_training.early_exit.trajectory import Trajectory


class Halving:
    """Runs a group of trials through rungs at rising fractions, with the trajectory rules at every evaluation.

    A trial that comes to a rung before the others is paused there (the slot is better used by those still to come);
    the last arrival, or the end of the last one awaited, releases all. Trials that a rung stops leave the later rungs.
    """

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str], rung_fractions: Sequence[float]) -> None:
        self._trajectories = {trial_id: Trajectory(settings) for trial_id in trial_ids}
        self._alive = set(trial_ids)
        # Keeping everyone decides nothing, so nobody needs to wait for it.
        self._rungs = [
            Rung(fraction, settings.keep_fraction, trial_ids)
            for fraction in sorted(rung_fractions)
            if settings.keep_fraction < 1
        ]

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Return what follows from an evaluation, for any trial of the group."""
        if not observation.is_finite:
            return [non_finite(trial_id, observation), *self.trial_ended(trial_id)]
        if trial_id not in self._alive or observation.is_last:
            return []
        exit_decision = self._trajectories[trial_id].observe(trial_id, observation)
        if exit_decision is not None:
            return [exit_decision, *self.trial_ended(trial_id)]
        # One rung an evaluation: with few evaluations a trial may pass several at once, and waits at the highest.
        passed = [rung for rung in self._rungs if rung.is_awaited(trial_id, observation)]
        decisions: list[Decision] = []
        for rung in passed:
            # The rung before may have cut this very trial.
            if trial_id not in self._alive:
                break
            ranking = rung.reach(trial_id, observation.validation_loss)
            if ranking is not None:
                decisions += self._settle(rung, ranking)
        if passed and not passed[-1].decided and trial_id in self._alive:
            decisions.append(passed[-1].wait(trial_id))
        return decisions

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Strike a trial from every rung; return what that releases."""
        return self._strike([trial_id])

    def _strike(self, trial_ids: Sequence[str]) -> list[Decision]:
        # All of them leave before any rung is ranked, so that none takes a place it no longer wants.
        self._alive -= set(trial_ids)
        decisions: list[Decision] = []
        for rung in self._rungs:
            ranking = rung.leave(trial_ids)
            if ranking is not None:
                decisions += self._settle(rung, ranking)
        return decisions

    def _settle(self, rung: Rung, ranking: Ranking) -> list[Decision]:
        return [*rung.verdicts(ranking), *self._strike(ranking.cut)]

    def state_dict(self) -> State:
        """Return the state of every rule."""
        return {
            "alive": sorted(self._alive),
            "trajectories": {trial_id: one.state_dict() for trial_id, one in self._trajectories.items()},
            "rungs": [rung.state_dict() for rung in self._rungs],
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        self._alive = set(state["alive"])
        for trial_id, saved in state["trajectories"].items():
            self._trajectories[trial_id].load_state_dict(saved)
        for rung, saved in zip(self._rungs, state["rungs"], strict=True):
            rung.load_state_dict(saved)
