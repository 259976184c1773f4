"""Whole searches on several GPUs: every trial ends as on one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alto_common.tuning import EarlyExit, Evaluation
from alto_training.executor.executor import Executor
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.sharding.automatic import train
from alto_training.sharding.places import Places
from alto_training.sharding.run import RankedRun, RankSettings
from alto_training.sharding.strategy import Strategy, StrategyRecords
from safetensors.torch import load_file
from tiny_task import make_job, mixed_configs, write_model, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def wide_folder(folder: Path) -> Path:
    """Write a model whose layers are wide beside the 2 MiB that shares on GPUs are multiples of, and its datasets."""
    write_model(folder / "model", hidden_size=1024, intermediate_size=2048)
    write_rows(folder / "train.jsonl", 23, seed=1)
    write_rows(folder / "validation.jsonl", 7, seed=2)
    return folder


def test_two_gpus_equal_one_in_every_strategy_that_is_chosen(tmp_path: Path) -> None:
    exits = EarlyExit("paper", warmup_fraction=0.6, keep_fraction=0.5)
    job = make_job(wide_folder(tmp_path / "wide"), *mixed_configs(), early_exit=exits, evaluation=Evaluation(count=3))
    settings = ExecutorSettings(device="cuda", backend=Backend.REFERENCE, tokens_per_tick=160, slots=4)
    one = Executor(job, tmp_path / "one", lambda event: None, replace(settings, device="cuda:0")).run()
    places, records = Places(2, "gpu", 2**33), StrategyRecords(tmp_path / "records.json")
    replicated = train(job, tmp_path / "replicated", lambda event: None, settings, None, places, records)
    shares = RankedRun(job, tmp_path / "shares", lambda event: None, settings, None, RankSettings(2, Strategy.SHARDED))
    (sharded,) = shares.run_all()
    assert set(records.read(job.base_model, "gpu", 2)) == {Strategy.REPLICATED}
    assert all(report.kept_bytes < 0.6 * report.backbone_bytes for report in shares.reports)
    for outcome in (replicated, sharded):
        for ours, theirs in zip(
            *(sorted(each.trials, key=lambda one: one.trial_id) for each in (outcome, one)), strict=True
        ):
            assert (ours.trial_id, ours.state, ours.step) == (theirs.trial_id, theirs.state, theirs.step)
            if theirs.adapter_path is None:
                continue
            mine, expected = (
                load_file(Path(one.adapter_path or "") / "adapter_model.safetensors") for one in (ours, theirs)
            )
            for name, weight in expected.items():
                assert (mine[name] - weight).norm() <= 1e-4 * weight.norm(), (ours.trial_id, name)
