"""Strategies for several worker ranks, with real processes on the CPU: are they right, what do they send and take?

    make bench NAME=sharding ARGS="--ranks 2,4 --strategies all"
    make bench NAME=sharding ARGS="--ranks 2 --strategies sharded --engine fsdp2 --model ~/.cache/alto/models/NAME"

One search of ragged trials (exits, backfill, one that becomes NaN) runs in one process, then with each strategy and
number of ranks. `max_rel_weight_err` is the largest |ours - one process| / |one process| of a final A or B.
`adapter_bytes_communicated` is what torch.distributed sent beyond the gathers of the backbone and the fixed messages of
losses and decisions (`message_bytes`). `backbone_bytes_per_tick` are all gathers of a training pass.
`peak_rss_per_rank_ratio` compares what a rank took at most beyond the same run over a backbone of next to nothing
(anonymous memory, and the backbone's bytes where it is a mapped file) with that of strategy single; `held_ratio` is the
share of the backbone that it keeps between passes. `tokens_per_s` counts training alone; processes that share cores
make it an indication.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.events import Event, Outcome, TaskProgress
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.sharding.process_memory import anonymous_bytes
from alto_training.sharding.rank_processes import RankProcesses
from alto_training.sharding.run import RankedRun, RankSettings
from alto_training.sharding.strategy import EngineName, Strategy
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training" / "sharding"))

from tiny_task import write_model, write_rows

STRATEGIES = (Strategy.REPLICATED, Strategy.SHARDED, Strategy.HYBRID)
# Weights well above what adapters and activations take: memory per rank is about the backbone.
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
NEXT_TO_NOTHING = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 8}


@dataclass
class Watch:
    """The largest anonymous memory of each rank, sampled from outside, and the last progress that was told."""

    peak_bytes: dict[int, int] = field(default_factory=dict)
    tokens_per_s: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def take(self, event: Event) -> None:
        if isinstance(event, TaskProgress):
            self.tokens_per_s = event.tokens_per_s

    def follow(self, processes: RankProcesses) -> None:
        threading.Thread(target=self._sample, args=(processes.process_ids,), daemon=True).start()

    def _sample(self, process_ids: tuple[int, ...]) -> None:
        while not self.stop.wait(0.02):
            for rank, process_id in enumerate(process_ids):
                self.peak_bytes[rank] = max(self.peak_bytes.get(rank, 0), anonymous_bytes(process_id))


def make_task(
    folder: Path, model: str | None, trials: int, rows: int, shape: dict[str, int] | None = None
) -> TuningJob:
    """Return a search over a random model, or over one that is at hand."""
    if model is None:
        model = str(write_model(folder / "model", **(shape or SHAPE)))
    write_rows(folder / "train.jsonl", rows, seed=1)
    write_rows(folder / "validation.jsonl", 6, seed=2)
    common: dict[str, Any] = {"learning_rate": 5e-4, "adam_epsilon": 1e-3, "max_length": 48}
    configs = [
        TrialConfig(
            lora_rank=(2, 8, 4, 3)[number % 4],
            batch_size=(1, 2, 4, 3)[number % 4],
            gradient_accumulation_steps=1 + number % 2,
            lora_dropout=0.1 * (number % 3 == 2),
            seed=number,
            epochs=1 + number % 2,
            **common,
        )
        for number in range(trials - 1)
    ]
    configs.append(TrialConfig(lora_rank=2, batch_size=2, max_grad_norm=0.0, **common | {"learning_rate": 1e30}))
    return TuningJob(
        task_id="task",
        base_model=model,
        train_path=str(folder / "train.jsonl"),
        validation_path=str(folder / "validation.jsonl"),
        trials=tuple(Trial(f"trial-{number}", config) for number, config in enumerate(configs)),
        early_exit=EarlyExit("paper", warmup_fraction=0.6, keep_fraction=0.5),
        evaluation=Evaluation(count=3),
    )


def largest_error(ours: Outcome, expected: Outcome) -> float:
    """Return the largest relative error of a weight; infinite when a trial ended in another way."""
    found = {trial.trial_id: trial for trial in ours.trials}
    worst = 0.0
    for trial in expected.trials:
        other = found[trial.trial_id]
        if (trial.state, trial.step, trial.best_step) != (other.state, other.step, other.best_step):
            return float("inf")
        if trial.adapter_path is None:
            continue
        theirs, mine = (
            load_file(Path(path or "") / "adapter_model.safetensors")
            for path in (trial.adapter_path, other.adapter_path)
        )
        for name, weight in theirs.items():
            worst = max(worst, float((mine[name] - weight).norm() / weight.norm().clamp_min(1e-30)))
    return worst


def measure(task: TuningJob, folder: Path, ranks: RankSettings, settings: ExecutorSettings) -> dict[str, Any]:
    """Run the search once; return its outcome, reports, memory and speed."""
    watch = Watch()
    run = RankedRun(task, folder, watch.take, settings, None, ranks, watch=watch.follow)
    started = time.perf_counter()
    (outcome,) = run.run_all()
    seconds = time.perf_counter() - started
    watch.stop.set()
    return {"outcome": outcome, "reports": run.reports, "watch": watch, "seconds": seconds}


def peak_bytes(run: dict[str, Any]) -> int:
    """Return the most that a rank took for the backbone and all that follows from it."""
    peaks = []
    for report in run["reports"]:
        mapped = report.backbone_bytes if report.training_gather_bytes == 0 else 0
        peaks.append(run["watch"].peak_bytes[report.rank] - report.idle_memory_bytes + mapped)
    return max(peaks)


def summarise(ranks: RankSettings, ours: dict[str, Any], single: dict[str, Any], floor: int) -> dict[str, Any]:
    reports = ours["reports"]
    gathered = sum(
        one.training_passes * one.training_gather_bytes + one.inference_passes * one.inference_gather_bytes
        for one in reports
    )
    messages = sum(one.traffic_bytes.get("allgather_", 0) for one in reports)
    sent = sum(sum(one.traffic_bytes.values()) for one in reports)
    return {
        "strategy": str(ranks.strategy),
        "engine": str(ranks.engine) if ranks.strategy in (Strategy.SHARDED, Strategy.HYBRID) else None,
        "ranks": ranks.ranks,
        "max_rel_weight_err": largest_error(ours["outcome"], single["outcome"]),
        "adapter_bytes_communicated": sent - gathered - messages,
        "backbone_bytes_per_tick": reports[0].training_gather_bytes,
        "message_bytes": messages,
        "peak_rss_per_rank_ratio": round((peak_bytes(ours) - floor) / (peak_bytes(single) - single["floor"]), 3),
        "peak_rss_per_rank_mb": round((peak_bytes(ours) - floor) / 1e6),
        "held_ratio": round(reports[0].kept_bytes / reports[0].backbone_bytes, 3),
        "tokens_per_s": round(ours["watch"].tokens_per_s, 1),
        "tokens_per_s_ratio": round(ours["watch"].tokens_per_s / single["watch"].tokens_per_s, 3),
        "idle_passes": sum(one.idle_passes for one in reports),
        "moves": reports[0].moves,
        "seconds": round(ours["seconds"], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="numbers of worker ranks")
    parser.add_argument("--strategies", default="all", help="all, or some of replicated,sharded,hybrid")
    parser.add_argument("--engine", default="deepspeed", choices=["deepspeed", "fsdp2"])
    parser.add_argument("--model", help="a model folder; a random Llama of 40 million weights without it")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rows", type=int, default=12)
    asked = parser.parse_args()
    names = STRATEGIES if asked.strategies == "all" else [Strategy(name) for name in asked.strategies.split(",")]
    settings = ExecutorSettings(tokens_per_tick=96, backend=Backend.CPU, slots=6, threads=1)
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = str(Path(asked.model).expanduser()) if asked.model else None
        task = make_task(folder, model, asked.trials, asked.rows)
        single = measure(task, folder / "single", RankSettings(1, Strategy.SINGLE), settings)
        (folder / "floor").mkdir()
        nothing = make_task(folder / "floor", None, asked.trials, asked.rows, NEXT_TO_NOTHING)
        floors = {
            strategy: peak_bytes(measure(nothing, folder / "floor" / strategy, RankSettings(2, strategy), settings))
            for strategy in (Strategy.REPLICATED, Strategy.SHARDED)
        }
        single["floor"] = floors[Strategy.REPLICATED]
        for ranks in (int(number) for number in asked.ranks.split(",")):
            for strategy in names:
                if strategy is Strategy.HYBRID and (ranks < 4 or ranks % 2):
                    continue
                how = RankSettings(
                    ranks,
                    strategy,
                    EngineName(asked.engine),
                    ranks_per_host=2 if strategy is Strategy.HYBRID else None,
                    count_traffic=True,
                )
                ours = measure(task, folder / f"{strategy}-{ranks}", how, settings)
                results.append(summarise(how, ours, single, floors.get(strategy, floors[Strategy.SHARDED])))
                print(json.dumps(results[-1]), flush=True)
    import deepspeed
    import transformers

    passed = all(one["max_rel_weight_err"] <= 1e-5 and one["adapter_bytes_communicated"] == 0 for one in results)
    print(
        json.dumps(
            {
                "benchmark": "sharding",
                "passed": passed,
                "results": results,
                "model": asked.model or SHAPE,
                "trials": asked.trials,
                "device": f"cpu x{os.cpu_count()}",
                "platform": platform.platform(),
                "versions": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "deepspeed": deepspeed.__version__,
                },
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
