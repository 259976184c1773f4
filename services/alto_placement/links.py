"""What a connected node must be told: a pure function of the state and of what it has been told before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from alto_placement.state import AssignmentRow, ClusterState, StopReason, TaskRow


@dataclass(frozen=True)
class LeaseRenewal:
    """The heartbeat was seen."""


@dataclass(frozen=True)
class StartOrder:
    """Train this."""

    assignment: AssignmentRow
    task: TaskRow


@dataclass(frozen=True)
class StopOrder:
    """Stop this."""

    assignment_id: str
    reason: StopReason


@dataclass(frozen=True)
class TrialsStopOrder:
    """Stop these trials."""

    assignment_id: str
    trial_ids: tuple[str, ...]


Order: TypeAlias = LeaseRenewal | StartOrder | StopOrder | TrialsStopOrder


@dataclass
class NodeLink:
    """One session with a node. `listed` is what its latest heartbeat listed; `told` what it was told since."""

    node_id: str
    incarnation: str
    outbox: asyncio.Queue[Order | None] = field(default_factory=asyncio.Queue)
    listed: frozenset[str] = frozenset()
    told: set[Order] = field(default_factory=set)
    told_trials: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def tell(self, order: Order) -> None:
        """Put an order on its way."""
        self.told.add(order)
        self.outbox.put_nowait(order)

    def tell_pending(self, state: ClusterState) -> None:
        """Tell what has to be told and was not since the latest heartbeat: that one starts the repetition."""
        for order in pending_orders(state, self):
            if order not in self.told:
                self.tell(order)
                if isinstance(order, TrialsStopOrder):
                    self.told_trials[order.assignment_id] = order.trial_ids
                elif isinstance(order, StartOrder):
                    self.told_trials[order.assignment.assignment_id] = order.task.stopped_trial_ids

    def close(self) -> None:
        """End the session."""
        self.outbox.put_nowait(None)


def pending_orders(state: ClusterState, link: NodeLink) -> Iterator[Order]:
    """Yield the orders that the node has not confirmed.

    An assignment that must stop before the node has listed it is sent all the same, its stop behind it: only the node
    can say that it has ended.
    """
    for row in state.on_node(link.node_id):
        task = state.tasks[row.task_id]
        if row.assignment_id not in link.listed:
            yield StartOrder(row, task)
        elif task.stopped_trial_ids and link.told_trials.get(row.assignment_id) != task.stopped_trial_ids:
            yield TrialsStopOrder(row.assignment_id, task.stopped_trial_ids)
        if row.stop is not None:
            yield StopOrder(row.assignment_id, row.stop)
