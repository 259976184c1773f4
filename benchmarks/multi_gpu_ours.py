"""Our side of `multi_gpu.py`: the executor itself on every rank, over random weights of a shape and made-up rows."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.events import Event, Outcome, TrialProgress
from alto_training.executor.executor import Executor
from alto_training.executor.ranks import OneRank, Ranks
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from alto_training.sharding.counted_passes import CountedPasses
from alto_training.sharding.strategy import EngineName, Strategy, make_layout
from alto_training.sharding.traffic import TrafficMeter
from alto_training.sharding.worker_ranks import WorkerRanks
from benchmark_ranks import finished
from multi_gpu_shapes import LORA_RANK, TARGETS, make_config
from safetensors.torch import load_file

# Before what is timed; the first small ticks of a process are a third slower than later ones.
WARM_ROUNDS = 2
WARM_TOKENS = 24 * 1024
TIMED_TOKENS = 32 * 1024  # of a GPU, about two seconds of an 8B model
MOST_ROUNDS = 36  # of either
_DEVIATION = 0.01  # of weights: with 0.02, bf16's roundings are a tenth of the logits of 64 layers


@dataclass(frozen=True)
class World:
    """This rank among those that train together; alone when `size` is 1."""

    rank: int
    size: int
    device: torch.device
    ranks: Ranks


class TimedRanks(WorkerRanks):
    """Ranks that add up the seconds they spend telling each other things, waiting for the slower ones included."""

    seconds = 0.0

    def _exchange(self, mine: Any) -> list[Any]:
        started = perf_counter()
        said = super()._exchange(mine)
        self.seconds += perf_counter() - started
        return said


@dataclass(frozen=True)
class Row:
    input_ids: Any
    target_mask: Any


@dataclass(frozen=True)
class RandomRows:
    """A `DataSource` of random tokens; row i is `lengths[i % len(lengths)]` long."""

    rows: int
    lengths: tuple[int, ...]
    vocabulary: int
    fingerprint: str = "random"

    def __len__(self) -> int:
        return self.rows

    def example(self, index: int, max_length: int) -> Row:
        length = min(max_length, self.lengths[index % len(self.lengths)])
        ids = np.random.default_rng(index).integers(0, self.vocabulary, length).astype(np.int32)
        return Row(ids, np.arange(length) >= 1)

    def preference(self, index: int, max_length: int) -> tuple[Row, Row]:
        raise TypeError("these rows hold no preferences: the benchmark trains on completions")


class EnoughError(Exception):
    """As many rounds as were asked for are over: on every rank after the same event."""


def load(
    shape: str,
    strategy: str,
    engine: str,
    world: World,
    dtype: torch.dtype,
    ranks_per_host: int,
    prefetch: int | None = None,
) -> Any:
    """Return a backbone with random weights, whole or in shares.

    The engine `peer+13` is `peer` with room for 13 GiB of weights on each GPU, for which layers are kept whole.
    """
    from alto_training.executor.backbone import prepare_backbone
    from alto_training.sharding.loading import make_engine
    from alto_training.sharding.sharded_backbone import empty_model, shard_model
    from alto_training.sharding.weight_files import RandomWeights, fill

    model = empty_model(make_config(shape), dtype)
    layout = make_layout(Strategy(strategy), world.size, ranks_per_host)
    if layout.shard_ranks == 1:
        fill(model, {one: name for name, one in model.named_parameters()}, RandomWeights(_DEVIATION), world.device)
        backbone = prepare_backbone(model, shape, world.device)
    else:
        firsts = range(0, layout.ranks, layout.shard_ranks)
        groups = {first: dist.new_group(list(layout.group_of(first))) for first in firsts}
        name, _, room = engine.partition("+")
        cutter = make_engine(EngineName(name), groups[layout.group_of(world.rank).start], world.device)
        room_bytes = int(float(room or 0) * 2**30)
        weights = RandomWeights(_DEVIATION)
        backbone = shard_model(model, shape, weights, cutter, world.device, room_bytes=room_bytes, prefetch=prefetch)
    backbone.weights = CountedPasses(backbone.weights)
    return backbone


def run(
    world: World,
    backbone: Any,
    job: TuningJob,
    rows: tuple[RandomRows, RandomRows],
    folder: Path,
    listen: Callable[[Event], None],
    **settings: Any,
) -> Outcome:
    """Run the executor on this rank; all ranks of the world must."""
    dtype = BackboneDtype.BFLOAT16 if backbone.dtype is torch.bfloat16 else BackboneDtype.FLOAT32
    threads = max(1, (os.cpu_count() or 1) // world.size)
    how = ExecutorSettings(device=str(world.device), backbone_dtype=dtype, calibrate=False, threads=threads, **settings)
    executor = Executor(
        job, folder, listen, how, backbone=backbone, open_data=lambda job, cache: rows, ranks=world.ranks
    )
    return executor.run()


def measure(
    world: World, backbone: Any, cell: tuple[int, int, int], backend: Backend, tokens_per_tick: int
) -> dict[str, Any]:
    """Train (trials, batch, length) for some rounds; return tokens per second of the median of those after warming up.

    A round is over when the last trial's step is told of, which is after its losses were read from the device.
    """
    trials, batch, length = cell
    round_tokens = trials * batch * length
    rounds = min(MOST_ROUNDS, max(3, -(-TIMED_TOKENS * world.size // round_tokens)))
    warm = min(MOST_ROUNDS, max(WARM_ROUNDS, WARM_TOKENS // round_tokens))
    steps, exchanged = 0, [0.0, 0.0]
    moments: list[float] = []

    def listen(event: Event) -> None:
        nonlocal steps
        if not isinstance(event, TrialProgress):
            return
        steps += 1
        if steps == warm * trials:
            exchanged[0] = getattr(world.ranks, "seconds", 0.0)
        if steps >= warm * trials and steps % trials == 0:
            moments.append(perf_counter())
        if steps == (warm + rounds) * trials:
            exchanged[1] = getattr(world.ranks, "seconds", 0.0)
            raise EnoughError

    config = TrialConfig(
        lora_rank=LORA_RANK, target_modules=TARGETS, batch_size=batch, max_steps=10_000, max_length=length
    )
    job = make_job([config] * trials, Evaluation(count=1))
    vocabulary = vocabulary_of(backbone)
    rows = RandomRows(256, (length,), vocabulary), RandomRows(1, (length,), vocabulary)
    sizes: dict[str, Any] = {"slots": trials, "tokens_per_tick": tokens_per_tick}
    with suppress(EnoughError):
        folder = shared_folder(world)
        run(world, backbone, job, rows, folder, listen, backend=backend, checkpoint_interval_s=1e9, **sizes)
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)  # a pass that was begun may still read other ranks' weights
        torch.cuda.empty_cache()
    seconds = moments[-1] - moments[0]
    shares = world.ranks.united({str(world.rank): round((exchanged[1] - exchanged[0]) / seconds, 4)})
    round_s = [round(after - before, 4) for before, after in pairwise(moments)]
    return {
        "rounds": rounds,
        "tokens_per_s": round(round_tokens / median(round_s), 1),
        "mean_tokens_per_s": round(round_tokens * rounds / seconds, 1),
        "round_s": round_s,
        "exchange_shares": list(shares.values()),
    }


def count_traffic(world: World, backbone: Any, backend: Backend) -> dict[str, int]:
    """Train a small search under a meter; return the bytes of a training pass, and what was sent beyond gathers."""
    before = _passes(backbone)
    config = TrialConfig(lora_rank=LORA_RANK, target_modules=TARGETS, batch_size=1, max_steps=2, max_length=64)
    rows = RandomRows(8, (64,), vocabulary_of(backbone)), RandomRows(1, (64,), 64)
    shared = shared_folder(world)
    with TrafficMeter() as meter:
        job = make_job([config] * world.size, Evaluation(count=1))
        run(world, backbone, job, rows, shared, lambda event: None, backend=backend, tokens_per_tick=64)
    order = getattr(backbone.weights.weights, "order", None)
    training, inference = (now - then for now, then in zip(_passes(backbone), before, strict=True))
    per_tick = order.gathered_bytes(training=True) if order else 0
    gathered = training * per_tick + inference * (order.gathered_bytes(training=False) if order else 0)
    messages = meter.bytes.pop("allgather_", 0)
    sent = sum(meter.bytes.values())
    # Copies between GPUs are no collectives: the meter does not see them.
    collectives = sent if order is None or sent else gathered
    return {"bytes_per_tick": per_tick, "adapter_bytes": collectives - gathered, "message_bytes": messages}


def gather_seconds(world: World, backbone: Any) -> float:
    """Return how long all gathers of a training pass take with nothing else to do."""
    order = getattr(backbone.weights.weights, "order", None)
    if order is None:
        return 0.0
    order.walk(True)
    world.ranks.united({})
    started = finished(world.device)
    for _ in range(3):
        order.walk(True)
    return round((finished(world.device) - started) / 3, 5)


# Parity


def parity_job() -> tuple[TuningJob, tuple[RandomRows, RandomRows]]:
    """Return ragged trials with exits, backfill, dropout and one that becomes NaN, over ragged rows."""
    common: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_length": 96, "epochs": 2}
    configs = [
        TrialConfig(
            lora_rank=(4, 16, 8, 32)[number % 4],
            batch_size=(1, 2, 4, 3)[number % 4],
            gradient_accumulation_steps=1 + number % 2,
            lora_dropout=0.1 * (number % 3 == 2),
            seed=number,
            **common,
        )
        for number in range(7)
    ]
    configs.append(TrialConfig(lora_rank=4, batch_size=2, max_grad_norm=0.0, **common | {"learning_rate": 1e30}))
    job = make_job(configs, Evaluation(count=3), EarlyExit("paper", warmup_fraction=0.6, keep_fraction=0.5))
    return job, (RandomRows(16, (12, 80, 33, 96, 20), 4096), RandomRows(6, (40, 17), 4096))


def curves_and_weights(
    world: World, backbone: Any, backend: Backend, tokens_per_tick: int
) -> tuple[dict[str, float], dict[str, dict[str, torch.Tensor]], list[tuple[str, str, int]]]:
    """Run the parity search; return losses by trial and step, final weights by trial, and how each trial ended."""
    losses: dict[str, float] = {}

    def listen(event: Event) -> None:
        if isinstance(event, TrialProgress):
            losses[f"{event.trial_id}/{event.step}"] = event.train_loss

    job, rows = parity_job()
    folder = shared_folder(world)
    outcome = run(world, backbone, job, rows, folder, listen, backend=backend, slots=5, tokens_per_tick=tokens_per_tick)
    weights = {
        one.trial_id: load_file(Path(one.adapter_path) / "adapter_model.safetensors")
        for one in outcome.trials
        if one.adapter_path is not None
    }
    return losses, weights, [(one.trial_id, str(one.state), one.step) for one in outcome.trials]


def largest_weight_error(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> float:
    """Return the largest |ours - theirs| / |theirs| of a final A or B."""
    if set(ours) != set(theirs):
        return float("inf")
    return max(
        float((ours[trial][name] - weight).norm() / weight.norm().clamp_min(1e-30))
        for trial, weights in theirs.items()
        for name, weight in weights.items()
    )


def largest_loss_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Return the largest relative difference of a training loss, of steps that both took and that are finite."""
    common = [key for key in theirs if key in ours and np.isfinite(theirs[key]) and np.isfinite(ours[key])]
    return max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for key in common)


def make_job(configs: list[TrialConfig], evaluation: Evaluation, exits: EarlyExit | None = None) -> TuningJob:
    return TuningJob(
        task_id="task",
        base_model="",
        train_path="",
        validation_path="",
        trials=tuple(Trial(f"trial-{number}", config) for number, config in enumerate(configs)),
        early_exit=exits or EarlyExit("none"),
        evaluation=evaluation,
    )


def vocabulary_of(backbone: Any) -> int:
    return int(backbone.decoder.config.vocab_size)


def alone(device: torch.device) -> World:
    return World(0, 1, device, OneRank())


def together(device: torch.device, group: dist.ProcessGroup) -> World:
    return World(dist.get_rank(), dist.get_world_size(), device, TimedRanks(group))


def _passes(backbone: Any) -> tuple[int, int]:
    counted = backbone.weights
    return counted.training + counted.idle_training, counted.inference + counted.idle_inference


def shared_folder(world: World) -> Path:
    """Return a new folder of rank 0's that all ranks of the world know."""
    made = tempfile.mkdtemp(prefix="multi-gpu-") if world.rank == 0 else ""
    told = world.ranks.united({"folder": made} if world.rank == 0 else {})
    return Path(told["folder"])
