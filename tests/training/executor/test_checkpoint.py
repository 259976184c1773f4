"""Checkpoints: damage is found, the last good one is used, and a run resumed anywhere ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alto_common.tuning import EarlyExit, Evaluation, Objective, ObjectiveKind, Trial, TrialConfig, TuningJob
from alto_training.executor.backbone import prepare_backbone
from alto_training.executor.checkpoint import CheckpointStore, TensorGroup, checkpoints_folder
from alto_training.executor.control import ControlQueue, Pause
from alto_training.executor.errors import (
    CheckpointError,
    DatasetChangedError,
    JobChangedError,
    WrongBaseModelError,
)
from alto_training.executor.events import CheckpointWritten, Event, TaskStarted, TrialProgress
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.task_run import job_fingerprint
from tiny_jobs import MemoryDataset, assert_same_bits, job, open_memory, run, tiny_llama

SETTINGS = ExecutorSettings(tokens_per_tick=64, backend=Backend.REFERENCE, checkpoint_every_ticks=2)


def config(**changes: object) -> TrialConfig:
    values = {"lora_rank": 4, "learning_rate": 2e-3, "batch_size": 3, "max_steps": 6, "max_length": 32}
    return TrialConfig(**(values | changes))  # type: ignore[arg-type]


def mix(**changes: object) -> TuningJob:
    trials = [
        config(lora_dropout=0.2, gradient_accumulation_steps=2),
        config(lora_rank=2, batch_size=1, seed=1, max_steps=9),
        config(lora_rank=7, batch_size=5, seed=2, learning_rate=1e-3),
        config(seed=3, max_steps=4),
    ]
    values = {"early_exit": EarlyExit("paper", warmup_fraction=0.4, keep_fraction=0.5), "evaluation": Evaluation(4)}
    return job(*trials, **(values | changes))


class KilledError(Exception):
    """Stands for the process's death: nothing of the executor runs after it."""


def die_after(count: int) -> Callable[[Event], None]:
    seen = 0

    def sink(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise KilledError

    return sink


@pytest.mark.parametrize("objective", [Objective(), Objective(ObjectiveKind.DPO)])
def test_a_run_interrupted_at_many_places_ends_with_the_same_bits(tmp_path: Path, objective: Objective) -> None:
    task = mix(objective=objective)
    settings = replace(SETTINGS, slots=2)
    expected, _ = run(task, tmp_path / "whole", settings=settings)
    deaths = 0
    while True:
        try:
            resumed, _ = run(task, tmp_path / "pieces", settings=settings, events=die_after(17 + deaths))
        except KilledError:
            deaths += 1
            continue
        break
    assert deaths >= 3
    assert_same_bits(expected, resumed)


def test_a_trial_that_never_had_a_slot_is_its_seed_alone(tmp_path: Path) -> None:
    def die_at_a_checkpoint(event: Event) -> None:
        if isinstance(event, CheckpointWritten):
            raise KilledError

    task = mix(early_exit=EarlyExit("none"))
    settings = replace(SETTINGS, slots=1)
    expected, _ = run(task, tmp_path / "whole", settings=settings)
    with pytest.raises(KilledError):
        run(task, tmp_path / "killed", settings=settings, events=die_at_a_checkpoint)
    written = CheckpointStore(checkpoints_folder(tmp_path / "killed")).read()
    assert written is not None
    assert set(written.groups) == {"trial0-state"}
    resumed, _ = run(task, tmp_path / "killed", settings=settings)
    assert_same_bits(expected, resumed)


@pytest.mark.slow
def test_sigkill_leaves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    expected, _ = run(mix(), tmp_path / "whole", settings=SETTINGS)
    for kills in (12, 30):
        child = subprocess.run(
            [sys.executable, __file__, str(tmp_path / "killed"), str(kills)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert child.returncode == -signal.SIGKILL
    resumed, events = run(mix(), tmp_path / "killed", settings=SETTINGS)
    assert isinstance(events[0], TaskStarted)
    assert events[0].resumed_from_tick
    assert_same_bits(expected, resumed)


def test_pausing_writes_a_checkpoint_and_running_again_carries_on(tmp_path: Path) -> None:
    expected, _ = run(mix(), tmp_path / "whole", settings=SETTINGS)
    control = ControlQueue()
    control.put(Pause())
    paused, _ = run(
        mix(), tmp_path / "paused", settings=replace(SETTINGS, checkpoint_every_ticks=None), control=control
    )
    assert paused.state == "paused"
    resumed, _ = run(mix(), tmp_path / "paused", settings=SETTINGS)
    assert_same_bits(expected, resumed)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = run(mix(), tmp_path, settings=SETTINGS)
    again, events = run(mix(), tmp_path, settings=SETTINGS)
    assert again == first
    assert not any(isinstance(event, TrialProgress) for event in events)


def write(store: CheckpointStore, tick: int) -> Path:
    groups = [
        TensorGroup("first", tick, {"param": torch.full((5,), float(tick))}),
        TensorGroup("second", 0, {"param": torch.arange(4.0)}),
    ]
    path, _ = store.write_manifest(tick, {"note": f"at {tick}"}, store.write_groups(groups))
    return path


def test_what_did_not_change_is_not_written_again_and_two_generations_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    unchanged = (tmp_path / "second-v0.safetensors").stat().st_mtime_ns
    for tick in (2, 3, 4):
        write(store, tick)
    assert (tmp_path / "second-v0.safetensors").stat().st_mtime_ns == unchanged
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first-v3.safetensors",
        "first-v4.safetensors",
        "manifest-000000000003.json",
        "manifest-000000000004.json",
        "second-v0.safetensors",
    ]
    checkpoint = CheckpointStore(tmp_path).read()
    assert checkpoint is not None
    assert (checkpoint.tick, checkpoint.state) == (4, {"note": "at 4"})
    assert torch.equal(checkpoint.groups["first"]["param"], torch.full((5,), 4.0))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["manifest-000000000002.json", "first-v2.safetensors"])
@pytest.mark.parametrize("damage", [cut_short, alter, Path.unlink])
def test_a_damaged_generation_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    damage(tmp_path / name)
    checkpoint = CheckpointStore(tmp_path).read()
    assert checkpoint is not None
    assert checkpoint.state == {"note": "at 1"}
    # And it does not come back: the next two generations push nothing good out.
    reader = CheckpointStore(tmp_path)
    assert reader.read() is not None
    write(reader, 3)
    found = CheckpointStore(tmp_path).read()
    assert found is not None
    assert found.tick == 3


def test_without_a_good_generation_the_damage_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    run(mix(), tmp_path, settings=SETTINGS)
    for path in (tmp_path / "checkpoints").glob("manifest-*"):
        alter(path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(CheckpointError, match=r"manifest-\d+\.json .*restore the files"):
        run(mix(), tmp_path, settings=SETTINGS)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_a_kill_between_tensors_and_manifest_leaves_the_generation_before(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), 1)
    write(CheckpointStore(tmp_path), 2).unlink()
    (tmp_path / ".manifest-000000000002.json.partial").write_text('{"half')
    checkpoint = CheckpointStore(tmp_path).read()
    assert checkpoint is not None
    assert checkpoint.tick == 1


def interrupted(workdir: Path) -> None:
    with pytest.raises(KilledError):
        run(mix(), workdir, settings=SETTINGS, events=die_after(30))


def test_a_changed_dataset_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)

    def open_changed(job: TuningJob, cache_dir: Path) -> tuple[MemoryDataset, MemoryDataset]:
        return MemoryDataset(23, seed=9), open_memory(job, cache_dir)[1]

    with pytest.raises(DatasetChangedError, match=r"training rows of .* have changed"):
        run(mix(), tmp_path, settings=SETTINGS, open_data=open_changed)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data.add_(1.0)
    with pytest.raises(WrongBaseModelError, match="another backbone"):
        run(mix(), tmp_path, settings=SETTINGS, backbone=prepare_backbone(other, "other", torch.device("cpu")))


