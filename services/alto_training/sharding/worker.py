"""What a worker rank does: the executor's loop, from exchange to exchange with the other ranks.

The process ends with status 0 when the run is over, with `REFUSED_STATUS` when the executor says why it cannot go on;
any other end is a crash.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
from alto_common.base_models import BaseModelError
from alto_common.tuning import TuningJob

from alto_training.executor.backbone import Backbone
from alto_training.executor.checkpoint import CheckpointStore, checkpoints_folder
from alto_training.executor.control import Command, ControlQueue
from alto_training.executor.data_source import DataSource
from alto_training.executor.errors import ExecutorError, OutOfMemoryError
from alto_training.executor.events import Event
from alto_training.executor.executor import Executor, job_folder
from alto_training.executor.loading import load_job_backbone, open_job_data
from alto_training.executor.passes import is_out_of_memory
from alto_training.executor.progress import peak_memory_bytes
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from alto_training.sharding.counted_passes import CountedPasses
from alto_training.sharding.errors import InputRefusedError
from alto_training.sharding.heartbeat import Heartbeats
from alto_training.sharding.loading import load_shared_backbone
from alto_training.sharding.plain_json import decode_named, encode, encode_named
from alto_training.sharding.process_memory import anonymous_bytes
from alto_training.sharding.rank_order import (
    BEATS_FILE,
    RENDEZVOUS_FILE,
    RankFailure,
    RankOrder,
    RankReport,
    failure_file,
    report_file,
)
from alto_training.sharding.rank_processes import EVENTS_VARIABLE, REFUSED_STATUS
from alto_training.sharding.sharded_backbone import ShardedWeights
from alto_training.sharding.strategy import Strategy, make_layout
from alto_training.sharding.traffic import TrafficMeter
from alto_training.sharding.worker_ranks import WorkerRanks


def run(folder: Path) -> None:
    """Run the rank that the environment names, of the order in `folder`."""
    order = RankOrder.read(folder)
    rank = int(os.environ["RANK"])
    try:
        _run(folder, order, rank)
    except (ExecutorError, BaseModelError) as error:
        if isinstance(error, ExecutorError):
            failure = RankFailure(
                type(error).__name__, error.message, error.cure, getattr(error, "tokens_per_tick", None)
            )
        else:
            failure = RankFailure(InputRefusedError.__name__, str(error), "correct it, and start again")
        failure_file(folder, rank).write_text(json.dumps(encode(failure)))
        # Without the usual clean-up: it may wait for ranks that wait for this one.
        _leave(REFUSED_STATUS)
    # All is told and written, and a thread of gloo's that lets go of a tensor while the interpreter ends aborts it.
    _leave(0)


def _leave(status: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(status)


def _run(folder: Path, order: RankOrder, rank: int) -> None:
    beats = Heartbeats(folder / BEATS_FILE, order.ranks)

    def beat() -> None:
        beats.beat(rank)

    device = torch.device(order.settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=order.collective_timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder.absolute() / RENDEZVOUS_FILE}",
        rank=rank,
        world_size=order.ranks,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    ranks = WorkerRanks(dist.new_group(backend="gloo", timeout=timeout), partial(beats.arrive, rank))
    settings = replace(order.settings, device=str(device), backend=_backend(order.settings, device))
    if order.strategy.shares_out:
        # It tries ticks of its own until memory runs out: other ranks would wait in the middle of them.
        settings = replace(settings, calibrate=False)
    idle_memory_bytes = anonymous_bytes()
    backbone = _load(replace(order, settings=settings), device, beat)
    weights = CountedPasses(backbone.weights, beat)
    backbone.weights = weights
    _check_checkpoints(order, ranks)
    with ExitStack() as stack:
        parent = _Parent(rank, stack)
        meter = stack.enter_context(TrafficMeter()) if order.count_traffic else TrafficMeter()
        outcomes = Executor(
            order.jobs[0],
            order.workdir,
            parent.tell_event,
            settings,
            parent.commands if rank == 0 else None,
            companions=order.jobs[1:],
            backbone=backbone,
            open_data=_one_after_another(ranks, lambda: beats.kept_up(rank)),
            ranks=ranks,
            before_checkpoint=parent.settle,
        ).run_all()
        if device.type == "cuda":
            # A pass that was begun and dropped may still read the weights of other ranks: none of them leaves before.
            torch.cuda.synchronize(device)
        ranks.united({})
        report_file(folder, rank).write_text(
            json.dumps(encode(_report(ranks, backbone, weights, meter, idle_memory_bytes)))
        )
        parent.tell("outcomes", [encode(outcome) for outcome in outcomes])
    dist.destroy_process_group()


def _backend(settings: ExecutorSettings, device: torch.device) -> Backend:
    """Return whose kernels to use. Not measured: all ranks must take the same, and weights may not be here to try."""
    import alto_kernels

    if settings.backend is not Backend.AUTO:
        return settings.backend
    wanted = Backend.CPU if device.type == "cpu" else Backend.CUTLASS
    dtype = torch.float32 if settings.backbone_dtype is BackboneDtype.FLOAT32 else torch.bfloat16
    return wanted if wanted in alto_kernels.backends(dtype) else Backend.REFERENCE


def _load(order: RankOrder, device: torch.device, beat: Callable[[], None]) -> Backbone:
    """Load the backbone, whole or in shares."""
    layout = make_layout(order.strategy, order.ranks, order.ranks_per_host)
    if layout.strategy in (Strategy.SINGLE, Strategy.REPLICATED):
        return load_job_backbone(order.jobs[0].base_model, order.settings)
    # Every rank takes part in making every group.
    groups = {
        first: dist.new_group(list(layout.group_of(first)), timeout=timedelta(seconds=order.collective_timeout_s))
        for first in range(0, layout.ranks, layout.shard_ranks)
    }
    group = groups[layout.group_of(dist.get_rank()).start]
    try:
        return load_shared_backbone(
            order.jobs[0].base_model,
            order.settings,
            order.engine,
            group,
            device,
            beat,
            order.room_for_weights_bytes,
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"{order.jobs[0].base_model} does not fit on {layout.shard_ranks} GPUs: {error}"
        raise OutOfMemoryError(message, "use more GPUs, or let others off these") from error


def _check_checkpoints(order: RankOrder, ranks: WorkerRanks) -> None:
    """Have rank 0 look at the checkpoints before the others do: it puts damaged ones aside."""
    if ranks.rank == 0:
        for number in range(len(order.jobs)):
            CheckpointStore(checkpoints_folder(job_folder(order.workdir, order.jobs, number))).read()
    ranks.united({})


def _one_after_another(
    ranks: WorkerRanks, kept_up: Callable[[], AbstractContextManager[None]]
) -> Callable[[TuningJob, Path], tuple[DataSource, DataSource]]:
    """Have rank 0 tokenise the datasets; the others then open what it wrote."""

    def open_data(job: TuningJob, cache_dir: Path) -> tuple[DataSource, DataSource]:
        if ranks.rank != 0:
            ranks.united({})
        with kept_up():
            opened = open_job_data(job, cache_dir)
        if ranks.rank == 0:
            ranks.united({})
        return opened

    return open_data


class _Parent:
    """Whoever watches over the ranks: rank 0 tells it of events and of the outcome, and hears commands.

    The other ranks have nothing to say.
    """

    def __init__(self, rank: int, stack: ExitStack) -> None:
        self.commands = ControlQueue()
        self._stream: TextIO | None = None
        self._settled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._settling = 0
        if rank == 0:
            self._stream = stack.enter_context(os.fdopen(int(os.environ[EVENTS_VARIABLE]), "w"))
            threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def tell(self, kind: str, value: object) -> None:
        """Tell something; whether it was heard is not waited for."""
        if self._stream is not None:
            self._stream.write(json.dumps({kind: value}) + "\n")
            self._stream.flush()

    def tell_event(self, event: Event) -> None:
        """Tell of an event."""
        if self._stream is not None:
            self.tell("event", encode_named(event))

    def settle(self) -> None:
        """Wait until all that was told has been heard."""
        if self._stream is not None:
            self._settling += 1
            self.tell("settle", self._settling)
            while self._settled.get() != self._settling:
                pass

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "settled" in message:
                self._settled.put(message["settled"])
            else:
                self.commands.put(decode_named(Command, message))


def _report(
    ranks: WorkerRanks, backbone: Backbone, passes: CountedPasses, meter: TrafficMeter, idle_memory_bytes: int
) -> RankReport:
    kept = passes.weights
    whole = backbone.parameters * torch.empty(0, dtype=backbone.dtype).element_size()
    order = kept.order if isinstance(kept, ShardedWeights) else None
    return RankReport(
        rank=ranks.rank,
        training_gather_bytes=order.gathered_bytes(training=True) if order else 0,
        inference_gather_bytes=order.gathered_bytes(training=False) if order else 0,
        kept_bytes=kept.kept_bytes if isinstance(kept, ShardedWeights) else whole,
        backbone_bytes=whole,
        memory_bytes=peak_memory_bytes(backbone),
        idle_memory_bytes=idle_memory_bytes,
        training_passes=passes.training + passes.idle_training,
        inference_passes=passes.inference + passes.idle_inference,
        idle_passes=passes.idle_training + passes.idle_inference,
        moves=ranks.moves,
        traffic_calls=dict(meter.calls),
        traffic_bytes=dict(meter.bytes),
    )
