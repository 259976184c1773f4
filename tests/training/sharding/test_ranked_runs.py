"""Whole searches on several real processes: every trial ends as it does in one process, whatever happens to ranks."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.base_models import UnknownModelError, resolve
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.control import ControlQueue, StopTrial
from alto_training.executor.errors import DatasetRefusedError, OutOfMemoryError, TickOutOfMemoryError
from alto_training.executor.events import (
    CheckpointWritten,
    Event,
    Outcome,
    TaskStarted,
    TickHalved,
    TrialDecided,
    TrialFinished,
    TrialProgress,
    TrialState,
)
from alto_training.executor.executor import Executor
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.sharding.errors import RankFailedError
from alto_training.sharding.rank_order import RankFailure
from alto_training.sharding.rank_processes import RankProcesses, RankTrouble
from alto_training.sharding.run import RankedRun, RankSettings
from alto_training.sharding.strategy import EngineName, Strategy
from safetensors.torch import load_file
from tiny_task import make_job, mixed_configs, write_rows

pytestmark = pytest.mark.slow

SETTINGS = ExecutorSettings(tokens_per_tick=160, backend=Backend.CPU, slots=4, threads=1, checkpoint_every_ticks=3)
# Two thirds of the way, the worse half is stopped; places are freed for whoever waits.
EXITS = EarlyExit("paper", warmup_fraction=0.6, keep_fraction=0.5)


@pytest.fixture(scope="module")
def task(tiny_folder: Path) -> TuningJob:
    return make_job(tiny_folder, *mixed_configs(), early_exit=EXITS, evaluation=Evaluation(count=3))


@pytest.fixture(scope="module")
def alone(task: TuningJob, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one process makes of the task."""
    return Executor(task, tmp_path_factory.mktemp("alone"), lambda event: None, SETTINGS).run()


def assert_same(ours: Outcome, expected: Outcome) -> None:
    assert {one.trial_id: (one.state, one.step, one.best_step) for one in ours.trials} == {
        one.trial_id: (one.state, one.step, one.best_step) for one in expected.trials
    }
    paths = {one.trial_id: one.adapter_path for one in ours.trials}
    for trial in expected.trials:
        assert (paths[trial.trial_id] is None) == (trial.adapter_path is None)
        if trial.adapter_path is None:
            continue
        theirs = load_file(Path(trial.adapter_path) / "adapter_model.safetensors")
        mine = load_file(Path(paths[trial.trial_id] or "") / "adapter_model.safetensors")
        for name, expected_weight in theirs.items():
            error = torch.linalg.vector_norm(mine[name] - expected_weight)
            assert error <= 1e-5 * torch.linalg.vector_norm(expected_weight), (trial.trial_id, name)


def test_a_sharded_search_equals_one_process_and_sends_the_backbone_alone(
    task: TuningJob, alone: Outcome, tmp_path: Path
) -> None:
    events: list[Event] = []
    ranks = RankSettings(2, Strategy.SHARDED, count_traffic=True)
    run = RankedRun(task, tmp_path, events.append, SETTINGS, None, ranks)
    (outcome,) = run.run_all()
    assert_same(outcome, alone)
    stopped = {one.trial_id for one in outcome.trials if one.state is TrialState.STOPPED}
    assert "trial-4" in stopped, "the trial that becomes NaN"
    assert {event.trial_id for event in events if isinstance(event, TrialDecided)} >= stopped
    for report in run.reports:
        passes = (report.training_passes, report.inference_passes)
        gathered = passes[0] * report.training_gather_bytes + passes[1] * report.inference_gather_bytes
        # The gathers of the backbone, and fixed small messages of what each rank found: nothing of any adapter.
        assert report.traffic_bytes["_allgather_base_"] == gathered
        assert set(report.traffic_bytes) == {"_allgather_base_", "allgather_"}
        assert report.traffic_bytes["allgather_"] % (2 * 4096) == 0
        assert report.kept_bytes * 2 == pytest.approx(report.backbone_bytes, rel=0.01)
    assert [report.training_passes for report in run.reports] == [run.reports[0].training_passes] * 2
    assert sum(report.idle_passes for report in run.reports) > 0, "at the end, a rank has nothing to do"


