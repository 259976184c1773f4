"""Training on several worker ranks, as one call: what `Executor` does in this process, on processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from alto_common.tuning import TuningJob

from alto_training.executor import errors as executor_errors
from alto_training.executor.control import Command, Control, ReviveTrial
from alto_training.executor.errors import ExecutorError, OutOfMemoryError, TickOutOfMemoryError
from alto_training.executor.events import Event, Outcome, TaskStarted, TickHalved
from alto_training.executor.settings import ExecutorSettings
from alto_training.sharding import errors as sharding_errors
from alto_training.sharding.errors import RankFailedError
from alto_training.sharding.plain_json import decode, decode_named, encode_named
from alto_training.sharding.rank_order import RankFailure, RankOrder, RankReport, report_file
from alto_training.sharding.rank_processes import RankProcesses, RankTrouble
from alto_training.sharding.strategy import EngineName, Strategy

_POLL_S = 0.05

log = structlog.get_logger("alto.ranks")


@dataclass(frozen=True)
class RankSettings:
    """How many worker ranks, how the backbone lies on them, and how patient to be.

    Without an `engine` ranks take the best that there is. `ranks_per_host` None means that all are on one host. Of a
    sharded backbone layers are kept whole as far as a rank has `room_for_weights_bytes` for all its weights. A rank
    that dies or hangs ends the attempt; the next begins from the last checkpoint. After `attempts_without_progress` in
    a row with no new checkpoint the run is given up; when the same rank was at fault twice in a row and `may_shrink`,
    the next attempt goes without its device. Every rank inherits the descriptors `keep_open`.
    """

    ranks: int
    strategy: Strategy
    engine: EngineName | None = None
    ranks_per_host: int | None = None
    room_for_weights_bytes: int = 0
    hang_timeout_s: float = 300.0
    start_timeout_s: float = 1800.0
    attempts_without_progress: int = 3
    may_shrink: bool = True
    count_traffic: bool = False
    keep_open: tuple[int, ...] = ()


@dataclass
class _Attempts:
    """What has gone wrong so far."""

    places: list[int]
    since_progress: int = 0
    last_place: int | None = None
    checkpoint: str = ""
    troubles: list[str] = field(default_factory=list)


class RankedRun:
    """Trains a job (and `companions` over the same backbone) on several ranks. `run_all` is like `Executor.run_all`.

    `events` is called on the caller's thread; after a restart, events since the last checkpoint are told again.
    `watch` is called with the processes of each attempt when they have started. `reports` are the last attempt's.
    """

    def __init__(
        self,
        job: TuningJob,
        workdir: Path,
        events: Callable[[Event], None],
        settings: ExecutorSettings,
        control: Control | None,
        ranks: RankSettings,
        *,
        companions: Sequence[TuningJob] = (),
        watch: Callable[[RankProcesses], None] = lambda processes: None,
    ) -> None:
        self._jobs = (job, *companions)
        self._workdir = workdir
        self._emit = events
        self._settings = settings
        self._control = control
        self._ranks = ranks
        self._watch = watch
        self._attempts = _Attempts(list(range(ranks.ranks)))
        self._commands: list[Command] = []  # an attempt may fail before it obeys, or before it keeps that it did
        self._tokens_per_tick = settings.tokens_per_tick
        self._room_for_weights_bytes = ranks.room_for_weights_bytes
        self.reports: list[RankReport] = []

    def run_all(self) -> list[Outcome]:
        """Train until every trial has ended, or until paused or cancelled; return an outcome for each job.

        Raises the `ExecutorError` that a rank gave up with, and `RankFailedError` when ranks keep failing.
        """
        number = 0
        while True:
            number += 1
            folder = self._workdir / "ranks" / f"attempt-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._attempts.checkpoint = self._newest_checkpoint()
            answer = self._attempt(folder)
            if not isinstance(answer, RankTrouble):
                self.reports = [
                    decode(RankReport, json.loads(report_file(folder, rank).read_text()))
                    for rank in range(len(self._attempts.places))
                ]
                return answer
            self._consider(answer)

    def _attempt(self, folder: Path) -> list[Outcome] | RankTrouble:
        processes = RankProcesses(
            self._order(),
            folder,
            self._attempts.places,
            self._ranks.hang_timeout_s,
            self._ranks.start_timeout_s,
            self._ranks.keep_open,
        )
        outcomes: list[Outcome] | None = None
        try:
            self._watch(processes)
            for earlier in self._commands:
                processes.send(encode_named(earlier))
            while True:
                if self._control is not None and (command := self._control.poll()) is not None:
                    if not isinstance(command, ReviveTrial):  # twice would undo what came after it
                        self._commands.append(command)
                    processes.send(encode_named(command))
                    continue
                # Asked before the messages are read: what was told before the end is not lost.
                over, trouble = processes.finished, processes.trouble()
                for message in processes.messages():
                    outcomes = self._take(message, processes) or outcomes
                if over and outcomes is not None:
                    return outcomes
                if trouble is not None:
                    return trouble
                if over:
                    return RankTrouble(0, "ended without an outcome")
                time.sleep(_POLL_S)
        finally:
            processes.end()

    def _take(self, message: dict[str, Any], processes: RankProcesses) -> list[Outcome] | None:
        if "outcomes" in message:
            return [decode(Outcome, outcome) for outcome in message["outcomes"]]
        if "settle" in message:
            # What was told before has gone on to whoever keeps it: it may be in a checkpoint now.
            processes.send({"settled": message["settle"]})
            return None
        event: Event = decode_named(Event, message["event"])
        if isinstance(event, TaskStarted):
            self._tokens_per_tick = event.tokens_per_tick
        self._emit(event)
        return None

    def _order(self) -> RankOrder:
        ranks = len(self._attempts.places)
        asked = self._ranks
        # With a rank lost, groups of equally many may not come out: one group of all always does.
        whole_hosts = asked.ranks_per_host is not None and ranks % asked.ranks_per_host == 0
        strategy = asked.strategy
        if strategy is Strategy.HYBRID and not whole_hosts:
            strategy = Strategy.SHARDED
        return RankOrder(
            jobs=self._jobs,
            workdir=self._workdir,
            settings=replace(self._settings, tokens_per_tick=self._tokens_per_tick),
            strategy=Strategy.SINGLE if ranks == 1 else strategy,
            engine=asked.engine,
            ranks=ranks,
            ranks_per_host=asked.ranks_per_host if asked.ranks_per_host and whole_hosts else ranks,
            parent_process_id=os.getpid(),
            room_for_weights_bytes=self._room_for_weights_bytes if ranks > 1 else 0,
            count_traffic=asked.count_traffic,
        )

    def _consider(self, trouble: RankTrouble) -> None:
        """Make ready for another attempt, or raise."""
        attempts = self._attempts
        place = attempts.places[trouble.rank]
        if trouble.failure is not None:
            if trouble.failure.kind not in (TickOutOfMemoryError.__name__, OutOfMemoryError.__name__):
                raise _error(trouble.failure)
            self._save_memory(trouble.failure)
            return
        attempts.troubles.append(f"worker rank {trouble.rank} (device {place}) {trouble.what}")
        log.warning("a worker rank failed; starting again from the last checkpoint", trouble=attempts.troubles[-1])
        progress = self._newest_checkpoint() != attempts.checkpoint
        attempts.since_progress = 1 if progress else attempts.since_progress + 1
        again, attempts.last_place = attempts.last_place == place and not progress, place
        if attempts.since_progress >= self._ranks.attempts_without_progress:
            raise RankFailedError(
                f"{attempts.troubles[-1]} (attempt {attempts.since_progress} without a new checkpoint)",
                "look at its log and its device; running again goes on from the last checkpoint",
            )
        if self._room_for_weights_bytes and attempts.since_progress > 1:
            self._keep_no_layer_whole("ranks failed twice in a row")  # as they do where the system ends them for memory
        elif again and self._ranks.may_shrink and len(attempts.places) > 1:
            attempts.places.remove(place)
            log.warning("going on without its device", device=place, ranks=len(attempts.places))

    def _save_memory(self, failure: RankFailure) -> None:
        """Keep no layer whole, or halve the ticks, or raise."""
        if self._room_for_weights_bytes and len(self._attempts.places) > 1:
            self._keep_no_layer_whole("memory ran out")
            return
        if failure.kind != TickOutOfMemoryError.__name__:
            raise _error(failure)
        # Before the run has begun only the ranks know what they chose.
        before = self._tokens_per_tick or failure.tokens_per_tick
        if before is None or before < 2:
            raise OutOfMemoryError(failure.message, failure.cure)
        self._tokens_per_tick = before // 2
        for job in self._jobs:
            self._emit(TickHalved(job.task_id, before, self._tokens_per_tick))

    def _keep_no_layer_whole(self, why: str) -> None:
        log.warning("from here on no layer is kept whole", why=why)
        self._room_for_weights_bytes = 0
        # As many as there is room for now; a checkpoint may still say fewer.
        self._tokens_per_tick = self._settings.tokens_per_tick

    def _newest_checkpoint(self) -> str:
        return max((path.name for path in (self._workdir / "checkpoints").glob("manifest-*.json")), default="")


def _error(failure: RankFailure) -> ExecutorError:
    kinds = {**vars(executor_errors), **vars(sharding_errors)}
    kind: type[ExecutorError] = kinds.get(failure.kind, ExecutorError)
    return kind(failure.message, failure.cure)
