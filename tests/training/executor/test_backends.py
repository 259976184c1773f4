"""Which back end `auto` takes: the same for the same machine and model, so that two runs give the same bits."""

from __future__ import annotations

from pathlib import Path

import alto_kernels
import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.events import TaskStarted
from alto_training.executor.settings import ExecutorSettings
from tiny_jobs import assert_same_bits, job, run


@pytest.mark.parametrize(
    ("built", "device", "dtype", "chosen"),
    [
        (("reference",), "cpu", torch.float32, "reference"),
        (("reference", "cpu"), "cpu", torch.float32, "cpu"),
        (("reference", "cpu", "cutlass"), "cpu", torch.bfloat16, "cpu"),
        # Its kernels take bf16 alone; where they do not fit, plain torch does.
        (("reference", "cpu"), "cuda", torch.bfloat16, "reference"),
        (("reference", "cpu", "cutlass"), "cuda", torch.float32, "reference"),
    ],
)
def test_the_rule(
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    built: tuple[str, ...],
    device: str,
    dtype: torch.dtype,
    chosen: str,
) -> None:
    def backends(asked: torch.dtype = torch.bfloat16) -> list[str]:
        return [one for one in built if one != "cutlass" or asked is torch.bfloat16]

    monkeypatch.setattr(alto_kernels, "backends", backends)
    assert choose_backend("auto", backbone.layers, 2, torch.device(device), dtype).name == chosen


def test_two_runs_that_choose_for_themselves_give_the_same_bits(tmp_path: Path) -> None:
    config = TrialConfig(lora_rank=4, learning_rate=2e-3, batch_size=3, max_steps=4, max_length=24)
    task = job(config, TrialConfig(lora_rank=7, lora_dropout=0.1, batch_size=2, max_steps=4, max_length=24, seed=1))
    settings = ExecutorSettings(cache_dir=tmp_path / "cache")
    first, told = run(task, tmp_path / "first", settings=settings)
    second, told_again = run(task, tmp_path / "second", settings=settings)
    starts = [event for event in (told[0], told_again[0]) if isinstance(event, TaskStarted)]
    assert starts[0].backend == starts[1].backend == alto_kernels.backends()[-1]
    assert (starts[0].tokens_per_tick, starts[0].slots) == (starts[1].tokens_per_tick, starts[1].slots)
    assert_same_bits(first, second)
