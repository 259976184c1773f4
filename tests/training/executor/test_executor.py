"""The loop: slots, policies, commands, memory that runs out, several tasks, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import EarlyExit, Evaluation, Objective, ObjectiveKind, TrialConfig, TuningJob
from alto_training.executor.control import Cancel, ControlQueue, ReviveTrial, StopTrial
from alto_training.executor.errors import EmptyDatasetError, OutOfMemoryError
from alto_training.executor.events import (
    Event,
    TaskProgress,
    TaskStarted,
    TickHalved,
    TrialDecided,
    TrialEvaluated,
    TrialFinished,
    TrialProgress,
    TrialStarted,
)
from alto_training.executor.executor import Executor
from alto_training.executor.lora_backend import ReferenceBackend
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.tick import Tick
from alto_training.wire import EventTranslator
from tiny_jobs import MemoryDataset, adapter_weights, assert_same_bits, job, open_memory, run

SETTINGS = ExecutorSettings(tokens_per_tick=96, backend=Backend.REFERENCE, progress_interval_s=0.0)
PAPER = EarlyExit("paper", warmup_fraction=0.3, keep_fraction=0.25)


def config(**changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "lora_rank": 4,
        "learning_rate": 2e-3,
        "batch_size": 3,
        "max_steps": 6,
        "max_length": 32,
    }
    return TrialConfig(**(values | changes))


def of(events: list[Event], kind: type[Any], trial_id: str | None = None) -> list[Any]:
    return [
        event for event in events if isinstance(event, kind) and trial_id in (None, getattr(event, "trial_id", None))
    ]


def on(condition: Callable[[Event], bool], command: Any, control: ControlQueue, events: list[Event]) -> Any:
    """Return an event sink that gives `command` once, when an event meets the condition."""
    given = False

    def sink(event: Event) -> None:
        nonlocal given
        events.append(event)
        if not given and condition(event):
            given = True
            control.put(command)

    return sink


def test_a_run_tells_its_story_in_order(tmp_path: Path) -> None:
    outcome, events = run(job(config(), config(seed=1)), tmp_path, settings=SETTINGS)
    assert isinstance(events[0], TaskStarted)
    assert (events[0].slots, events[0].trials, events[0].train_examples) == (2, 2, 23)
    for trial in outcome.trials:
        steps = of(events, TrialProgress, trial.trial_id)
        assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
        assert [event.step for event in of(events, TrialEvaluated, trial.trial_id)] == [2, 4, 6]
        assert all(earlier.tokens_trained < later.tokens_trained for earlier, later in pairwise(steps))
        assert trial.samples_trained == 18
        assert trial.samples_saved == 0
        best = min(of(events, TrialEvaluated, trial.trial_id), key=lambda event: event.validation_loss)
        assert (trial.best_step, trial.best_validation_loss) == (best.step, best.validation_loss)
    progress = of(events, TaskProgress)
    assert all(earlier.fraction_done <= later.fraction_done for earlier, later in pairwise(progress))
    assert progress[-1].fraction_done == 1.0
    assert progress[-1].seconds_remaining == 0.0
    assert outcome.best is not None
    assert outcome.best.best_validation_loss == min(trial.best_validation_loss or 9 for trial in outcome.trials)


def test_a_trial_is_told_with_the_samples_that_it_has_seen_though_its_last_batch_is_short(tmp_path: Path) -> None:
    task = job(config(batch_size=4, epochs=1.0, max_steps=None))
    outcome, events = run(task, tmp_path, settings=SETTINGS)
    translator = EventTranslator(task, "node")
    told = [message for event in events for message in translator.translate(event)]
    measured = [one.trial_measured for one in told if one.HasField("trial_measured")]
    counts = {one.metric.step: one.samples_trained for one in measured}
    assert counts == {1: 4, 2: 8, 3: 12, 4: 16, 5: 20, 6: 23}
    assert outcome.trials[0].samples_trained == 23


def test_training_learns(tmp_path: Path) -> None:
    _, events = run(job(config(learning_rate=1e-2, epochs=8.0, max_steps=None, batch_size=8)), tmp_path)
    losses = [event.train_loss for event in of(events, TrialProgress)]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_more_trials_than_slots_rotate_through_warm_up_and_a_freed_slot_is_filled_before_the_next_tick(
    tmp_path: Path,
) -> None:
    trials = [config(seed=seed, max_steps=10) for seed in range(8)]
    task = job(*trials, early_exit=PAPER, evaluation=Evaluation(count=10))
    outcome, events = run(task, tmp_path, settings=replace(SETTINGS, slots=3))
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert sorted(trial.state for trial in ended.values()) == ["stopped"] * 6 + ["succeeded"] * 2
    stopped = [trial for trial in ended.values() if trial.state == "stopped"]
    assert all(trial.step == 3 and trial.samples_saved == 21 for trial in stopped)
    assert all(trial.adapter_path for trial in stopped), "a stopped trial keeps its best adapter"
    paused = next(place for place, event in enumerate(events) if isinstance(event, TrialDecided))
    after = [event for event in events[paused:] if isinstance(event, TrialStarted | TrialProgress)]
    assert isinstance(after[0], TrialStarted), "a freed slot is filled before the next tick"
    assert after[0].trial_id == "trial-3"
    survivors = {trial.trial_id for trial in ended.values() if trial.state == "succeeded"}
    first = {event.trial_id: event.validation_loss for event in of(events, TrialEvaluated) if event.step == 3}
    assert survivors == set(sorted(first, key=lambda trial_id: first[trial_id])[:2])
    assert all(event.reason and event.rule for event in of(events, TrialDecided))


def test_a_parked_trial_carries_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    # Trial 0 is parked at the end of warm-up until the others have come as far; alone it never is.
    trials = [config(seed=seed, max_steps=10, learning_rate=rate) for seed, rate in enumerate((5e-3, 1e-5, 2e-5, 3e-5))]
    task = job(*trials, early_exit=PAPER, evaluation=Evaluation(count=10))
    outcome, events = run(task, tmp_path / "parked", settings=replace(SETTINGS, slots=1))
    assert [event.step for event in of(events, TrialStarted, "trial-0")] == [0, 3]
    kept = {trial.trial_id: trial for trial in outcome.trials}["trial-0"]
    alone, _ = run(job(trials[0], evaluation=Evaluation(count=10)), tmp_path / "alone", settings=SETTINGS)
    assert kept.state == "succeeded"
    assert kept.best_validation_loss == alone.trials[0].best_validation_loss


def test_a_user_stops_one_trial(tmp_path: Path) -> None:
    control, events = ControlQueue(), list[Event]()
    sink = on(lambda event: isinstance(event, TrialEvaluated), StopTrial("trial-1"), control, events)
    outcome, _ = run(job(config(), config(seed=1)), tmp_path, settings=SETTINGS, control=control, events=sink)
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert (ended["trial-1"].state, ended["trial-0"].state) == ("cancelled", "succeeded")
    assert ended["trial-1"].step < 6


def test_cancelling_ends_every_trial_and_keeps_what_is_best_so_far(tmp_path: Path) -> None:
    control, events = ControlQueue(), list[Event]()
    sink = on(lambda event: isinstance(event, TrialEvaluated), Cancel("enough"), control, events)
    task = job(config(), config(seed=1), config(seed=2))
    outcome, _ = run(task, tmp_path, settings=replace(SETTINGS, slots=2), control=control, events=sink)
    assert outcome.state == "cancelled"
    assert {trial.state for trial in outcome.trials} == {"cancelled"}
    assert len(outcome.trials) == 3
    assert outcome.best is not None
    assert adapter_weights(outcome.best.adapter_path)


def test_a_cancelled_task_is_as_far_as_it_was_and_no_policy_judges_its_trials(tmp_path: Path) -> None:
    # The first is slower to warm up: the others are parked, and would be judged if it alone ended.
    trials = [config(max_steps=20), *[config(seed=seed, max_steps=10) for seed in (1, 2, 3)]]
    task = job(*trials, early_exit=PAPER, evaluation=Evaluation(count=10))
    control, events = ControlQueue(), list[Event]()
    stop = on(lambda event: isinstance(event, TrialProgress), StopTrial("trial-3"), control, events)

    def sink(event: Event) -> None:
        stop(event)
        if isinstance(event, TrialProgress) and (event.trial_id, event.step) == ("trial-0", 5):
            control.put(Cancel())

    outcome, _ = run(task, tmp_path, settings=SETTINGS, control=control, events=sink)
    assert outcome.state == "cancelled"
    assert {trial.state for trial in outcome.trials} == {"cancelled"}
    before, last = of(events, TaskProgress)[-2:]
    assert last.measured.share_trained < before.fraction_done == last.fraction_done < 1
    assert before.seconds_remaining > 0 == last.seconds_remaining


def test_a_stopped_trial_is_revived_with_its_state_and_judged_no_more(tmp_path: Path) -> None:
    trials = [config(seed=seed, max_steps=10, learning_rate=rate) for seed, rate in enumerate((5e-3, 1e-5, 2e-5, 3e-5))]
    task = job(*trials, early_exit=PAPER, evaluation=Evaluation(count=10))
    control, events = ControlQueue(), list[Event]()

    def stopped(event: Event) -> bool:
        return isinstance(event, TrialFinished) and event.trial_id == "trial-1"

    sink = on(stopped, ReviveTrial("trial-1"), control, events)
    outcome, _ = run(task, tmp_path / "revived", settings=SETTINGS, control=control, events=sink)
    revived = {trial.trial_id: trial for trial in outcome.trials}["trial-1"]
    assert [event.state for event in of(events, TrialFinished, "trial-1")] == ["stopped", "succeeded"]
    assert (revived.step, revived.samples_saved) == (10, 0)
    assert "revive" in [event.verdict for event in of(events, TrialDecided, "trial-1")]
    # Each step is taken once: its state was kept.
    assert [event.step for event in of(events, TrialProgress, "trial-1")] == list(range(1, 11))


def test_reviving_a_trial_that_is_not_finite_tries_again_and_ends_again(tmp_path: Path) -> None:
    control, events = ControlQueue(), list[Event]()

    def ended(event: Event) -> bool:
        return isinstance(event, TrialFinished) and event.trial_id == "trial-1"

    sink = on(ended, ReviveTrial("trial-1"), control, events)
    task = job(config(), config(learning_rate=1e30, seed=1))
    outcome, _ = run(task, tmp_path, settings=SETTINGS, control=control, events=sink)
    assert [event.state for event in of(events, TrialFinished, "trial-1")] == ["stopped", "stopped"]
    assert {trial.trial_id: trial.samples_trained for trial in outcome.trials}["trial-1"] == 6


@pytest.fixture
def scarce_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let passes with more than so many tokens run out of memory when half of the gradients have been added."""

    def limit(tokens: int) -> None:
        forward, backward = ReferenceBackend.forward, ReferenceBackend.backward

        def scarce_forward(self: Any, x: Any, layers: Any, tick: Tick) -> Any:
            if tick.tokens > tokens and not tick.training:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return forward(self, x, layers, tick)

        def scarce_backward(self: Any, dys: Any, x: Any, kept: Any, layers: Any, tick: Tick, needs_dx: bool) -> Any:
            if tick.tokens > tokens and any(layer.index == 6 for layer in layers):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return backward(self, dys, x, kept, layers, tick, needs_dx)

        monkeypatch.setattr(ReferenceBackend, "forward", scarce_forward)
        monkeypatch.setattr(ReferenceBackend, "backward", scarce_backward)

    return limit


