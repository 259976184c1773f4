"""Training on the places that there are, without being told how."""

from pathlib import Path

import pytest
from alto_common.tuning import TrialConfig
from alto_training.executor.events import TaskStarted, TaskState
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.sharding.automatic import Places, automatic_strategy, train
from alto_training.sharding.errors import StrategyError
from alto_training.sharding.strategy import Strategy, StrategyRecords
from tiny_task import make_job

SETTINGS = ExecutorSettings(tokens_per_tick=128, backend=Backend.CPU, threads=1)


def test_what_does_not_fit_on_one_is_shared_out(tiny_folder: Path, tmp_path: Path) -> None:
    job = make_job(tiny_folder, TrialConfig(max_length=48))
    records = StrategyRecords(tmp_path / "records.json")
    chosen = [automatic_strategy(job, SETTINGS, Places(2, "cpu", memory), records) for memory in (2**30, 300_000)]
    assert chosen == [Strategy.REPLICATED, Strategy.SHARDED]
    with pytest.raises(StrategyError):
        automatic_strategy(job, SETTINGS, Places(2, "cpu", 1000), records)


@pytest.mark.slow
def test_one_call_trains_on_two_places_and_notes_the_speed(tiny_folder: Path, tmp_path: Path) -> None:
    job = make_job(tiny_folder, *(TrialConfig(lora_rank=2, max_steps=3, max_length=48, seed=seed) for seed in range(3)))
    records = StrategyRecords(tmp_path / "records.json")
    events: list[object] = []
    outcome = train(job, tmp_path / "work", events.append, SETTINGS, None, Places(2, "cpu", 2**30), records)
    assert outcome.state is TaskState.SUCCEEDED
    assert len(outcome.trials) == 3
    assert sum(isinstance(event, TaskStarted) for event in events) == 1
    assert set(records.read(job.base_model, "cpu", 2)) == {Strategy.REPLICATED}
