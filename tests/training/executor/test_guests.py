"""Tasks that join a running executor and leave it: each ends as it would have alone, and harms nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import EarlyExit, Objective, ObjectiveKind, TrialConfig, TuningJob
from alto_training.executor.backbone import Backbone
from alto_training.executor.control import Cancel, Command, ControlQueue, Join, Pause
from alto_training.executor.errors import EmptyDatasetError
from alto_training.executor.events import (
    Event,
    Outcome,
    TaskLeft,
    TaskProgress,
    TaskStarted,
    TickHalved,
    TrialFinished,
    TrialProgress,
)
from alto_training.executor.executor import Executor
from alto_training.executor.lora_backend import ReferenceBackend
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.tick import Tick
from tiny_jobs import MemoryDataset, adapter_weights, job, open_memory, run, tiny_backbone

SETTINGS = ExecutorSettings(tokens_per_tick=96, backend=Backend.REFERENCE, progress_interval_s=0.0)


def config(**changes: Any) -> TrialConfig:
    values: dict[str, Any] = {"lora_rank": 4, "batch_size": 3, "max_length": 32, "max_steps": 12}
    return TrialConfig(**(values | changes))


def host(steps: int = 16) -> TuningJob:
    return job(config(max_steps=steps), config(max_steps=steps, lora_rank=2, seed=1, lora_dropout=0.2), task_id="host")


def guest(**changes: Any) -> TuningJob:
    return job(config(seed=3), config(seed=4, learning_rate=1e-3, lora_dropout=0.1), task_id="guest", **changes)


class Shared:
    """An executor of `host`, with commands that are given when the host has trained so many ticks."""

    def __init__(
        self,
        folder: Path,
        commands: dict[int, list[Command]],
        task: TuningJob | None = None,
        open_data: Callable[[TuningJob, Path], Any] = open_memory,
        settings: ExecutorSettings = SETTINGS,
        backbone: Backbone | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.control = ControlQueue()
        self._commands = commands
        self._executor = Executor(
            task or host(),
            folder,
            self._take,
            settings,
            self.control,
            backbone=backbone or tiny_backbone(),
            open_data=open_data,
        )

    def run(self) -> Outcome:
        return self._executor.run()

    def left(self, task_id: str) -> TaskLeft:
        return next(event for event in self.events if isinstance(event, TaskLeft) and event.task_id == task_id)

    def of(self, task_id: str, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and event.task_id == task_id]

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, TaskProgress) and event.task_id == "host":
            for command in self._commands.pop(event.tick, []):
                self.control.put(command)


def assert_as_alone(alone: Outcome, shared: Outcome, rel: float = 1e-5) -> None:
    assert shared.state == alone.state
    assert shared.best_trial_id == alone.best_trial_id
    ended = {trial.trial_id: trial for trial in shared.trials}
    for trial in alone.trials:
        other = ended[trial.trial_id]
        assert (other.state, other.step, other.best_step) == (trial.state, trial.step, trial.best_step)
        weights, expected = adapter_weights(other.adapter_path), adapter_weights(trial.adapter_path)
        for name, value in expected.items():
            distance = torch.linalg.vector_norm(weights[name] - value) / torch.linalg.vector_norm(value)
            assert distance <= rel, (trial.trial_id, name, float(distance))


@pytest.mark.parametrize("objective", [ObjectiveKind.SFT, ObjectiveKind.DPO])
def test_a_guest_and_its_host_end_with_the_weights_they_have_alone(tmp_path: Path, objective: ObjectiveKind) -> None:
    task = guest(objective=Objective(objective))
    shared = Shared(tmp_path / "host", {5: [Join(task, tmp_path / "guest")]})
    outcome = shared.run()
    assert_as_alone(run(host(), tmp_path / "host-alone", settings=SETTINGS)[0], outcome)
    left = shared.left("guest")
    assert left.outcome is not None
    assert_as_alone(run(task, tmp_path / "guest-alone", settings=SETTINGS)[0], left.outcome)
    # It began while the host trained, and what it tells of its work is from then on.
    joined = shared.events.index(shared.of("guest", TaskStarted)[0])
    assert 0 < joined < shared.events.index(shared.of("host", TrialFinished)[0])
    last = shared.of("guest", TaskProgress)[-1]
    assert 0 < last.measured.ticks == last.tick < shared.of("host", TaskProgress)[-1].tick + 12
    assert (tmp_path / "guest" / "checkpoints").is_dir()
    assert not (tmp_path / "host" / "tasks").exists()


def test_a_guest_goes_on_when_its_host_has_ended(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "host", {2: [Join(guest(), tmp_path / "guest")]}, task=host(steps=4))
    shared.run()
    left = [event.task_id for event in shared.events if isinstance(event, TaskLeft)]
    assert left == ["host", "guest"]
    outcome = shared.left("guest").outcome
    assert outcome is not None
    assert_as_alone(run(guest(), tmp_path / "alone", settings=SETTINGS)[0], outcome)


def test_a_guest_that_leaves_carries_on_alone_and_joins_again(tmp_path: Path) -> None:
    folder = tmp_path / "guest"
    shared = Shared(tmp_path / "host", {3: [Join(guest(), folder)], 6: [Pause("guest")]})
    outcome = shared.run()
    assert_as_alone(run(host(), tmp_path / "host-alone", settings=SETTINGS)[0], outcome)
    left = shared.left("guest").outcome
    assert left is not None
    assert left.state == "paused"
    control = ControlQueue()
    control.put(Pause())
    alone, events = run(guest(), folder, settings=SETTINGS, control=control)
    assert alone.state == "paused"
    assert isinstance(events[0], TaskStarted)
    assert events[0].resumed_from_tick
    again = Shared(tmp_path / "other-host", {7: [Join(guest(), folder)]}, task=host(steps=9))
    again.run()
    ended = again.left("guest").outcome
    assert ended is not None
    assert again.of("guest", TaskStarted)[0].resumed_from_tick == events[0].resumed_from_tick
    assert_as_alone(run(guest(), tmp_path / "alone", settings=SETTINGS)[0], ended)


def test_cancelling_one_task_leaves_the_other_alone(tmp_path: Path) -> None:
    expected, _ = run(host(), tmp_path / "host-alone", settings=SETTINGS)
    shared = Shared(tmp_path / "a", {3: [Join(guest(), tmp_path / "guest")], 8: [Cancel(task_id="guest")]})
    assert_as_alone(expected, shared.run())
    left = shared.left("guest").outcome
    assert left is not None
    assert left.state == "cancelled"
    assert all(trial.step < 12 for trial in left.trials)
    shared = Shared(tmp_path / "b", {3: [Join(guest(), tmp_path / "guest-b")], 8: [Cancel(task_id="host")]})
    assert shared.run().state == "cancelled"
    left = shared.left("guest").outcome
    assert left is not None
    assert_as_alone(run(guest(), tmp_path / "alone", settings=SETTINGS)[0], left)


def test_a_guest_that_diverges_changes_nothing_for_its_host(tmp_path: Path) -> None:
    wild = job(config(max_steps=8, learning_rate=1e30), task_id="guest")
    shared = Shared(tmp_path / "host", {3: [Join(wild, tmp_path / "guest")]})
    outcome = shared.run()
    left = shared.left("guest").outcome
    assert left is not None
    assert left.trials[0].state == "stopped"
    assert "not finite" in left.trials[0].reason or "nan" in left.trials[0].reason
    assert_as_alone(run(host(), tmp_path / "alone", settings=SETTINGS)[0], outcome)


def test_a_guest_that_cannot_be_trained_costs_its_host_nothing(tmp_path: Path) -> None:
    def open_data(task: TuningJob, cache_dir: Path) -> tuple[MemoryDataset, MemoryDataset]:
        if task.task_id == "broken":
            raise OSError("the disk is gone")
        return MemoryDataset(5), MemoryDataset(0) if task.task_id == "empty" else MemoryDataset(6, seed=2)

    joins: list[Command] = [
        Join(replace(guest(), task_id=name), tmp_path / name) for name in ("empty", "broken", "guest")
    ]
    shared = Shared(tmp_path / "host", {3: joins}, open_data=open_data)
    assert shared.run().state == "succeeded"
    empty, broken = shared.left("empty"), shared.left("broken")
    assert (empty.outcome, empty.is_own_trouble) == (None, True)
    assert "validation has no rows" in empty.trouble
    assert (broken.outcome, broken.is_own_trouble) == (None, False)
    left = shared.left("guest").outcome
    assert left is not None
    assert left.state == "succeeded"
    with pytest.raises(EmptyDatasetError):
        run(guest(), tmp_path / "alone", open_data=lambda task, cache: (MemoryDataset(5), MemoryDataset(0)))


def test_stopping_rules_see_the_tasks_own_trials_alone(tmp_path: Path) -> None:
    exits = EarlyExit("paper", warmup_fraction=0.25, keep_fraction=0.5)
    task = guest(early_exit=exits)
    shared = Shared(tmp_path / "host", {3: [Join(task, tmp_path / "guest")]})
    shared.run()
    left = shared.left("guest").outcome
    assert left is not None
    assert_as_alone(run(task, tmp_path / "alone", settings=SETTINGS)[0], left)
    assert sorted(trial.state for trial in left.trials) == ["stopped", "succeeded"]


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_where_memory_does_not_do_for_both_the_host_goes_on_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Memory runs out with a single item on the tick, but only while there is a guest."""
    expected, _ = run(host(), tmp_path / "host-alone", settings=SETTINGS)
    forward = ReferenceBackend.forward
    shared = Shared(tmp_path / "host", {4: [Join(guest(), tmp_path / "guest")]})

    def scarce_forward(self: Any, x: Any, layers: Any, tick: Tick) -> Any:
        started = shared.of("guest", TrialProgress)
        left = any(isinstance(event, TaskLeft) for event in shared.events)
        if started and not left and tick.training == (what == "train"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, layers, tick)

    monkeypatch.setattr(ReferenceBackend, "forward", scarce_forward)
    outcome = shared.run()
    left = shared.left("guest")
    assert left.outcome is not None
    assert left.outcome.state == "paused"
    assert not left.is_own_trouble
    assert "single item" in left.trouble
    assert shared.of("host", TickHalved) if what == "train" else True
    assert_as_alone(expected, outcome)
    monkeypatch.setattr(ReferenceBackend, "forward", forward)
    assert_as_alone(
        run(guest(), tmp_path / "guest-alone", settings=SETTINGS)[0],
        run(guest(), tmp_path / "guest", settings=SETTINGS)[0],
    )


def test_slots_grow_for_a_guest_as_far_as_memory_allows(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "host", {3: [Join(guest(), tmp_path / "guest")]})
    shared.run()
    assert shared.of("host", TaskStarted)[0].slots == 2
    assert shared.of("guest", TaskStarted)[0].slots == 4
    limited = Shared(
        tmp_path / "limited",
        {3: [Join(guest(), tmp_path / "limited-guest")]},
        settings=replace(SETTINGS, slots=2),
    )
    limited.run()
    assert limited.of("guest", TaskStarted)[0].slots == 2
    left = limited.left("guest").outcome
    assert left is not None
    assert left.state == "succeeded"