def test_a_rank_with_room_keeps_layers_whole_and_gathers_the_others(
    task: TuningJob, alone: Outcome, tmp_path: Path
) -> None:
    gathered, kept = [], []
    for room in (0, 440_000):
        ranks = RankSettings(2, Strategy.SHARDED, room_for_weights_bytes=room)
        run = RankedRun(task, tmp_path / str(room), lambda event: None, SETTINGS, None, ranks)
        assert_same(run.run_all()[0], alone)
        (gather_bytes,) = {report.training_gather_bytes for report in run.reports}
        (kept_bytes,) = {report.kept_bytes for report in run.reports}
        gathered.append(gather_bytes)
        kept.append(kept_bytes)
    # A layer that is kept whole is gathered neither forward nor backward, and half of it was kept before.
    assert 0 < gathered[0] - gathered[1] == 4 * (kept[1] - kept[0])
    assert kept[1] < 440_000


def test_where_memory_runs_out_no_layer_is_kept_whole_before_ticks_are_halved(task: TuningJob, tmp_path: Path) -> None:
    events: list[Event] = []
    ranks = RankSettings(2, Strategy.SHARDED, room_for_weights_bytes=440_000)
    run = RankedRun(task, tmp_path, events.append, SETTINGS, None, ranks)
    out = RankTrouble(1, "gave up", RankFailure(TickOutOfMemoryError.__name__, "no memory", "more GPUs", 160))
    asked = []
    for _ in range(3):
        order = run._order()
        asked.append((order.room_for_weights_bytes, order.settings.tokens_per_tick))
        run._consider(out)
    assert asked == [(440_000, 160), (0, 160), (0, 80)]
    assert [event.tokens_per_tick for event in events if isinstance(event, TickHalved)] == [80, 40]
    with pytest.raises(OutOfMemoryError, match="no memory"):
        run._consider(RankTrouble(1, "gave up", RankFailure(OutOfMemoryError.__name__, "no memory", "more GPUs")))


def test_ranks_that_fail_again_keep_no_layer_whole_before_one_is_given_up(task: TuningJob, tmp_path: Path) -> None:
    """As they do where the system ends whoever takes too much memory: nobody says that this was it."""
    ranks = RankSettings(2, Strategy.SHARDED, room_for_weights_bytes=440_000, attempts_without_progress=5)
    run = RankedRun(task, tmp_path, lambda event: None, SETTINGS, None, ranks)
    asked = []
    for _ in range(3):
        order = run._order()
        asked.append((order.ranks, order.room_for_weights_bytes))
        run._consider(RankTrouble(1, "was killed"))
    assert asked == [(2, 440_000), (2, 440_000), (2, 0)]
    assert run._order().ranks == 1


def test_a_rank_that_is_killed_at_any_moment_costs_nothing_but_time(
    task: TuningJob, alone: Outcome, tmp_path: Path
) -> None:
    events: list[Event] = []
    attempts: list[RankProcesses] = []
    # So many events after the first checkpoint; ranks go on beside whoever is told.
    moment = random.randrange(40)

    def tell(event: Event) -> None:
        events.append(event)
        checkpoints = (place for place, each in enumerate(events) if isinstance(each, CheckpointWritten))
        if len(events) == next(checkpoints, len(events)) + 1 + moment:
            os.kill(attempts[0].process_ids[random.randrange(2)], signal.SIGKILL)

    ranks = RankSettings(2, Strategy.REPLICATED)
    (outcome,) = RankedRun(task, tmp_path, tell, SETTINGS, None, ranks, watch=attempts.append).run_all()
    assert len(attempts) == 2, f"killed {moment} events after the first checkpoint"
    assert_same(outcome, alone)
    resumed = [event.resumed_from_tick for event in events if isinstance(event, TaskStarted)]
    assert resumed[0] is None
    assert resumed[1] is not None


def test_nothing_is_in_a_checkpoint_that_was_not_told_before(task: TuningJob, tmp_path: Path) -> None:
    # Whoever listens may be killed at any moment: what it has not heard, a resumed run must tell again.
    told: dict[str, int] = {}
    checked = 0

    def listen(event: Event) -> None:
        nonlocal checked
        if not isinstance(event, TrialProgress):
            return
        manifest = max((tmp_path / "checkpoints").glob("manifest-*.json"), default=None)
        if manifest is not None:
            saved = json.loads(json.loads(manifest.read_text())["payload"])["state"]["task"]
            for trial_id, run in saved["runs"].items():
                assert run["step"] <= told.get(trial_id, 0)
            checked += 1
        told[event.trial_id] = event.step
        time.sleep(0.03)

    RankedRun(task, tmp_path, listen, SETTINGS, None, RankSettings(2, Strategy.REPLICATED)).run_all()
    assert checked > 0


