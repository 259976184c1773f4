"""The processes of the worker ranks of one attempt: started together, watched, and ended together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from alto_training.sharding.heartbeat import Heartbeats
from alto_training.sharding.plain_json import decode
from alto_training.sharding.rank_order import BEATS_FILE, RankFailure, RankOrder, failure_file

REFUSED_STATUS = 3
EVENTS_VARIABLE = "ALTO_EVENTS_FD"
_LOG_TAIL_BYTES = 2000
_OTHERS_FOLLOW_S = 0.5
_STUCK_STATES = "TtDZ"  # stopped, traced, waiting for a device, dead


@dataclass(frozen=True)
class RankTrouble:
    """Why an attempt cannot go on: the rank at fault, what became of it, and what it said if it gave up by itself."""

    rank: int
    what: str
    failure: RankFailure | None = None


class RankProcesses:
    """One process for each rank of `order`, whose folder is `folder`; `places` are their device numbers.

    All inherit the descriptors `keep_open`.

    A rank is taken to hang when no rank has shown a sign of life for `hang_timeout_s` (or has not begun within
    `start_timeout_s`): then it is the one that is behind all others.
    """

    def __init__(
        self,
        order: RankOrder,
        folder: Path,
        places: Sequence[int],
        hang_timeout_s: float,
        start_timeout_s: float,
        keep_open: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        order.write(folder)
        self._folder = folder
        self._beats = Heartbeats(folder / BEATS_FILE, order.ranks)
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = start_timeout_s
        self._keep_open = tuple(keep_open)
        self._clock = clock
        self._seen = self._beats.read()
        self._alive_at = clock()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._events = reading
        self._unread = b""
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, place in enumerate(places):
            with (folder / f"rank-{rank}.log").open("ab") as log:
                self._processes.append(self._start(order, rank, place, writing, log))
        os.close(writing)

    def _start(self, order: RankOrder, rank: int, place: int, events: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "alto_training.sharding.rank", str(self._folder)],
            stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(order, rank, place) | ({EVENTS_VARIABLE: str(events)} if rank == 0 else {}),
            pass_fds=(*self._keep_open, events) if rank == 0 else self._keep_open,
            # A Ctrl-C at the terminal is for whoever watches over them.
            start_new_session=True,
        )

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The process of each rank."""
        return tuple(process.pid for process in self._processes)

    @property
    def finished(self) -> bool:
        """Whether all ranks have ended well."""
        return all(process.poll() == 0 for process in self._processes)

    def messages(self) -> list[dict[str, Any]]:
        """Return what rank 0 has told since this was last asked; never waits."""
        with suppress(BlockingIOError):
            while more := os.read(self._events, 1 << 16):
                self._unread += more
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, command: dict[str, Any]) -> None:
        """Pass a command on to rank 0."""
        stream = self._processes[0].stdin
        assert stream is not None
        with suppress(BrokenPipeError):
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()

    def trouble(self) -> RankTrouble | None:
        """Return what is wrong, None as long as nothing is."""
        if any(process.poll() not in (None, 0) for process in self._processes):
            # The others follow it when their connections break; who went first is told by how each ended.
            time.sleep(_OTHERS_FOLLOW_S)
            ended = [(rank, process.poll()) for rank, process in enumerate(self._processes) if process.poll()]
            rank, status = min(ended, key=lambda end: (end[1] != REFUSED_STATUS, (end[1] or 0) > 0, end[0]))
            return RankTrouble(rank, f"ended with status {status}: {self._log_tail(rank)}", self._failure(rank))
        beats = self._beats.read()
        if beats != self._seen:
            self._seen, self._alive_at = beats, self._clock()
        silent_s = self._clock() - self._alive_at
        if silent_s > (self._hang_timeout_s if all(beats) else self._start_timeout_s):
            rank = self._furthest_behind(beats)
            return RankTrouble(rank, f"has shown no sign of life for {silent_s:.0f} s: {self._log_tail(rank)}")
        return None

    def _furthest_behind(self, beats: tuple[int, ...]) -> int:
        """Return the rank that others wait for; of several equally far, one that the system says is not runnable."""
        behind = [rank for rank, count in enumerate(beats) if count == min(beats)]
        stuck = [rank for rank in behind if _state(self._processes[rank].pid) in _STUCK_STATES]
        return (stuck or behind)[0]

    def end(self) -> None:
        """End all processes at once, and wait until they are gone."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        os.close(self._events)

    def _failure(self, rank: int) -> RankFailure | None:
        path = failure_file(self._folder, rank)
        return decode(RankFailure, json.loads(path.read_text())) if path.exists() else None

    def _log_tail(self, rank: int) -> str:
        with (self._folder / f"rank-{rank}.log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "its log is empty"


def _state(process_id: int) -> str:
    """Return the system's letter for what a process does, such as S (it sleeps); empty where that is not told."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[0]


def _environment(order: RankOrder, rank: int, place: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(order.ranks),
        "LOCAL_RANK": str(place),
        # DeepSpeed compiles an extension with ninja, which lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
    }
    if order.settings.device == "cpu":
        threads = order.settings.threads or max(1, (os.cpu_count() or 1) // order.ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        # Gathered weights go back to the system when they are let go of, not into the allocator's pockets.
        environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 20))
    return environment
