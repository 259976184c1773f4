"""What is done before its time, and what is left lying in buffers, changes nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import EarlyExit, Evaluation, TrialConfig
from alto_kernels import AdapterStep, AdapterTable
from alto_training.executor import fitting_passes, kernel_backend, passes
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.control import Command, ControlQueue, Join, Pause, ReviveTrial, StopTrial
from alto_training.executor.events import (
    Event,
    Outcome,
    TaskProgress,
    TickHalved,
    TrialDecided,
    TrialEvaluated,
    TrialFinished,
    TrialProgress,
)
from alto_training.executor.fitting_passes import FittingPasses
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.optimizer import take_steps
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.tick import Share, Tick
from tiny_jobs import assert_same_bits, job, run, tiny_backbone

CONFIG = TrialConfig(lora_rank=8, learning_rate=2e-3, batch_size=3, max_steps=7, max_length=32)
# Batches over several ticks, dropout, one that becomes NaN, one that ends early, several targets.
MIX = (
    replace(CONFIG, gradient_accumulation_steps=3, max_steps=4),
    replace(CONFIG, lora_rank=16, lora_dropout=0.2, seed=1),
    replace(CONFIG, target_modules=("q_proj", "down_proj"), max_steps=2),
    replace(CONFIG, learning_rate=1e30, seed=5),
    replace(CONFIG, batch_size=1, seed=6),
)
TASKS = {
    "all in slots": (job(*MIX), {}),
    "in turn": (job(*MIX, early_exit=EarlyExit("paper", warmup_fraction=0.3, keep_fraction=0.5)), {"slots": 2}),
}


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("name", TASKS)
def test_a_tick_laid_out_ahead_is_the_one_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backend: Backend
) -> None:
    task, changes = TASKS[name]
    settings = ExecutorSettings(tokens_per_tick=96, backend=backend, **changes)
    laid_out: list[Tick | None] = []
    ran: list[Tick | None] = []

    def lay_out(backbone: Backbone, shares: Sequence[Share], original: Any = passes.lay_out) -> Tick | None:
        laid_out.append(original(backbone, shares))
        return laid_out[-1]

    def train_tick(backbone: Backbone, tick: Tick | None, original: Any = passes.train_tick) -> Any:
        ran.append(tick)
        return original(backbone, tick)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "lay_out", lay_out)
        patch.setattr(passes, "train_tick", train_tick)
        ahead, events_ahead = run(task, tmp_path / "ahead", settings=settings)
    # Most ticks were foreseen; the others were laid out once more.
    assert len(ran) <= len(laid_out) < 1.8 * len(ran)
    monkeypatch.setattr(FittingPasses, "_lay_out_ahead", lambda *_: None)
    in_time, events_in_time = run(task, tmp_path / "in-time", settings=settings)
    assert_same_bits(ahead, in_time, but="trial-3")
    # Progress is told by the clock.
    kinds, kinds_in_time = (
        [type(event) for event in events if not isinstance(event, TaskProgress)]
        for events in (events_ahead, events_in_time)
    )
    assert kinds == kinds_in_time


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("tokens_per_tick", [96, 300])
def test_a_pass_begun_before_the_last_one_is_heard_of_is_the_one_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_per_tick: int, backend: Backend
) -> None:
    # Of 96 tokens a tick, gradients add up over several; of 300 they begin anew in each.
    longer = replace(CONFIG, max_steps=12)
    nan, ends_early = replace(longer, learning_rate=1e30, seed=5), replace(longer, max_steps=5, seed=6)
    small = replace(longer, lora_rank=16, lora_dropout=0.2, batch_size=1, seed=1)
    trials = (replace(longer, batch_size=12 if tokens_per_tick == 96 else 3), small, ends_early, nan)
    task = job(*trials, evaluation=Evaluation(count=2))
    settings = ExecutorSettings(tokens_per_tick=tokens_per_tick, backend=backend, checkpoint_every_ticks=2)
    calls = Counter[str]()
    where = "in time"

    def train_tick(backbone: Backbone, tick: Tick | None, original: object = passes.train_tick) -> torch.Tensor:
        calls[where] += 1
        return original(backbone, tick)  # type: ignore[operator, no-any-return]

    def lay_out_ahead(self: FittingPasses, *arguments: object, original: object = FittingPasses._lay_out_ahead) -> None:
        nonlocal where
        where = "ahead"
        original(self, *arguments)  # type: ignore[operator]
        where = "in time"

    def search(folder: Path) -> tuple[Outcome, list[Event]]:
        """Run the search; its user stops trial-1 in the middle of other trials' batches."""
        control, events = ControlQueue(), list[Event]()

        def listen(event: Event) -> None:
            events.append(event)
            if isinstance(event, TrialProgress) and (event.trial_id, event.step) == ("trial-1", 7):
                control.put(StopTrial("trial-1"))

        outcome, _ = run(task, folder, settings=settings, control=control, events=listen)
        return outcome, events

    monkeypatch.setattr(passes, "train_tick", train_tick)
    monkeypatch.setattr(FittingPasses, "_lay_out_ahead", lay_out_ahead)
    plain, plain_events = search(tmp_path / "plain")
    (ticks,) = calls.values()
    calls.clear()
    # What a GPU gains by: here it only has to come to the same.
    monkeypatch.setattr(FittingPasses, "_begins_ahead", True)
    ahead, events_ahead = search(tmp_path / "ahead")
    assert calls["ahead"] > ticks // 3
    # Dropped are what was begun with the trial that becomes NaN, and with the one that is stopped. In the middle of a
    # batch nothing may be begun: its gradients are not to be had again.
    assert calls.total() - ticks == (2 if tokens_per_tick == 300 else 0)
    assert_same_bits(ahead, plain, but="trial-3")
    assert [event for event in events_ahead if isinstance(event, TrialProgress)] == [
        event for event in plain_events if isinstance(event, TrialProgress)
    ]


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
def test_what_gradients_hold_between_batches_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, overwrites: bool
) -> None:
    if overwrites:
        # As on Hopper: nothing is cleared when the tick begins, but by each module's backward pass.
        monkeypatch.setattr(kernel_backend, "clear_gradients", lambda tick: None)
        monkeypatch.setattr(KernelBackend, "_overwrites", property(lambda _: True, lambda *_: None), raising=False)
    settings = ExecutorSettings(tokens_per_tick=64, backend=backend)
    clean, _ = run(job(*MIX), tmp_path / "clean", settings=settings)

    def leave_rubbish(steps: Sequence[tuple[AdapterStep, torch.Tensor]]) -> torch.Tensor:
        norms = take_steps(steps)
        for step, _ in steps:
            step.grad.fill_(math.nan)
        return norms

    monkeypatch.setattr(fitting_passes, "take_steps", leave_rubbish)
    rubbish, _ = run(job(*MIX), tmp_path / "rubbish", settings=settings)
    assert_same_bits(clean, rubbish, but="trial-3")


