"""How well placement predicts how long searches take, from ticks that are really measured.

    make bench NAME=durations
    make bench NAME=durations ARGS="--searches 6 --cpu-time"

Searches of different shapes (trials, ranks, batch sizes, steps) run in the real executor, one after another, over one
small random Llama on this CPU, and every tick is kept. Then the service's own forecasts follow them:

error       each search is profiled for 50 ticks, by a model that has seen the searches before it; `error` is that of
            the time that was then left. `error_total` counts the 50 ticks in; `error_before` is that of the whole
            search before its first tick.
noise       with --twice, `identical_runs_differ` is how far the time left after 50 ticks lies apart in two runs of one
            search: no prediction can be closer than the machine is to itself.
coverage    many tasks, RESAMPLED from those ticks: each takes blocks of consecutive ticks of one real search, so that
            what was slow together stays together. Half of them exit early: their shares are DRAWN from a distribution
            of each tenant and shape. `coverage` is the part whose duration lay in the 90 % interval predicted before
            its first tick, after `--warm-up` tasks.

The coverage of the whole is meant to lie between 0.88 and 0.92, the mean error at 0.05 or less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_placement.durations import Hardware, Measured
from alto_placement.forecasts import Forecasts
from alto_placement.state import AssignmentRow, Moment, Outcome, Progress, TaskRow, WorkSize

VOCABULARY = 512
PROFILED = 50
BLOCK = 25
HEARD_EVERY = 10  # ticks: a node speaks every few seconds
MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Example:
    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class Rows:
    """Random tokens; half of the rows are longer than 60, one in twenty longer than 140."""

    def __init__(self, rows: int, seed: int) -> None:
        draws = np.random.default_rng(seed)
        lengths = np.clip(np.exp(draws.normal(np.log(60), 0.5, rows)), 16, 250).astype(int)
        self.lengths = lengths
        self._rows = [draws.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
        self.fingerprint = hashlib.sha256(b"".join(row.tobytes() for row in self._rows)).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, max_length: int) -> Example:
        ids = self._rows[index][:max_length]
        return Example(ids, np.arange(len(ids)) >= int(0.45 * len(ids)))

    def preference(self, index: int, max_length: int) -> tuple[Example, Example]:
        raise TypeError("these rows hold no preferences")


TRAIN, VALIDATION = Rows(400, 1), Rows(32, 2)


@dataclass(frozen=True)
class Search:
    """A search that was run: its size as admission would tell it, and where it stood after each tick."""

    size: WorkSize
    progress: tuple[Progress, ...]

    @property
    def seconds(self) -> float:
        return self.progress[-1].measured.seconds


def search_job(draw: random.Random, number: int) -> TuningJob:
    trials, steps = draw.choice((1, 2, 4, 8, 12)), draw.choice((80, 120, 160))
    configs = [
        TrialConfig(
            lora_rank=draw.choice((4, 8, 16, 32, 64)),
            learning_rate=1e-4,
            batch_size=draw.choice((1, 2, 4)),
            max_steps=draw.choice((steps, steps, steps // 2)),
            max_length=256,
            seed=seed,
        )
        for seed in range(trials)
    ]
    return TuningJob(
        f"search-{number}",
        "random-llama",
        "train",
        "validation",
        tuple(Trial(f"trial-{i}", config) for i, config in enumerate(configs)),
        early_exit=EarlyExit("none"),
        evaluation=Evaluation(count=4, max_examples=8),
    )


def size_of(job: TuningJob) -> WorkSize:
    """Return the size that admission tells placement: tokens by the rows' mean length."""
    configs = [trial.config for trial in job.trials]
    mean = float(TRAIN.lengths.mean())
    samples = sum(config.total_samples(len(TRAIN)) for config in configs)
    evaluated = job.evaluation.count * 8 * float(VALIDATION.lengths.mean())
    return WorkSize(
        train_tokens=round(samples * mean),
        evaluation_tokens=round(evaluated * len(configs)),
        steps=sum(config.total_steps(len(TRAIN)) for config in configs),
        total_lora_rank=sum(config.lora_rank for config in configs),
        base_parameters=2_000_000,
        trials=len(configs),
        longest_steps=max(config.total_steps(len(TRAIN)) for config in configs),
        shape="none",
    )


