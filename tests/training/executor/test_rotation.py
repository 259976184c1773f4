"""More trials than slots: all warm up before any goes on, under every policy, and become what they become alone."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alto.v1.tuning_pb2 import TRIAL_STATE_PAUSED
from alto_common.tuning import EarlyExit, Evaluation, TrialConfig, TuningJob
from alto_training.executor.control import ControlQueue, Pause
from alto_training.executor.events import (
    Event,
    TrialDecided,
    TrialEvaluated,
    TrialFinished,
    TrialPaused,
    TrialProgress,
    TrialStarted,
    TrialState,
    Verdict,
)
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.trial_run import TrialRun
from alto_training.wire import EventTranslator
from tiny_jobs import assert_same_bits, job, run

POLICIES = ["paper", "alto", "median", "asha", "hyperband"]
STEPS, BOUNDARY = 8, 2
SETTINGS = ExecutorSettings(tokens_per_tick=96, backend=Backend.REFERENCE)


def rotating(policy: str, trials: int = 7, keep: float = 0.5, **changes: Any) -> TuningJob:
    rates = [2e-3 * 1.7**number for number in range(trials)]
    configs = [
        TrialConfig(lora_rank=4, learning_rate=rate, batch_size=2, max_steps=STEPS, max_length=24, seed=seed)
        for seed, rate in enumerate(rates)
    ]
    # No trajectory rule is to end a trial before its warm-up is over.
    early_exit = EarlyExit(policy, BOUNDARY / STEPS, keep, gap_threshold=1e9, slope_threshold=1e9)
    return job(*configs, early_exit=early_exit, evaluation=Evaluation(count=STEPS // 2), **changes)


def first_beyond_warm_up(events: list[Event]) -> int:
    return next(
        (place for place, one in enumerate(events) if isinstance(one, TrialProgress) and one.step > BOUNDARY),
        len(events),
    )


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_trial_warms_up_before_any_goes_on(tmp_path: Path, policy: str, slots: int) -> None:
    outcome, events = run(rotating(policy), tmp_path, settings=replace(SETTINGS, slots=slots))
    assert len(outcome.trials) == 7
    assert {trial.state for trial in outcome.trials} <= {TrialState.SUCCEEDED, TrialState.STOPPED}
    assert any(trial.state is TrialState.SUCCEEDED for trial in outcome.trials)
    begun = [place for place, one in enumerate(events) if isinstance(one, TrialStarted) and one.step == 0]
    assert len(begun) == 7
    assert max(begun) < first_beyond_warm_up(events), "a trial went on while another waited to warm up"
    # In the order of the search: nobody is passed over.
    assert [events[place].trial_id for place in begun] == [f"trial-{number}" for number in range(7)]  # type: ignore[union-attr]
    measured = {one.trial_id for one in events if isinstance(one, TrialEvaluated) and one.step == BOUNDARY}
    assert len(measured) == 7


@pytest.mark.parametrize("policy", ["median", "asha"])
def test_those_who_gave_up_their_slots_come_back_in_the_order_in_which_they_left(tmp_path: Path, policy: str) -> None:
    _, events = run(rotating(policy, keep=1.0), tmp_path, settings=replace(SETTINGS, slots=2))
    left = [one.trial_id for one in events if isinstance(one, TrialDecided) and one.rule == "rotation"]
    assert left
    assert all(
        one.verdict is Verdict.PAUSE and one.step == BOUNDARY and one.reason
        for one in events
        if isinstance(one, TrialDecided) and one.rule == "rotation"
    )
    back = [one.trial_id for one in events if isinstance(one, TrialStarted) and one.step == BOUNDARY]
    ended_before = [trial_id for trial_id in left if trial_id not in back]
    assert [trial_id for trial_id in left if trial_id not in ended_before] == back


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_that_rotated_becomes_what_it_becomes_alone(tmp_path: Path, policy: str) -> None:
    task = rotating(policy, trials=5)
    outcome, _ = run(task, tmp_path / "rotating", settings=replace(SETTINGS, slots=2))
    alone, _ = run(replace(task, early_exit=EarlyExit("none")), tmp_path / "alone", settings=replace(SETTINGS, slots=1))
    expected = {trial.trial_id: trial for trial in alone.trials}
    finished = [trial for trial in outcome.trials if trial.state is TrialState.SUCCEEDED]
    assert finished
    for trial in finished:
        other = expected[trial.trial_id]
        assert trial.best_step == other.best_step
        assert trial.best_validation_loss == pytest.approx(other.best_validation_loss, rel=1e-5)


def test_without_a_policy_nobody_gives_up_a_slot(tmp_path: Path) -> None:
    _, events = run(rotating("none"), tmp_path, settings=replace(SETTINGS, slots=2))
    assert not [one for one in events if isinstance(one, TrialDecided)]
    assert len([one for one in events if isinstance(one, TrialStarted)]) == 7


def test_a_run_paused_in_the_middle_of_the_rotation_ends_with_the_same_bits(tmp_path: Path) -> None:
    task, settings = rotating("median"), replace(SETTINGS, slots=2)
    whole, _ = run(task, tmp_path / "whole", settings=settings)
    for stop_at in range(1, 6):
        control, seen = ControlQueue(), 0

        def pause(event: Event, stop_at: int = stop_at, control: ControlQueue = control) -> None:
            nonlocal seen
            seen += isinstance(event, TrialDecided) and event.rule == "rotation"
            if seen == stop_at and isinstance(event, TrialDecided) and event.rule == "rotation":
                control.put(Pause())

        folder = tmp_path / f"paused-{stop_at}"
        first, _ = run(task, folder, settings=settings, events=pause, control=control)
        assert first.state == "paused"
        second, _ = run(task, folder, settings=settings)
        assert_same_bits(whole, second)


@pytest.mark.parametrize("policy", ["paper", "median"])
def test_trials_that_had_no_slot_at_a_pause_are_told_as_paused_when_the_task_goes_on(
    tmp_path: Path, policy: str
) -> None:
    task, settings = rotating(policy), replace(SETTINGS, slots=2)
    control, first = ControlQueue(), list[Event]()

    def pause(event: Event) -> None:
        first.append(event)
        if sum(isinstance(one, TrialPaused) for one in first) == 3:
            control.put(Pause())

    run(task, tmp_path, settings=settings, events=pause, control=control)
    _, second = run(task, tmp_path, settings=settings)
    moves = {one.trial_id: one for one in first if isinstance(one, TrialStarted | TrialPaused)}
    paused = {trial_id for trial_id, one in moves.items() if isinstance(one, TrialPaused)}
    goes_on = next(place for place, one in enumerate(second) if isinstance(one, TrialProgress))
    told = [one for one in second[:goes_on] if isinstance(one, TrialPaused)]
    assert len(told) >= 3
    assert {one.trial_id for one in told} == paused
    assert {(one.step, one.samples_trained) for one in told} == {(BOUNDARY, 2 * BOUNDARY)}
    (message,) = EventTranslator(task, "node").translate(told[0])
    assert message.trial_state_changed.state == TRIAL_STATE_PAUSED


def test_a_trial_that_is_not_finite_in_its_warm_up_keeps_nobody_waiting(tmp_path: Path) -> None:
    task = rotating("paper")
    poisoned = replace(task.trials[1], config=replace(task.trials[1].config, learning_rate=1e30))
    task = replace(task, trials=(task.trials[0], poisoned, *task.trials[2:]))
    outcome, _ = run(task, tmp_path, settings=replace(SETTINGS, slots=2))
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert len(ended) == 7
    assert ended["trial-1"].state is TrialState.STOPPED
    kept = [trial for trial in outcome.trials if trial.state is TrialState.SUCCEEDED]
    assert len(kept) == math.ceil(0.5 * 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_that_has_finished_gives_up_no_slot(tmp_path: Path, policy: str) -> None:
    # Evaluated at its end alone: warm and finished are one moment.
    task = replace(rotating(policy), evaluation=Evaluation(count=1))
    outcome, events = run(task, tmp_path, settings=replace(SETTINGS, slots=2))
    assert len(outcome.trials) == 7
    assert not [one for one in events if isinstance(one, TrialDecided) and one.rule == "rotation"]


def test_an_ended_trial_that_nobody_may_revive_is_let_go_of(tmp_path: Path) -> None:
    alive: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, TrialFinished):
            gc.collect()
            alive.append(sum(type(one) is TrialRun for one in gc.get_objects()))

    run(rotating("none", trials=4), tmp_path, settings=replace(SETTINGS, slots=1, revivable_trials=0), events=count)
    assert len(alive) == 4
    assert alive[0] - alive[-1] >= 2
