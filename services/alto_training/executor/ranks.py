"""Several worker ranks in one run: what they say to each other, and which of them owns which trial.

Every rank runs the same loop over all trials and comes to the same decisions in the same order, from numbers that all
of them have. The passes, the optimiser steps and the files of a trial are its owner's alone; on other ranks its adapter
is shapes without content (torch's meta device), and its steps change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from alto_training.executor.checkpoint import CheckpointStore, TensorGroup
from alto_training.executor.control import Command
from alto_training.executor.trial_run import TrialRun

T = TypeVar("T")


class Ranks(Protocol):
    """What worker ranks say to each other. Each call is made by all ranks, in the same order; values are plain JSON."""

    rank: int
    size: int

    def first(self, commands: list[Command], due: bool) -> tuple[list[Command], bool]:
        """Return what rank 0 has: its commands, and whether a checkpoint is due by its clock."""
        ...

    def united(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Return what all ranks have, together; no two have the same key."""
        ...

    def deal(self, loads: Sequence[float], owners: Sequence[int | None]) -> list[int]:
        """Return a rank for each trial, given its load in tokens and the rank that owns it now."""
        ...


class OneRank:
    """All by itself."""

    rank = 0
    size = 1

    def first(self, commands: list[Command], due: bool) -> tuple[list[Command], bool]:
        """See `Ranks.first`."""
        return commands, due

    def united(self, mine: dict[str, Any]) -> dict[str, Any]:
        """See `Ranks.united`."""
        return mine

    def deal(self, loads: Sequence[float], owners: Sequence[int | None]) -> list[int]:
        """See `Ranks.deal`."""
        return [0] * len(loads)


class Ownership:
    """Which rank owns which trial. A trial that changes its rank takes its exact state along, as checkpoint files."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._owners: WeakKeyDictionary[TrialRun, int] = WeakKeyDictionary()

    def owns(self, run: TrialRun) -> bool:
        """Whether this rank has the trial's weights."""
        return self._owners[run] == self._ranks.rank

    def of_owner(self, run: TrialRun, do: Callable[[], T]) -> T:
        """Return what `do` (its answer is plain JSON) gives on the rank that owns the trial."""
        answer: T = self._ranks.united({"answer": do()} if self.owns(run) else {})["answer"]
        return answer

    def admit(self, run: TrialRun, load: float, others: Mapping[TrialRun, float]) -> None:
        """Give an owner to a trial whose state all ranks have; the others let go of it.

        `load` is what it has left to train, in tokens, and `others` what those have that have owners.
        """
        owners = [self._owners[other] for other in others]
        self._owners[run] = self._ranks.deal([*others.values(), load], [*owners, None])[-1]
        if not self.owns(run):
            run.leave()

    def balance(
        self,
        runs: Sequence[TrialRun],
        loads: Sequence[float],
        files_of: Callable[[TrialRun], tuple[CheckpointStore, list[TensorGroup]]],
    ) -> int:
        """Deal these trials anew; return how many changed their rank. `files_of` says what moves, and through where."""
        owners = [self._owners[run] for run in runs]
        dealt = self._ranks.deal(loads, owners)
        moving = [place for place, run in enumerate(runs) if dealt[place] != owners[place]]
        if not moving:
            return 0
        where = {place: files_of(runs[place]) for place in moving}
        written = {
            str(place): store.write_groups(groups) for place, (store, groups) in where.items() if self.owns(runs[place])
        }
        files = self._ranks.united(written)
        for place in moving:
            run = runs[place]
            if self.owns(run):
                run.leave()
            self._owners[run] = dealt[place]
            if self.owns(run):
                run.take_up(where[place][0].read_groups(files[str(place)]))
        # Nobody goes on, to write the next checkpoint and remove old files, before all have read these.
        self._ranks.united({})
        return len(moving)
