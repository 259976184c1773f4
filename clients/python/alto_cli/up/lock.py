"""One `alto up` for each home folder: a lock that the kernel lets go when its holder ends, and a note of how it is."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from alto_cli.client_file import write_private


@dataclass(frozen=True)
class ServiceStatus:
    """How one service is. `state` is starting, serving, not serving, ended, restarting or stopped."""

    name: str
    state: str
    address: str
    pid: int | None
    restarts: int
    log: str
    detail: str = ""


@dataclass(frozen=True)
class Status:
    """How all of them are. `ready` says that all have served since the start."""

    pid: int
    ready: bool
    services: tuple[ServiceStatus, ...]


class HomeLock:
    """The lock of a home folder, held as long as the services are looked after."""

    def __init__(self, home: Path) -> None:
        self._path = home / "up.lock"
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Take the lock; false when another process has it."""
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return True

    def release(self) -> None:
        """Let the lock go."""
        if self._file is not None:
            self._file.close()
            self._file = None


def holder(home: Path) -> int | None:
    """Return the process that looks after this home folder's services, None when there is none."""
    try:
        with (home / "up.lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def write_status(home: Path, status: Status) -> None:
    """Note how the services are."""
    write_private(home / "status.json", json.dumps(asdict(status)))


def read_status(home: Path) -> Status | None:
    """Return the last note, None without one."""
    try:
        data = json.loads((home / "status.json").read_text())
        return Status(data["pid"], data["ready"], tuple(ServiceStatus(**one) for one in data["services"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