def test_other_trials_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(JobChangedError, match="another task or other trials"):
        run(job(config()), tmp_path, settings=SETTINGS)


def test_what_the_base_model_is_called_does_not_count(tmp_path: Path) -> None:
    interrupted(tmp_path)
    outcome, _ = run(mix(base_model="elsewhere", base_model_name="org/tiny"), tmp_path, settings=SETTINGS)
    assert outcome.state == "succeeded"


def test_checkpoints_of_earlier_versions_are_taken_up() -> None:
    before = "d6711aa87d58181d388e81cea96924a507174782ca8f64135e80a1107087cf7a"
    trials = (Trial("trial-001", TrialConfig()),)
    assert job_fingerprint(TuningJob("task", "somewhere", "train", "validation", trials)) == before


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    _, events = run(mix(), tmp_path, settings=SETTINGS)
    assert any(isinstance(event, CheckpointWritten) for event in events)
    for path in (tmp_path / "checkpoints").iterdir():
        assert path.suffix in {".json", ".safetensors"}
        if path.suffix == ".json":
            json.loads(json.loads(path.read_text())["payload"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = 0

    def kill_myself(event: Event) -> None:
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    run(mix(), Path(sys.argv[1]), settings=SETTINGS, events=kill_myself)


def test_files_of_a_damaged_generation_are_never_taken_for_those_of_the_run_that_goes_on(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for version in (1, 2):
        groups = [TensorGroup(name, version, {"param": torch.full((3,), float(version))}) for name in ("a", "b")]
        store.write_manifest(version, {}, store.write_groups(groups))
    (tmp_path / "b-v2.safetensors").write_bytes(b"damaged")

    store = CheckpointStore(tmp_path)
    before = store.read()
    assert before is not None
    assert before.tick == 1
    # A run with smaller ticks comes to the same version of "a" at another step.
    other = [TensorGroup("a", 2, {"param": torch.full((3,), 7.0)}), TensorGroup("b", 1, before.groups["b"])]
    store.write_manifest(3, {}, store.write_groups(other))
    after = CheckpointStore(tmp_path).read()
    assert after is not None
    assert after.groups["a"]["param"].tolist() == [7.0] * 3
