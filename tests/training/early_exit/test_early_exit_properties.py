"""What holds for every policy on any curves: no deadlock, no verdict on the stopped, state survives, order is moot."""

import math
import random

import pytest
from alto_common.tuning import EarlyExit
from alto_training.early_exit import Observation, Verdict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .early_exit_driver import drive, names

# On a busy machine drawing is slow, which says nothing about the strategies.
SLOW_MACHINE = [HealthCheck.too_slow]
POLICIES = ["alto", "asha", "hyperband", "median", "none", "paper"]
losses = st.floats(0.01, 20) | st.sampled_from([1.0, 2.0])


@st.composite
def one_curve(draw: st.DrawFn, finite: bool = True) -> list[Observation]:
    total = draw(st.integers(1, 60))
    count = min(total, draw(st.integers(1, 20)))
    steps = sorted({math.ceil(index * total / count) for index in range(1, count + 1)})
    bad = draw(st.integers(0, 40)) if not finite else None
    examples = draw(st.integers(0, 3))
    found = []
    for index, step in enumerate(steps):
        train = math.nan if index == bad else draw(losses)
        per_example = tuple(draw(losses) for _ in range(examples)) if examples else None
        found.append(Observation(step, total, train, draw(losses), validation_losses=per_example))
    return found


def searches(finite: bool) -> st.SearchStrategy[dict[str, list[Observation]]]:
    def named(curves: list[list[Observation]]) -> dict[str, list[Observation]]:
        return dict(zip(names(len(curves)), curves, strict=True))

    return st.lists(one_curve(finite), min_size=1, max_size=7).map(named)


exits = st.builds(
    EarlyExit,
    policy=st.sampled_from(POLICIES),
    warmup_fraction=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.99, 1.0]),
    keep_fraction=st.sampled_from([0.1, 0.25, 0.5, 0.99, 1.0]),
    window=st.integers(2, 4),
    patience=st.integers(1, 3),
)


@settings(max_examples=150, suppress_health_check=SLOW_MACHINE)
@given(early_exit=exits, curves=searches(finite=False), slots=st.none() | st.integers(1, 3), obey=st.booleans())
def test_every_trial_ends_and_none_is_judged_after_its_stop(
    early_exit: EarlyExit, curves: dict[str, list[Observation]], slots: int | None, obey: bool
) -> None:
    run = drive(early_exit, curves, slots, obey_pause=obey)
    if obey:
        assert sorted([*run.stopped, *run.completed]) == sorted(curves)
    for trial_id, curve in curves.items():
        if early_exit.policy == "none" and all(one.is_finite for one in curve):
            assert trial_id in run.completed


@settings(max_examples=60, suppress_health_check=SLOW_MACHINE)
@given(early_exit=exits, curves=searches(finite=False), slots=st.none() | st.integers(1, 3))
def test_a_policy_reloaded_at_every_step_decides_the_same(
    early_exit: EarlyExit, curves: dict[str, list[Observation]], slots: int | None
) -> None:
    assert drive(early_exit, curves, slots, reload=True).decisions == drive(early_exit, curves, slots).decisions


def test_a_trial_that_one_rung_keeps_and_the_next_one_cuts_trains_no_more() -> None:
    """Hyperband puts trials 1, 4 and 6 on one ladder; the last of them to come passes all its first rungs at once."""
    once = [Observation(1, 1, 1.0, 1.0)]
    curves = dict.fromkeys(names(6), once)
    curves["trial-001"] = [Observation(step, 2, 1.0, 3.0) for step in (1, 2)]
    curves["trial-004"] = [Observation(step, 12, 1.0, 2.0) for step in range(1, 13)]
    curves["trial-006"] = [Observation(step, 2, 1.0, 1.0) for step in (1, 2)]
    run = drive(EarlyExit("hyperband", warmup_fraction=0.01, keep_fraction=0.5), curves, slots=1)
    verdicts = [one.verdict for one in run.decisions if one.trial_id == "trial-004"]
    assert verdicts == [Verdict.PAUSE, Verdict.KEEP, Verdict.STOP]
    assert run.stopped == {"trial-001": "underperformance", "trial-004": "underperformance"}
    assert run.evaluations == 7


@settings(max_examples=60, suppress_health_check=SLOW_MACHINE)
@given(
    levels=st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]), min_size=1, max_size=9),
    keep=st.sampled_from([0.1, 0.25, 0.5, 0.75]),
    shuffle=st.randoms(use_true_random=False),
    slots=st.none() | st.integers(1, 4),
)
def test_paper_keeps_the_right_number_whatever_the_order(
    levels: list[float], keep: float, shuffle: random.Random, slots: int | None
) -> None:
    curves = {
        name: [Observation(step, 20, level, level) for step in range(1, 21)]
        for name, level in zip(names(len(levels)), levels, strict=True)
    }
    run = drive(EarlyExit("paper", keep_fraction=keep), curves, slots)
    places = math.ceil(keep * len(levels) - 1e-9)
    cut = sorted(levels)[places - 1]
    assert sorted(run.completed) == [name for name, level in zip(curves, levels, strict=True) if level <= cut]
    order = list(curves)
    shuffle.shuffle(order)
    shuffled = drive(EarlyExit("paper", keep_fraction=keep), {name: curves[name] for name in order}, slots)
    assert shuffled.stopped == run.stopped


@settings(max_examples=50, suppress_health_check=SLOW_MACHINE)
@given(early_exit=exits, curves=searches(finite=True))
def test_relative_rules_never_stop_the_last_trial(early_exit: EarlyExit, curves: dict[str, list[Observation]]) -> None:
    run = drive(early_exit, curves)
    relative = [one for one in run.decisions if one.verdict is Verdict.STOP and one.rule in {"underperformance"}]
    assert len(relative) < len(curves)


@given(
    first=st.floats(1, 5),
    falls=st.lists(st.floats(0.0001, 0.1), min_size=5, max_size=20),
    policy=st.sampled_from(["paper", "alto"]),
)
def test_a_curve_that_only_falls_never_diverges(first: float, falls: list[float], policy: str) -> None:
    value, values = first, []
    for fall in falls:
        values.append(value)
        value -= fall * value
    observations = [Observation(step, len(values), one, one) for step, one in enumerate(values, start=1)]
    assert drive(EarlyExit(policy), {"a": observations}).stopped == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_search_of_one_trial_runs_to_its_end(policy: str) -> None:
    curve = [Observation(step, 20, 2 - step / 20, 2 - step / 20) for step in range(1, 21)]
    assert drive(EarlyExit(policy), {"a": curve}).completed == ["a"]