def test_a_rank_that_hangs_is_named(task: TuningJob, tmp_path: Path) -> None:
    attempts: list[RankProcesses] = []

    def freeze(event: Event) -> None:
        if isinstance(event, CheckpointWritten):
            os.kill(attempts[-1].process_ids[1], signal.SIGSTOP)

    ranks = RankSettings(2, Strategy.SHARDED, EngineName.FSDP2, hang_timeout_s=12.0, attempts_without_progress=1)
    with pytest.raises(RankFailedError, match=r"worker rank 1 \(device 1\) has shown no sign of life"):
        RankedRun(task, tmp_path, freeze, SETTINGS, None, ranks, watch=attempts.append).run_all()
    for process_id in attempts[-1].process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_a_refusal_is_told_and_not_tried_again(task: TuningJob, tmp_path: Path) -> None:
    empty = Path(task.validation_path).with_name("empty.jsonl")
    empty.write_text("")
    job = replace(task, validation_path=str(empty))
    attempts: list[RankProcesses] = []
    ranks = RankSettings(2, Strategy.REPLICATED)
    with pytest.raises(DatasetRefusedError, match=r"empty\.jsonl"):
        RankedRun(job, tmp_path, lambda event: None, SETTINGS, None, ranks, watch=attempts.append).run_all()
    assert len(attempts) == 1


def test_four_ranks_in_two_groups_equal_one_process(task: TuningJob, alone: Outcome, tmp_path: Path) -> None:
    ranks = RankSettings(4, Strategy.HYBRID, ranks_per_host=2)
    run = RankedRun(task, tmp_path, lambda event: None, SETTINGS, None, ranks)
    (outcome,) = run.run_all()
    assert_same(outcome, alone)
    assert all(report.kept_bytes * 2 == pytest.approx(report.backbone_bytes, rel=0.01) for report in run.reports)
    assert run.reports[0].moves > 0, "exits leave ranks uneven: trials move, with their exact state"


@pytest.mark.timeout(600)
def test_a_pretrained_backbone_in_shares_equals_one_process(tmp_path: Path) -> None:
    try:
        model = resolve("smollm2-135m-instruct").location
    except UnknownModelError:
        pytest.skip("the model is not there; `alto models fetch` gets it")
    for name, rows, seed in (("train", 6, 1), ("validation", 2, 2)):
        write_rows(tmp_path / f"{name}.jsonl", rows, seed)
    common: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_length": 24, "max_steps": 1}
    job = TuningJob(
        task_id="task",
        base_model=model,
        train_path=str(tmp_path / "train.jsonl"),
        validation_path=str(tmp_path / "validation.jsonl"),
        trials=tuple(Trial(f"trial-{rank}", TrialConfig(lora_rank=rank, seed=rank, **common)) for rank in (4, 8)),
        early_exit=EarlyExit("none"),
        evaluation=Evaluation(count=1),
    )
    settings = ExecutorSettings(tokens_per_tick=96, backend=Backend.CPU, threads=1)
    alone = Executor(job, tmp_path / "alone", lambda event: None, settings).run()
    run = RankedRun(job, tmp_path / "ranks", lambda event: None, settings, None, RankSettings(2, Strategy.SHARDED))
    assert_same(run.run_all()[0], alone)


def test_what_was_commanded_holds_after_a_rank_died(task: TuningJob, tmp_path: Path) -> None:
    attempts: list[RankProcesses] = []
    control = ControlQueue()
    control.put(StopTrial("trial-0"))

    def tell(event: Event) -> None:
        if isinstance(event, TrialFinished) and event.trial_id == "trial-0" and len(attempts) == 1:
            os.kill(attempts[0].process_ids[1], signal.SIGKILL)

    ranks, settings = RankSettings(2, Strategy.REPLICATED), replace(SETTINGS, checkpoint_every_ticks=None)
    (outcome,) = RankedRun(task, tmp_path, tell, settings, control, ranks, watch=attempts.append).run_all()
    assert len(attempts) == 2
    states = {one.trial_id: one.state for one in outcome.trials}
    assert states.pop("trial-0") is TrialState.CANCELLED
    assert TrialState.CANCELLED not in states.values()
