"""Policy `hyperband`: brackets of successive halving that start to cut at different times (Li et al., JMLR 2018).

With eta = 1 / keep_fraction, the rungs of the most aggressive bracket lie at warmup_fraction x eta^k of the steps; each
milder bracket leaves out the first rung of the one before, down to a bracket that is never cut. Hyperband's own sizes
deal the trials to the brackets, spread evenly over their order, because a grid lists similar trials side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alto_common.tuning import EarlyExit

from alto_training.early_exit.halving import Halving
from alto_training.early_exit.policy import Decision, Observation, State, check_state

MAX_RUNGS = 20


def rung_fractions(settings: EarlyExit) -> list[float]:
    """Return the fractions below 1 at which the most aggressive bracket cuts, at most `MAX_RUNGS` of them."""
    eta = 1 / settings.keep_fraction
    fractions: list[float] = []
    fraction = settings.warmup_fraction
    while eta > 1 and 0 < fraction < 1 - 1e-9 and len(fractions) < MAX_RUNGS:
        fractions.append(fraction)
        fraction *= eta
    return fractions


def deal(trial_ids: Sequence[str], weights: Sequence[float]) -> list[list[str]]:
    """Deal trials to one hand a weight, in proportion and interleaved: always to the hand furthest behind its share."""
    hands: list[list[str]] = [[] for _ in weights]
    for count, trial_id in enumerate(trial_ids, start=1):
        behind = [count * weight / sum(weights) - len(hand) for weight, hand in zip(weights, hands, strict=True)]
        hands[behind.index(max(behind))].append(trial_id)
    return hands


class HyperbandPolicy:
    """Several groups of trials, each with its own ladder of rungs."""

    name = "hyperband"

    def __init__(self, settings: EarlyExit, trial_ids: Sequence[str]) -> None:
        self._trial_ids = list(trial_ids)
        fractions = rung_fractions(settings)
        eta = 1 / settings.keep_fraction
        # Bracket s cuts s times and begins with ceil((s_max + 1) / (s + 1) x eta^s) trials (Hyperband, algorithm 1).
        cuts = range(len(fractions), -1, -1)
        weights = [math.ceil((len(fractions) + 1) / (s + 1) * eta**s) for s in cuts]
        groups = deal(trial_ids, weights)
        self._brackets = [
            Halving(settings, group, fractions[len(fractions) - s :]) for s, group in zip(cuts, groups, strict=True)
        ]
        self._bracket_of = {trial_id: index for index, group in enumerate(groups) for trial_id in group}

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Apply the rules of the trial's bracket."""
        return self._brackets[self._bracket_of[trial_id]].observe(trial_id, observation)

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Release the trials of the same bracket that waited for this one."""
        return self._brackets[self._bracket_of[trial_id]].trial_ended(trial_id)

    def state_dict(self) -> State:
        """Return the state of every bracket."""
        brackets = [bracket.state_dict() for bracket in self._brackets]
        return {"policy": self.name, "trial_ids": self._trial_ids, "brackets": brackets}

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        check_state(state, self.name, self._trial_ids)
        for bracket, saved in zip(self._brackets, state["brackets"], strict=True):
            bracket.load_state_dict(saved)
