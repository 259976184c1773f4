"""What a caller may ask of a running executor. It is polled between ticks; nothing is interrupted within one."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alto_common.tuning import TuningJob


@dataclass(frozen=True)
class StopTrial:
    """End one trial; its best adapter so far is kept."""

    trial_id: str
    task_id: str | None = None
    reason: str = "stopped by its user"


@dataclass(frozen=True)
class ReviveTrial:
    """Carry on with a trial that a policy paused or stopped; no policy judges it any more."""

    trial_id: str
    task_id: str | None = None


@dataclass(frozen=True)
class Pause:
    """Write a checkpoint and let go of one task (None: of all); running again over its work folder carries on."""

    task_id: str | None = None


@dataclass(frozen=True)
class Cancel:
    """End every trial of one task (None: of all); best adapters so far are kept."""

    reason: str = "cancelled by its user"
    task_id: str | None = None


@dataclass(frozen=True)
class Join:
    """Take in another task over the same backbone, from its checkpoint in `workdir` if there is one.

    Its data should have been tokenised before: the others wait meanwhile.
    """

    job: TuningJob
    workdir: Path


Command = StopTrial | ReviveTrial | Pause | Cancel | Join


class Control(Protocol):
    """Where commands come from."""

    def poll(self) -> Command | None:
        """Return the next command, None when there is none; never waits."""
        ...


class ControlQueue:
    """A `Control` for other threads of the same process to put commands into."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """Hand a command to the executor, from any thread."""
        self._commands.put(command)

    def poll(self) -> Command | None:
        """Return the next command, None when there is none."""
        try:
            return self._commands.get_nowait()
        except queue.Empty:
            return None
