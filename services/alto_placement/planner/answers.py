"""Plans that are read on demand: a plan for 100,000 tasks costs nothing for the rows that nobody looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import overload

import alto_planner

from alto_placement.planner.model import Explanation, Part, Placement, Snapshot


def indices(mask: int) -> tuple[int, ...]:
    """Return the positions of the bits set in `mask`, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


class Placements(Sequence[Placement]):
    """The placements of a solution, in the order of the snapshot's queue, after those `joined` to other executors."""

    def __init__(self, snapshot: Snapshot, solution: alto_planner.Solution, joined: tuple[Placement, ...]) -> None:
        self._snapshot = snapshot
        self._solution = solution
        self._joined = joined

    @cached_property
    def _placed(self) -> list[int]:
        return self._solution.placed()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each of the snapshot's waiting tasks."""
        return {task.task_id: number for number, task in enumerate(self._snapshot.waiting)}

    @property
    def joined(self) -> tuple[Placement, ...]:
        """The placements of those that join another's executor."""
        return self._joined

    def of(self, task: int) -> Placement | None:
        """Return the placement of the snapshot's waiting task number `task`, or None."""
        found = self._solution.placement(task)
        if found is None:
            return None
        choice, parts, start_s, end_s = found
        named = tuple(Part(self._snapshot.nodes[node].node_id, indices(gpus)) for node, gpus in parts)
        return Placement(self._snapshot.waiting[task].task_id, choice, named, start_s, end_s)

    def starting(self) -> tuple[Placement, ...]:
        """Return the placements that start now."""
        now = (self.of(task) for task in self._solution.starting())
        return self._joined + tuple(placement for placement in now if placement is not None)

    def __len__(self) -> int:
        return len(self._joined) + len(self._placed)

    @overload
    def __getitem__(self, index: int) -> Placement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Placement]: ...
    def __getitem__(self, index: int | slice) -> Placement | Sequence[Placement]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        if position < len(self._joined):
            return self._joined[position]
        placement = self.of(self._placed[position - len(self._joined)])
        assert placement is not None, "a placed task has a placement"
        return placement


class Explanations(Mapping[str, Explanation]):
    """One explanation for each waiting task, made when it is asked for; `known` are those made already."""

    def __init__(
        self, placements: Placements, explain: Callable[[int], Explanation], known: Mapping[str, Explanation]
    ) -> None:
        self._placements = placements
        self._explain = explain
        self._known = known

    def __getitem__(self, task_id: str) -> Explanation:
        known = self._known.get(task_id)
        return known if known is not None else self._explain(self._placements.numbers[task_id])

    def __iter__(self) -> Iterator[str]:
        yield from self._placements.numbers
        yield from self._known

    def __len__(self) -> int:
        return len(self._placements.numbers) + len(self._known)


class PlacesByTask(Mapping[str, Placement]):
    """The placements by task_id, each made when it is asked for."""

    def __init__(self, placements: Placements) -> None:
        self._placements = placements
        self._joined = {placement.task_id: placement for placement in placements.joined}

    def __getitem__(self, task_id: str) -> Placement:
        placement = self._joined.get(task_id) or self._placements.of(self._placements.numbers[task_id])
        if placement is None:
            raise KeyError(task_id)
        return placement

    def __iter__(self) -> Iterator[str]:
        return (placement.task_id for placement in self._placements)

    def __len__(self) -> int:
        return len(self._placements)