def test_memory_that_runs_out_halves_the_tick_and_loses_nothing(
    tmp_path: Path, scarce_memory: Callable[[int], None]
) -> None:
    task = job(config(gradient_accumulation_steps=2), config(lora_rank=2, seed=1, lora_dropout=0.2))
    expected, _ = run(task, tmp_path / "plenty", settings=replace(SETTINGS, tokens_per_tick=24))
    scarce_memory(40)
    wide = replace(SETTINGS, tokens_per_tick=96, evaluation_tokens_per_tick=200)
    outcome, events = run(task, tmp_path / "scarce", settings=wide)
    assert of(events, TickHalved)
    ended = {trial.trial_id: trial for trial in outcome.trials}
    for trial in expected.trials:
        other = ended[trial.trial_id]
        assert other.samples_trained == trial.samples_trained
        assert other.best_validation_loss == pytest.approx(trial.best_validation_loss, rel=1e-5)


def test_memory_that_cannot_hold_one_sequence_is_an_error_with_a_cure(
    tmp_path: Path, scarce_memory: Callable[[int], None]
) -> None:
    scarce_memory(1)
    with pytest.raises(OutOfMemoryError, match="use recomputation"):
        run(job(config()), tmp_path, settings=SETTINGS)


def test_two_tasks_with_other_data_and_objectives_share_one_executor(tmp_path: Path, backbone: Any) -> None:
    first = job(config(), config(seed=1), task_id="first")
    second = job(config(lora_rank=2), task_id="second", objective=Objective(ObjectiveKind.DPO))

    def open_data(job: TuningJob, cache_dir: Path) -> tuple[MemoryDataset, MemoryDataset]:
        return open_memory(job, cache_dir) if job.task_id == "first" else (MemoryDataset(9, 5), MemoryDataset(3, 6))

    events: list[Event] = []
    executor = Executor(
        first,
        tmp_path / "both",
        events.append,
        SETTINGS,
        companions=[second],
        backbone=backbone,
        open_data=open_data,
    )
    outcomes = executor.run_all()
    assert [outcome.task_id for outcome in outcomes] == ["first", "second"]
    assert [len(outcome.trials) for outcome in outcomes] == [2, 1]
    for task, together in zip((first, second), outcomes, strict=True):
        apart, _ = run(task, tmp_path / task.task_id, settings=SETTINGS, open_data=open_data)
        for trial, other in zip(apart.trials, together.trials, strict=True):
            assert other.best_validation_loss == pytest.approx(trial.best_validation_loss, rel=1e-5)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    def open_empty(job: TuningJob, cache_dir: Path) -> tuple[MemoryDataset, MemoryDataset]:
        return MemoryDataset(5), MemoryDataset(0)

    with pytest.raises(EmptyDatasetError, match="validation has no rows"):
        run(job(config()), tmp_path, open_data=open_empty)