def run_searches(arguments: argparse.Namespace) -> list[Search]:
    import torch
    from alto_training.executor.backbone import prepare_backbone
    from alto_training.executor.events import Event, TaskProgress
    from alto_training.executor.executor import Executor
    from alto_training.executor.settings import Backend, ExecutorSettings
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **MODEL)
    backbone = prepare_backbone(LlamaForCausalLM(config), "random-llama", torch.device("cpu"))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    draw = random.Random(arguments.seed)
    searches = []
    for number in range(arguments.searches):
        job = search_job(draw, number)
        told: list[Progress] = []

        def note(event: Event, told: list[Progress] = told) -> None:
            if isinstance(event, TaskProgress):
                told.append(_progress(event))

        settings = ExecutorSettings(
            backend=Backend.REFERENCE,
            tokens_per_tick=1024,
            checkpoint_interval_s=10.0,
            progress_interval_s=0.0,
            threads=arguments.threads,
        )
        with tempfile.TemporaryDirectory() as folder:
            Executor(
                job,
                Path(folder),
                note,
                settings,
                backbone=backbone,
                clock=clock,
                open_data=lambda job, cache: (TRAIN, VALIDATION),
            ).run()
        searches.append(Search(size_of(job), tuple(told)))
        last = told[-1].measured
        print(
            f"search {number}: {len(job.trials)} trials, {last.ticks:.0f} ticks, {last.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return searches


def _progress(event: Any) -> Progress:
    measured = event.measured
    return Progress(
        event.fraction_done,
        0.0,
        Measured(
            measured.ticks,
            measured.train_tokens,
            measured.lora_rank_ticks,
            measured.training_seconds,
            measured.evaluation_tokens,
            measured.evaluation_seconds,
            measured.checkpoints,
            measured.checkpoint_seconds,
        ),
        measured.share_trained,
        measured.longest_steps_left,
    )


class Follower:
    """Placement's forecasts, told of one run after another."""

    def __init__(self) -> None:
        self.forecasts = Forecasts()
        self._count = 0

    def begin(self, size: WorkSize, tenant: str = "ada") -> tuple[TaskRow, AssignmentRow]:
        self._count += 1
        name = f"task-{self._count}"
        task = TaskRow(name, tenant, b"", "random-llama", 1, "cpu", size, 0.0, attempts=1)
        row = AssignmentRow(f"assignment-{self._count}", name, 1, "node", "start", (0,), 0.0)
        self.forecasts.begun(task, row, "cpu")
        return task, row

    def hear(self, task: TaskRow, row: AssignmentRow, progress: Progress) -> None:
        self.forecasts.heard(task, row, "cpu", progress, Moment(0.0, progress.measured.seconds))

    def end(self, task: TaskRow, row: AssignmentRow) -> None:
        self.forecasts.ended(task, replace(row, outcome=Outcome.COMPLETED), "cpu")

    def whole_s(self, task: TaskRow) -> tuple[float, float, float]:
        """Return expectation and interval of the work alone: these runs have no start."""
        predicted = self.forecasts.whole(task, "cpu")
        start_s = self.forecasts.model.model(Hardware(task.base_model, "cpu", 1)).start_s
        return predicted.expected_s - start_s, predicted.low_s - start_s, predicted.high_s - start_s


def errors(searches: list[Search]) -> dict[str, Any]:
    follower = Follower()
    rest_errors, total_errors, before_errors = [], [], []
    for number, search in enumerate(searches):
        task, row = follower.begin(search.size)
        if number:
            before_errors.append(abs(follower.whole_s(task)[0] / search.seconds - 1.0))
        heard_s = 0.0
        for tick, progress in enumerate(search.progress, start=1):
            if tick % HEARD_EVERY == 0 or progress is search.progress[-1]:
                follower.hear(task, row, progress)
            if tick == PROFILED and len(search.progress) >= 1.5 * PROFILED:
                heard_s = progress.measured.seconds
                outlook = follower.forecasts.outlook(task, row, "cpu", progress, Moment(0.0, heard_s))
                left = outlook.left_at(heard_s).expected_s
                rest_errors.append(abs(left / (search.seconds - heard_s) - 1.0))
                total_errors.append(abs((heard_s + left) / search.seconds - 1.0))
        follower.end(task, row)
    return {
        "error_mean": statistics.fmean(rest_errors),
        "error_max": max(rest_errors),
        "error_total_mean": statistics.fmean(total_errors),
        "error_before_mean": statistics.fmean(before_errors),
        "runs": len(rest_errors),
    }


def noise(searches: list[Search], again: list[Search]) -> float:
    """Return the mean relative difference of what is left after the profiled ticks between runs of the same search."""
    found = []
    for one, other in zip(searches, again, strict=True):
        if len(one.progress) >= 1.5 * PROFILED:
            rests = [search.seconds - search.progress[PROFILED - 1].measured.seconds for search in (one, other)]
            found.append(abs(rests[0] - rests[1]) / statistics.fmean(rests))
    return statistics.fmean(found)


def differences(search: Search) -> list[Measured]:
    before = Measured()
    ticks = []
    for progress in search.progress:
        done = progress.measured.since(before)
        before = progress.measured
        if done.ticks > 0:
            ticks.append(done)
    return ticks


def added(ticks: list[Measured]) -> Measured:
    names = Measured.__dataclass_fields__
    return Measured(**{name: sum(getattr(tick, name) for tick in ticks) for name in names})


def resampled(draw: random.Random, ticks: list[Measured], count: int) -> list[Measured]:
    """Return `count` ticks in blocks of consecutive ones."""
    found: list[Measured] = []
    while len(found) < count:
        start = draw.randrange(max(1, len(ticks) - BLOCK))
        found.extend(ticks[start : start + BLOCK])
    return found[:count]


def coverage(searches: list[Search], arguments: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(arguments.seed + 1)
    runs = [differences(search) for search in searches]
    follower = Follower()
    hits: dict[str, list[bool]] = {"none": [], "exits": []}
    shapes = {f"tenant-{i}": (draw.uniform(2, 8), draw.uniform(3, 12)) for i in range(3)}
    for number in range(arguments.warm_up + arguments.tasks):
        full = resampled(draw, draw.choice(runs), draw.randrange(60, 600))
        total = added(full)
        tenant = draw.choice(sorted(shapes))
        exits = number % 2 == 1
        share = draw.betavariate(*shapes[tenant]) if exits else 1.0
        done = full[: max(25, round(share * len(full)))]
        size = WorkSize(
            train_tokens=round(total.train_tokens),
            evaluation_tokens=round(total.evaluation_tokens),
            steps=len(full),
            total_lora_rank=round(total.lora_rank_ticks / len(full)),
            base_parameters=2_000_000,
            expected_share=0.4 if exits else 1.0,
            trials=1,
            longest_steps=len(full),
            shape="exits" if exits else "none",
        )
        task, row = follower.begin(size, tenant)
        _, low_s, high_s = follower.whole_s(task)
        so_far: list[Measured] = []
        for start in range(0, len(done), HEARD_EVERY):
            so_far += done[start : start + HEARD_EVERY]
            heard = added(so_far)
            follower.hear(task, row, Progress(len(so_far) / len(full), 0.0, heard, len(so_far) / len(full)))
        follower.end(task, row)
        if number >= arguments.warm_up:
            hits[size.shape].append(low_s <= added(done).seconds <= high_s)
    both = hits["none"] + hits["exits"]
    return {
        "coverage": statistics.fmean(both),
        "coverage_without_exits": statistics.fmean(hits["none"]),
        "coverage_with_exits": statistics.fmean(hits["exits"]),
        "tasks_resampled": len(both),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a machine that is busy")
    parser.add_argument("--twice", action="store_true", help="how far is the machine from itself?")
    arguments = parser.parse_args()

    import torch

    searches = run_searches(arguments)
    result = {
        **errors(searches),
        **coverage(searches, arguments),
        **({"identical_runs_differ": noise(searches, run_searches(arguments))} if arguments.twice else {}),
        "ticks": sum(len(search.progress) for search in searches),
        "profiled_ticks": PROFILED,
        "threads": arguments.threads,
        "seconds": "processor" if arguments.cpu_time else "wall",
        "model": MODEL,
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