def test_a_plan_made_before_an_adapter_got_other_buffers_is_not_used() -> None:
    backbone = tiny_backbone()
    backbone.use_backend(choose_backend("cpu", backbone.layers, 1, backbone.device, backbone.dtype))
    found = []
    for moves in (False, True):
        share = replace(example_share(backbone), begins_batch=True)
        assert share.adapter is not None
        tick = passes.lay_out(backbone, [share])
        if moves:
            old = share.adapter.buffers
            share.adapter.load({name: buffer.clone() for name, buffer in old.items()})
            for buffer in old.values():
                buffer.fill_(math.nan)
        loss = passes.train_tick(backbone, tick)
        found.append((loss, share.adapter.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


def test_layers_that_a_model_uses_twice_are_told_so() -> None:
    from alto_training.executor.backbone import prepare_backbone
    from tiny_jobs import tiny_llama

    model = tiny_llama()
    once = prepare_backbone(tiny_llama(), "once", torch.device("cpu"))
    assert all(layer.runs_once for layer in once.layers)
    model.base_model.layers[1].mlp = model.base_model.layers[0].mlp
    twice = prepare_backbone(model, "twice", torch.device("cpu"))
    assert {layer.path.rsplit(".", 1)[-1] for layer in twice.layers if not layer.runs_once} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_layers_that_a_model_does_not_use_are_told_so() -> None:
    from alto_training.executor.backbone import prepare_backbone
    from tiny_jobs import tiny_llama

    model = tiny_llama()
    model.base_model.layers[1].spare_proj = torch.nn.Linear(8, 8)
    backbone = prepare_backbone(model, "one too many", torch.device("cpu"))
    assert [layer.path for layer in backbone.layers if not layer.runs_once] == ["model.layers.1.spare_proj"]


def test_a_seat_whose_taking_failed_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    backbone.use_backend(choose_backend("cpu", backbone.layers, 1, backbone.device, backbone.dtype))
    first, second = replace(example_share(backbone), begins_batch=True), example_share(backbone)
    assert first.adapter is not None
    passes.train_tick(backbone, passes.lay_out(backbone, [first]))
    expected = first.adapter.grad.clone()
    whole_set_slot = AdapterTable.set_slot

    def set_slot(self: AdapterTable, *arguments: Any, **named: Any) -> None:
        whole_set_slot(self, *arguments, **named)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(passes.TickTooLargeError):
        patch.setattr(AdapterTable, "set_slot", set_slot)
        passes.lay_out(backbone, [second])
    passes.train_tick(backbone, passes.lay_out(backbone, [first]))
    assert torch.equal(first.adapter.grad, expected)
    assert second.adapter is not None
    assert not second.adapter.grad.any()


def example_share(backbone: Backbone) -> Share:
    from alto_training.executor.adapter import Adapter
    from alto_training.executor.objectives import SupervisedObjective
    from tiny_jobs import MemoryDataset

    adapter = Adapter(backbone.adapted_modules(CONFIG), CONFIG.lora_rank, 2.0)
    adapter.initialise(0)
    adapter.param.add_(0.01)
    data = MemoryDataset(4)
    return Share(adapter, [SupervisedObjective().item(data, row, 32, row) for row in range(3)], batch_denominator=20.0)


def lasting(event: Event) -> list[Event]:
    """Return what an event says of trials, whenever and wherever they ran; nothing where it says nothing of them."""
    if isinstance(event, TrialFinished):
        return [replace(event, adapter_path=None)]
    return [event] if isinstance(event, TrialProgress | TrialEvaluated | TrialDecided | TickHalved) else []


def test_whatever_happens_between_two_ticks_nothing_is_lost_or_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials are stopped and revived, a guest comes and goes, memory runs out, the run pauses and carries on."""
    guest = job(replace(CONFIG, seed=8), replace(CONFIG, seed=9, lora_dropout=0.1), task_id="guest")
    host = job(*MIX, task_id="host", early_exit=EarlyExit("paper", warmup_fraction=0.3, keep_fraction=0.5))
    settings = ExecutorSettings(
        tokens_per_tick=96, backend=Backend.CPU, slots=3, progress_interval_s=0.0, checkpoint_every_ticks=2
    )
    run_tick = passes.train_tick

    def story(folder: Path) -> list[Any]:
        told: list[Any] = []
        control = ControlQueue()
        commands: dict[int, list[Command]] = {
            2: [Join(guest, folder / "guest")],
            3: [StopTrial("trial-1", "host")],
            4: [ReviveTrial("trial-1", "host"), StopTrial("trial-4", "host")],
            6: [Pause("guest")],
            7: [Join(guest, folder / "guest")],
            9: [Pause()],
        }

        def listen(event: Event) -> None:
            if isinstance(event, TaskProgress) and event.task_id == "host":
                for command in commands.pop(event.tick, []):
                    control.put(command)
            told.extend(lasting(event))

        def train_tick(backbone: Backbone, tick: Tick | None) -> torch.Tensor:
            losses = run_tick(backbone, tick)
            assert tick is not None
            told.append(tick.input_ids_1T.tolist())
            if sum(isinstance(one, list) for one in told) in (5, 14):
                raise passes.TickTooLargeError("made up")
            return losses

        monkeypatch.setattr(passes, "train_tick", train_tick)
        states = [run(host, folder, settings=settings, control=control, events=listen)[0].state for _ in range(2)]
        assert states == ["paused", "succeeded"]
        assert not commands
        assert sum(isinstance(one, TickHalved) and one.task_id == "host" for one in told) == 2
        return told

    ahead = story(tmp_path / "ahead")
    monkeypatch.setattr(FittingPasses, "_lay_out_ahead", lambda *_: None)
    assert repr(story(tmp_path / "in-time")) == repr(ahead)  # repr: a loss that is not a number equals itself


@pytest.mark.parametrize("seed", range(5))
def test_a_begun_pass_that_is_dropped_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Commands at random moments, and memory that runs out in passes that are begun ahead alone."""
    draws = random.Random(seed)
    longer = replace(CONFIG, max_steps=9)
    trials = (
        replace(longer, gradient_accumulation_steps=2, max_steps=6),
        replace(longer, lora_rank=16, lora_dropout=0.2, seed=1),
        replace(longer, target_modules=("q_proj", "down_proj"), max_steps=4),
        replace(longer, learning_rate=1e30, seed=5),
        replace(longer, batch_size=1, seed=6),
    )
    exits = EarlyExit(draws.choice(["none", "paper"]), warmup_fraction=0.3, keep_fraction=0.5)
    host = job(*trials, task_id="host", evaluation=Evaluation(count=2), early_exit=exits)
    guest = job(replace(longer, seed=8), replace(longer, seed=9, lora_dropout=0.1), task_id="guest")
    settings = ExecutorSettings(
        tokens_per_tick=draws.choice([96, 200, 400]),
        backend=Backend.CPU,
        slots=draws.choice([3, 4, 6]),
        progress_interval_s=0.0,
        checkpoint_every_ticks=2,
    )
    moments = {tick: draws.randrange(5) for tick in range(1, 12) if draws.random() < 0.5}
    fails_at = draws.randrange(1, 12)
    run_tick, lay_out_ahead = passes.train_tick, FittingPasses._lay_out_ahead

    def story(folder: Path, begins: bool) -> tuple[list[Event], int]:
        commands: list[list[Command]] = [
            [StopTrial("trial-1", "host"), ReviveTrial("trial-1", "host")],
            [StopTrial("trial-4", "host")],
            [Join(guest, folder / "guest")],
            [ReviveTrial("trial-0", "host"), ReviveTrial("trial-3", "host")],
            [Pause()],
        ]
        told, control, due = list[Event](), ControlQueue(), dict(moments)
        is_ahead, begun = False, 0

        def listen(event: Event) -> None:
            if isinstance(event, TaskProgress) and event.task_id == "host" and event.tick in due:
                for command in commands[due.pop(event.tick)]:
                    control.put(command)
            told.extend(lasting(event))

        def train_tick(backbone: Backbone, tick: Tick | None) -> torch.Tensor:
            nonlocal begun
            losses = run_tick(backbone, tick)
            begun += is_ahead
            if is_ahead and begun == fails_at:
                raise passes.TickTooLargeError("made up")
            return losses

        def watched(self: FittingPasses, *arguments: Any) -> None:
            nonlocal is_ahead
            is_ahead = True
            lay_out_ahead(self, *arguments)
            is_ahead = False

        monkeypatch.setattr(passes, "train_tick", train_tick)
        monkeypatch.setattr(FittingPasses, "_lay_out_ahead", watched)
        monkeypatch.setattr(FittingPasses, "_begins_ahead", begins)
        while run(host, folder, settings=settings, control=control, events=listen)[0].state == "paused":
            pass
        return told, begun

    ahead, begun = story(tmp_path / "ahead", begins=True)
    in_time, _ = story(tmp_path / "in-time", begins=False)
    assert begun > 0
    assert repr(ahead) == repr(in_time)  # repr: a loss that is not a number equals itself