def test_a_trial_that_cannot_be_trained_fails_by_name_and_no_other(tmp_path: Path) -> None:
    outcome, _ = run(job(config(), config(target_modules=("nonsense",)), config(max_length=999)), tmp_path)
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert ended["trial-0"].state == "succeeded"
    assert (ended["trial-1"].state, ended["trial-2"].state) == ("failed", "failed")
    assert "nonsense" in ended["trial-1"].reason
    assert "at most 64" in ended["trial-2"].reason
    assert outcome.best_trial_id == "trial-0"


def test_slots_do_not_change_what_becomes_of_a_trial(tmp_path: Path) -> None:
    task = job(*[config(seed=seed, lora_rank=seed + 1) for seed in range(4)])
    together, _ = run(task, tmp_path / "together", settings=SETTINGS)
    in_turn, _ = run(task, tmp_path / "in-turn", settings=replace(SETTINGS, slots=1))
    expected = {trial.trial_id: trial for trial in together.trials}
    for trial in in_turn.trials:
        assert trial.best_validation_loss == pytest.approx(expected[trial.trial_id].best_validation_loss, rel=1e-5)


def test_a_repetition_gives_the_same_bits(tmp_path: Path) -> None:
    task = job(config(lora_dropout=0.3), config(seed=1, gradient_accumulation_steps=3))
    first, _ = run(task, tmp_path / "first", settings=SETTINGS)
    second, _ = run(task, tmp_path / "second", settings=SETTINGS)
    assert_same_bits(first, second)


