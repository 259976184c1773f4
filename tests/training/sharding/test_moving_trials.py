"""Trials that change their rank again and again, between executors in the threads of one process."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import EarlyExit, Evaluation
from alto_training.executor.backbone import load_backbone
from alto_training.executor.control import Command
from alto_training.executor.events import Outcome
from alto_training.executor.executor import Executor
from alto_training.executor.fitting_passes import FittingPasses
from alto_training.executor.settings import Backend, ExecutorSettings
from safetensors.torch import load_file
from tiny_task import make_job, mixed_configs


class ThreadRanks:
    """`Ranks` for threads, which deal every trial to the next rank each time they are asked."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, said: list[str]) -> None:
        self.rank = rank
        self.size = size
        self.moves = 0
        self._barrier = barrier
        self._said = said

    def first(self, commands: list[Command], due: bool) -> tuple[list[Command], bool]:
        return commands, bool(self._exchange(due)[0])

    def united(self, mine: dict[str, Any]) -> dict[str, Any]:
        return {key: value for theirs in self._exchange(mine) for key, value in theirs.items()}

    def deal(self, loads: Sequence[float], owners: Sequence[int | None]) -> list[int]:
        if owners[-1:] == [None]:
            return [*(owner or 0 for owner in owners[:-1]), len(owners) % self.size]
        self.moves += len(owners)
        return [((owner or 0) + 1) % self.size for owner in owners]

    def _exchange(self, mine: Any) -> list[Any]:
        self._said[self.rank] = json.dumps(mine)
        self._barrier.wait()
        said = [json.loads(each) for each in self._said]
        self._barrier.wait()
        return said


@pytest.mark.parametrize(("size", "begins_ahead"), [(2, False), (3, False), (3, True)])
def test_a_trial_that_moves_at_every_change_ends_with_the_weights_of_one_that_stays(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, begins_ahead: bool
) -> None:
    exits = EarlyExit("asha", warmup_fraction=0.4, keep_fraction=0.5)
    task = make_job(tiny_folder, *mixed_configs(), early_exit=exits, evaluation=Evaluation(count=4))
    settings = ExecutorSettings(
        tokens_per_tick=100, backend=Backend.REFERENCE, slots=3, threads=1, checkpoint_every_ticks=2
    )
    alone = Executor(task, tmp_path / "alone", lambda event: None, settings).run()
    # As on GPUs: a pass that was begun for a trial that moves away is dropped.
    monkeypatch.setattr(FittingPasses, "_begins_ahead", begins_ahead)
    barrier, said = threading.Barrier(size, timeout=120), [""] * size
    ranks = [ThreadRanks(rank, size, barrier, said) for rank in range(size)]
    # Not in the threads: loading a model sets what is global in torch.
    backbones = [load_backbone(task.base_model) for _ in range(size)]
    outcomes: dict[int, Outcome] = {}

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        executor = Executor(
            task,
            tmp_path / "moving",
            lambda event: None,
            # One of them may tokenise at a time; each has its own cache here.
            replace(settings, cache_dir=tmp_path / f"cache-{rank}"),
            backbone=backbones[rank],
            ranks=ranks[rank],
        )
        try:
            outcomes[rank] = executor.run()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == list(range(size))
    assert ranks[0].moves > 5
    for outcome in outcomes.values():
        assert outcome == outcomes[0], "all ranks come to the same end"
    expected = {trial.trial_id: trial for trial in alone.trials}
    for trial in outcomes[0].trials:
        other = expected[trial.trial_id]
        assert (trial.state, trial.step, trial.best_step) == (other.state, other.step, other.best_step)
        if trial.adapter_path is not None:
            mine, theirs = (
                load_file(Path(folder or "") / "adapter_model.safetensors")
                for folder in (trial.adapter_path, other.adapter_path)
            )
            for name, weight in theirs.items():
                assert (mine[name] - weight).norm() <= 1e-5 * weight.norm(), (trial.trial_id, name)
