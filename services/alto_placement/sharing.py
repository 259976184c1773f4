"""Which tasks may share an executor, and what each asks of it and leaves free: the service's side of co-location.

The planner decides who joins whom; see `planner.sharing`. A task shares when it is small enough to: one GPU.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alto_placement import planner
from alto_placement.forecasts import Forecasts
from alto_placement.state import AssignmentRow, ClusterState, TaskRow


class SharingRule(enum.StrEnum):
    """Whose tasks may share an executor: nobody's, those of one tenant, all."""

    OFF = "off"
    TENANT = "tenant"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Shared:
    """How an assignment shares its executor with others.

    `host` is whose it is (None: that one has ended), None for one that is alone. `coming_bytes` will be taken by guests
    that have not been taken in yet. It takes `slowdown` times longer than alone.
    """

    host: AssignmentRow | None = None
    coming_bytes: int = 0
    slowdown: float = 1.0
    is_known: bool = False


ALONE = Shared()


class SharingView:
    """What the planner is shown of sharing at one moment: which assignments share, and their `slowdowns`."""

    def __init__(self, state: ClusterState, forecasts: Forecasts, rule: SharingRule) -> None:
        self._state = state
        self._forecasts = forecasts
        self._rule = rule
        self._guests = state.guests()
        self.sharing = {*self._guests, *(guest.assignment_id for rows in self._guests.values() for guest in rows)}
        self.slowdowns = slowdowns(self._guests, state, forecasts)

    def asked(self, task: TaskRow, kinds: Sequence[str]) -> planner.Sharing | None:
        """Return what a task asks of an executor on any of these kinds of GPU; None when it may not share one."""
        memory_bytes = task.size.adapter_memory_bytes
        if self._rule is SharingRule.OFF or task.alone or task.gpus != 1 or not memory_bytes:
            return None
        return planner.Sharing(memory_bytes, max(self._forecasts.throughput_share(task, kind) for kind in kinds))

    def backbone(self, task: TaskRow) -> str:
        """Return the name under which the planner finds tasks that may share: the base model, and whose it is.

        How the base model is loaded is its node's affair, and the same for all tasks there.
        """
        return task.base_model if self._rule is SharingRule.ALL else f"{task.tenant}\n{task.base_model}"

    def of(self, row: AssignmentRow) -> Shared:
        """Return how an assignment, one of `sharing`, shares its executor."""
        host = self._state.assignments.get(row.host_assignment_id) if row.host_assignment_id else row
        return Shared(
            host, self._coming_bytes(row), self.slowdowns.get(row.assignment_id, 1.0), self._forecasts.is_shared(row)
        )

    def free_memory_bytes(self, row: AssignmentRow, shared: Shared) -> int:
        """Return what an executor has left for guests, less what those will take that it has not taken in yet."""
        progress = self._state.progress.get(row.assignment_id)
        if progress is None or row.stop is not None or row.host_assignment_id:
            return 0
        return max(0, progress.guest_memory_bytes - shared.coming_bytes)

    def _coming_bytes(self, row: AssignmentRow) -> int:
        coming = [guest for guest in self._guests.get(row.assignment_id, ()) if not self._is_taken_in(guest)]
        return sum(self._state.tasks[guest.task_id].size.adapter_memory_bytes for guest in coming)

    def _is_taken_in(self, guest: AssignmentRow) -> bool:
        progress = self._state.progress.get(guest.assignment_id)
        return progress is not None and progress.measured.ticks > 0


def slowdowns(
    guests: Mapping[str, Sequence[AssignmentRow]], state: ClusterState, forecasts: Forecasts
) -> dict[str, float]:
    """Return, for each assignment in a shared executor, how many times longer it takes there than alone."""
    found: dict[str, float] = {}
    for host_id in guests.keys() & state.assignments.keys():
        rows = [state.assignments[host_id], *guests[host_id]]
        kind = state.nodes[rows[0].node_id].spec.gpu_kind
        load = sum(forecasts.throughput_share(state.tasks[row.task_id], kind) for row in rows)
        found.update((row.assignment_id, max(1.0, load)) for row in rows)
    return found
