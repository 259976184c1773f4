"""The rules of each policy on curves where the right answer is known."""

import dataclasses
import math
import random

import pytest
from alto_common import stopping_policies
from alto_common.tuning import EarlyExit
from alto_training.early_exit import (
    Observation,
    PolicyStateError,
    UnknownPolicyError,
    Verdict,
    check_settings,
    make_policy,
)
from alto_training.early_exit.hyperband import deal, rung_fractions
from alto_training.early_exit.trajectory import slope

from .early_exit_driver import curve, drive, names

FALLING = [3.0 - 0.1 * index for index in range(20)]
KEEP_ALL = EarlyExit(keep_fraction=1.0)


def test_slope_is_that_of_the_least_squares_line() -> None:
    assert slope([1.0, 1.5]) == pytest.approx(0.5)
    assert slope([1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


def test_divergence_needs_both_slopes_for_patience_evaluations_running() -> None:
    rising = [2.0, 2.1, 2.2, 2.3, *([2.3] * 16)]
    run = drive(KEEP_ALL, {"a": curve(rising), "b": curve(rising, train=FALLING), "c": curve(FALLING, train=rising)})
    (stop,) = [one for one in run.decisions if one.rule == "divergence"]
    assert stop.trial_id == "a"
    assert stop.evidence["train_slope"] == pytest.approx(0.1)
    assert stop.threshold == 0.001
    # Window 2 is full at the second evaluation, so two evaluations running end at the third.
    assert stop.evidence["validation_loss"] == pytest.approx(2.2)


def test_a_slope_at_the_threshold_counts_and_one_below_resets_the_count() -> None:
    at = [2.0, 2.001 + 1e-12, 2.002 + 2e-12, 2.002, 2.002]
    assert drive(KEEP_ALL, {"a": curve(at)}).stopped == {"a": "divergence"}
    interrupted = [2.0, 2.1, 2.0, 2.1, 2.0, 2.1, 2.0]
    assert drive(KEEP_ALL, {"a": curve(interrupted)}).stopped == {}


@pytest.mark.parametrize("policy", ["paper", "alto", "hyperband"])
def test_counts_survive_a_reload_before_every_evaluation(policy: str) -> None:
    settings = EarlyExit(policy, keep_fraction=1.0, patience=3, window=3)
    rising = curve([2.0 + 0.1 * index for index in range(10)])
    gaping = curve([2.0 + 0.1 * index for index in range(10)], train=[2.0 - 0.1 * index for index in range(10)])
    run = drive(settings, {"rising": rising, "gaping": gaping}, reload=True)
    assert run.stopped == {"rising": "divergence", "gaping": "overfitting"}


@pytest.mark.parametrize("policy", ["paper", "alto", "hyperband", "asha", "median"])
def test_nothing_is_stopped_at_its_last_step(policy: str) -> None:
    worst = curve([1.0, 1.0, 2.0, 3.0])
    others = {name: curve([0.5] * 4) for name in names(4)}
    late = EarlyExit(policy, warmup_fraction=0.99)
    assert "late" in drive(late, {**others, "late": worst}).completed


def test_overfitting_needs_the_gap_for_patience_evaluations_running() -> None:
    train = [1.0] * 6
    assert drive(KEEP_ALL, {"a": curve([1.0, 1.2, 1.05, 1.2, 1.2, 1.0], train)}).stopped == {"a": "overfitting"}
    assert drive(KEEP_ALL, {"a": curve([1.0, 1.2, 1.05, 1.2, 1.05, 1.2], train)}).stopped == {}
    at = dataclasses.replace(KEEP_ALL, gap_threshold=0.25)
    assert drive(at, {"a": curve([1.25] * 6, train)}).stopped == {}, "the gap must be above, not at, the threshold"


def test_a_train_loss_of_zero_does_not_divide() -> None:
    assert drive(KEEP_ALL, {"a": curve([1.0] * 6, [0.0] * 6)}).stopped == {"a": "overfitting"}


@pytest.mark.parametrize("policy", ["alto", "asha", "hyperband", "median", "none", "paper"])
@pytest.mark.parametrize(
    "bad",
    [
        Observation(1, 20, math.nan, 1.0),
        Observation(1, 20, 1.0, math.inf),
        Observation(1, 20, 1.0, 1.0, finite=False),
        Observation(20, 20, math.nan, 1.0),
    ],
)
def test_every_policy_stops_the_non_finite_at_once(policy: str, bad: Observation) -> None:
    made = make_policy(EarlyExit(policy), ["a", "b"])
    decision = made.observe("a", bad)[0]
    assert (decision.trial_id, decision.verdict, decision.rule) == ("a", Verdict.STOP, "non_finite")
    assert all(math.isfinite(value) for value in decision.evidence.values())


def test_paper_keeps_the_best_quarter_at_the_end_of_warm_up() -> None:
    curves = {name: curve([loss + 2] * 20) for name, loss in zip(names(8), [5, 3, 8, 1, 7, 2, 6, 4], strict=True)}
    run = drive(EarlyExit("paper"), curves)
    assert run.completed == ["trial-004", "trial-006"]
    assert set(run.stopped.values()) == {"underperformance"}
    assert run.evaluations == 8 + 2 * 19


def test_paper_rounds_places_up_and_keeps_ties() -> None:
    assert len(drive(EarlyExit("paper"), {n: curve([1.0 + i] * 20) for i, n in enumerate(names(5))}).completed) == 2
    tied = {name: curve([loss] * 20) for name, loss in zip(names(8), [1, 2, 2, 2, 3, 3, 3, 3], strict=True)}
    assert drive(EarlyExit("paper"), tied).completed == names(4)


def test_trials_of_different_length_meet_at_equal_fractions() -> None:
    settings = EarlyExit("paper", warmup_fraction=0.25, keep_fraction=0.5)
    policy = make_policy(settings, ["long", "short"])
    assert policy.observe("long", Observation(20, 100, 1.5, 1.5)) == []
    (wait,) = policy.observe("short", Observation(2, 8, 2.0, 2.0))
    assert (wait.trial_id, wait.verdict) == ("short", Verdict.PAUSE)
    verdicts = {one.trial_id: one.verdict for one in policy.observe("long", Observation(25, 100, 1.4, 1.4))}
    assert verdicts == {"long": Verdict.KEEP, "short": Verdict.STOP}


def test_the_end_of_the_last_one_awaited_releases_the_others() -> None:
    policy = make_policy(EarlyExit("paper", keep_fraction=0.5), ["a", "b", "c"])
    policy.observe("a", Observation(1, 20, 2.0, 2.0))
    policy.observe("b", Observation(1, 20, 3.0, 3.0))
    released = policy.trial_ended("c")
    assert {one.trial_id: one.verdict for one in released} == {"a": Verdict.KEEP, "b": Verdict.STOP}
    assert policy.trial_ended("c") == []


def test_a_non_finite_trial_releases_those_who_wait_for_it() -> None:
    policy = make_policy(EarlyExit("paper"), ["a", "b"])
    policy.observe("a", Observation(1, 20, 2.0, 2.0))
    decisions = policy.observe("b", Observation(1, 20, math.nan, 2.0))
    assert [(one.trial_id, one.verdict) for one in decisions] == [("b", Verdict.STOP), ("a", Verdict.KEEP)]


def test_a_vetoed_trial_is_stopped_by_nothing_but_non_finite_numbers() -> None:
    policy = make_policy(KEEP_ALL, ["a"])
    for step, loss in enumerate([1.0, 2.0, 3.0], start=1):
        stops = policy.observe("a", Observation(step, 20, loss, loss))
    assert stops[0].rule == "divergence"
    assert policy.observe("a", Observation(4, 20, 4.0, 4.0)) == []
    assert policy.observe("a", Observation(5, 20, math.nan, 4.0))[0].rule == "non_finite"


def test_paper_without_pausing_gives_the_same_verdicts() -> None:
    curves = {name: curve([loss + 2] * 20) for name, loss in zip(names(8), [5, 3, 8, 1, 7, 2, 6, 4], strict=True)}
    assert drive(EarlyExit("paper"), curves, obey_pause=False).completed == ["trial-004", "trial-006"]


def test_more_trials_than_slots_rotate_through_warm_up() -> None:
    curves = {name: curve([loss + 2] * 20) for name, loss in zip(names(8), [5, 3, 8, 1, 7, 2, 6, 4], strict=True)}
    assert sorted(drive(EarlyExit("paper"), curves, slots=2).completed) == ["trial-004", "trial-006"]


def test_median_stops_what_is_worse_than_the_median_of_the_others() -> None:
    curves = {name: curve([float(loss)] * 20) for name, loss in zip(names(5), [1, 2, 3, 4, 5], strict=True)}
    run = drive(EarlyExit("median"), curves)
    assert run.stopped == {"trial-004": "median", "trial-005": "median"}
    tied = {name: curve([loss] * 20) for name, loss in zip(names(5), [1.0, 2.0, 2.0, 2.0, 2.0], strict=True)}
    assert drive(EarlyExit("median"), tied).stopped == {}, "what equals the median stays"
    assert drive(EarlyExit("median"), dict(list(curves.items())[:3])).stopped == {}, "three have only two others"


def test_asha_judges_against_those_that_came_before() -> None:
    curves = {name: curve([float(loss)] * 20) for name, loss in zip(names(4), [2, 1, 3, 1.5], strict=True)}
    run = drive(EarlyExit("asha"), curves)
    # trial-001 comes first to the rung at 5 % and is let through; at 20 % the better one is there too, after it.
    assert run.stopped == {"trial-003": "asha_rung", "trial-004": "asha_rung"}


def test_hyperband_leaves_one_bracket_uncut() -> None:
    assert rung_fractions(EarlyExit()) == pytest.approx([0.05, 0.2, 0.8])
    hands = deal(names(10), [5, 3, 2])
    assert [len(hand) for hand in hands] == [5, 3, 2]
    assert sorted(name for hand in hands for name in hand) == names(10)
    curves = {name: curve([float(loss)] * 20) for loss, name in enumerate(names(40))}
    run = drive(EarlyExit("hyperband"), curves)
    assert len(run.completed) > 1
    assert max(run.completed) > names(40)[20], "the uncut bracket lets bad trials finish"


def noisy(level: float, seed: int, count: int = 20, spread: float = 0.01) -> list[Observation]:
    """Return a flat curve with losses of 32 examples: shared difficulty, plus noise of its own."""
    difficulty = random.Random(0)
    own = random.Random(seed)
    hard = [difficulty.uniform(0, 2) for _ in range(32)]
    found = []
    for step in range(1, count + 1):
        examples = tuple(level + one + own.gauss(0, spread) for one in hard)
        loss = sum(examples) / 32
        found.append(Observation(step, count, loss, loss, validation_losses=examples))
    return found


def test_alto_pauses_what_is_too_close_to_call_and_stops_what_is_clear() -> None:
    levels = [1.0, 1.001, 1.5, 2.0]
    curves = {name: noisy(level, seed) for seed, (name, level) in enumerate(zip(names(4), levels, strict=True))}
    run = drive(EarlyExit("alto"), curves)
    rules = {one.trial_id: one.rule for one in run.decisions if one.rule in {"too_close", "underperformance"}}
    close = {name for name, rule in rules.items() if rule == "too_close"}
    assert close <= {"trial-001", "trial-002"}
    assert len(close) == 1
    assert run.stopped["trial-003"] == run.stopped["trial-004"] == "underperformance"
    # Both of the leading pair are flat: the leader stalls, so the paused one comes back and both finish.
    assert sorted(run.completed) == ["trial-001", "trial-002"]


def test_alto_replaces_a_leader_that_fails_and_dismisses_the_bench_when_leaders_finish() -> None:
    settings = EarlyExit("alto", keep_fraction=0.5)
    for fails in (True, False):
        policy = make_policy(settings, ["a", "b"])
        first = noisy(1.0, 1)[0]
        policy.observe("a", first)
        policy.observe("b", dataclasses.replace(noisy(1.0005, 2)[0]))
        assert policy.state_dict()["bench"]
        (benched,) = policy.state_dict()["bench"]
        leader = "b" if benched == "a" else "a"
        if fails:
            decisions = policy.observe(leader, Observation(2, 20, math.nan, 1.0))[1:]
            assert [(one.trial_id, one.rule) for one in decisions] == [(benched, "called_up")]
        else:
            policy.observe(leader, Observation(20, 20, 1.0, 1.0))
            (dismissed,) = policy.trial_ended(leader)
            assert (dismissed.trial_id, dismissed.verdict) == (benched, Verdict.STOP)


def test_alto_stops_overfitting_only_when_validation_has_really_risen() -> None:
    falling_train = [2.0 - 0.09 * index for index in range(20)]
    improving = [2.0 - 0.02 * index for index in range(20)]
    turning = improving[:10] + [improving[9] + 0.05 * index for index in range(1, 11)]
    settings = EarlyExit("alto", keep_fraction=1.0)
    assert drive(settings, {"a": curve(improving, falling_train)}).stopped == {}
    assert drive(settings, {"a": curve(turning, falling_train)}).stopped == {"a": "overfitting"}
    assert drive(KEEP_ALL, {"a": curve(improving, falling_train)}).stopped == {"a": "overfitting"}, "the paper's does"


def test_unknown_names_and_settings_are_refused_with_the_cure() -> None:
    assert check_settings(EarlyExit()) == []
    with pytest.raises(UnknownPolicyError, match="give one of alto, asha"):
        make_policy(EarlyExit("papr"), ["a"])
    for field, value in {
        "warmup_fraction": 1.5,
        "keep_fraction": 0.0,
        "window": 1,
        "patience": 0,
        "gap_threshold": math.nan,
        "slope_threshold": math.inf,
        "smoothing": 0.0,
    }.items():
        (violation,) = check_settings(dataclasses.replace(EarlyExit(), **{field: value}), "early_exit.")  # type: ignore[arg-type]
        assert violation.field == f"early_exit.{field}"


def test_every_name_that_is_shipped_has_its_class() -> None:
    for name in stopping_policies.BUILT_IN_POLICIES:
        assert make_policy(EarlyExit(name), ["a"]).name == name


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    mine = EntryPoint("mine", "alto_training.early_exit.none:NoPolicy", stopping_policies.PLUGIN_GROUP)
    monkeypatch.setattr(stopping_policies, "entry_points", lambda group: EntryPoints([mine]))
    assert "mine" in stopping_policies.policy_names()
    assert make_policy(EarlyExit("mine"), ["a"]).observe("a", Observation(1, 2, 1.0, 1.0)) == []


def test_the_state_of_another_policy_or_other_trials_is_refused() -> None:
    state = make_policy(EarlyExit("paper"), ["a"]).state_dict()
    with pytest.raises(PolicyStateError, match="policy 'paper'"):
        make_policy(EarlyExit("none"), ["a"]).load_state_dict(state)
    with pytest.raises(PolicyStateError, match="trials"):
        make_policy(EarlyExit("paper"), ["a", "b"]).load_state_dict(state)