def test_what_evaluation_costs_is_counted_apart(tmp_path: Path) -> None:
    task = job(config(), config(seed=1, max_length=16))
    _, events = run(task, tmp_path, settings=SETTINGS)
    last = of(events, TaskProgress)[-1]
    assert last.measured is not None
    validation = open_memory(task, tmp_path)[1]
    # Three evaluations of each trial, and one of the base model, over all validation rows at one length.
    tokens = sum(len(validation.example(row, 32).input_ids) for row in range(len(validation)))
    assert last.measured.evaluation_tokens == (2 * 3 + 1) * tokens
    assert last.evaluation_seconds > 0
    assert last.training_seconds > 0


def test_the_state_of_the_last_stopped_trials_is_kept_and_that_of_earlier_ones_let_go(tmp_path: Path) -> None:
    trials = [config(seed=seed, max_steps=10) for seed in range(8)]
    task = job(*trials, early_exit=PAPER, evaluation=Evaluation(count=10))
    control, events = ControlQueue(), list[Event]()
    stopped: list[str] = []

    def sink(event: Event) -> None:
        events.append(event)
        if isinstance(event, TrialFinished) and event.state == "stopped":
            stopped.append(event.trial_id)
            if len(stopped) == 6:
                control.put(ReviveTrial(stopped[0]))  # the first of six: let go
                control.put(ReviveTrial(stopped[-1]))  # the last: kept

    settings = replace(SETTINGS, revivable_trials=2)
    outcome, _ = run(task, tmp_path, settings=settings, control=control, events=sink)
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert ended[stopped[0]].state == "stopped"
    assert ended[stopped[-1]].state == "succeeded"
    assert all(trial.adapter_path for trial in outcome.trials), "adapters stay, whatever becomes of the state"
