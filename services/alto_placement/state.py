"""What placement knows: nodes, tasks and live assignments as plain rows; a draft in which an operation changes them.

Rows are frozen and durable: the store keeps every field. What lives on the monotonic clock (leases, retry delays,
progress) is volatile and made anew after a restart. Imports neither grpc nor sqlalchemy.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

from alto_placement.durations import NOTHING_DONE, Measured

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment on two clocks: `monotonic_s` for leases and delays, `wall_s` (Unix time) for what people read."""

    monotonic_s: float
    wall_s: float


class NodeState(enum.StrEnum):
    """Whether a node takes work."""

    READY = "ready"
    RESTING = "resting"
    CORDONED = "cordoned"
    DRAINING = "draining"
    LEAVING = "leaving"
    LEFT = "left"
    LOST = "lost"


class TaskState(enum.StrEnum):
    """Where a task stands in placement."""

    WAITING = "waiting"
    ASSIGNED = "assigned"
    STOPPING = "stopping"
    HELD = "held"
    FINISHED = "finished"
    GIVEN_UP = "given_up"


class StopReason(enum.StrEnum):
    """Why an assignment is taken back."""

    CANCELLED = "cancelled"
    PAUSED = "paused"
    DRAINED = "drained"
    PREEMPTED = "preempted"
    SUPERSEDED = "superseded"


class Outcome(enum.StrEnum):
    """How an assignment ended; LOST is placement's own verdict, the others are the node's word."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED_RETRIABLE = "failed_retriable"
    FAILED = "failed"
    UNSHARED = "unshared"  # the executor that it shared broke down, or had no room: nobody knows by whose fault
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class FailureCause:
    """Why something failed: a stable word of ErrorReason, and a sentence."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node says of itself. `memory_bytes_per_gpu` 0 means that it did not say."""

    node_id: str
    gpu_kind: str
    gpus: int
    memory_bytes_per_gpu: int = 0
    address: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node. `incarnation` names the start of its process that counts, `superseded` the latest of those before it.

    `last_seen_s` is wall time. One that is `leaving` said that its process is ending; with that it is `lost` in order
    when nothing is left on it. A node that `rests` takes no work for a while, because attempts failed there at their
    start; that is not kept.
    """

    spec: NodeSpec
    incarnation: str
    cordoned: bool = False
    draining: bool = False
    leaving: bool = False
    lost: bool = False
    last_seen_s: float = 0.0
    superseded: tuple[str, ...] = ()
    rests: bool = False

    @property
    def node_id(self) -> str:
        """Its name."""
        return self.spec.node_id

    @property
    def state(self) -> NodeState:
        """Whether it takes work."""
        if self.lost:
            return NodeState.LEFT if self.leaving else NodeState.LOST
        if self.leaving:
            return NodeState.LEAVING
        if self.draining:
            return NodeState.DRAINING
        if self.cordoned:
            return NodeState.CORDONED
        return NodeState.RESTING if self.rests else NodeState.READY


@dataclass(frozen=True, slots=True)
class WorkSize:
    """How much work a task is; see WorkSize in the contract. Zeros mean unknown."""

    train_tokens: int = 0
    evaluation_tokens: int = 0
    steps: int = 0
    total_lora_rank: int = 0
    base_parameters: int = 0
    expected_share: float = 1.0
    trials: int = 0
    longest_steps: int = 0
    shape: str = ""
    least_memory_bytes: int = 0
    adapter_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task. `work` is what its node is told, serialised; placement does not look inside.

    `epoch` is that of its latest assignment (0 before the first) and only grows. `attempts` counts assignments,
    `failures` those in a row that failed, in a way that another attempt may not, or were lost with their node, without
    having come further.
    `assignment_id` is the live assignment, if any. `fraction_done` is that of its latest checkpoint, which lies on
    `ran_on`. `keeps_turn` says that it lost its place through no doing of its own, nor for another task: its node died,
    was drained or was cut off. `alone` says that it shares no executor any more, because one that it shared broke down.
    `ended` is set once: FINISHED or GIVEN_UP.
    """

    task_id: str
    tenant: str
    work: bytes
    base_model: str
    gpus: int
    gpu_kind: str
    size: WorkSize
    enqueued_s: float
    priority: int = 0
    held: bool = False
    dequeued: bool = False
    stopped_trial_ids: tuple[str, ...] = ()
    epoch: int = 0
    attempts: int = 0
    failures: int = 0
    assignment_id: str = ""
    fraction_done: float = 0.0
    ran_on: str = ""
    keeps_turn: bool = False
    alone: bool = False
    ended: TaskState | None = None
    ended_s: float | None = None
    failure: FailureCause | None = None


@dataclass(frozen=True, slots=True)
class AssignmentRow:
    """A task on a node's GPUs. `stop` is set when it is asked to stop, `outcome` when it has ended.

    A guest has no GPUs of its own, but a host: the assignment on the same node in whose executor it is trained.
    """

    assignment_id: str
    task_id: str
    epoch: int
    node_id: str
    incarnation: str
    gpu_indices: tuple[int, ...]
    started_s: float
    stop: StopReason | None = None
    outcome: Outcome | None = None
    ended_s: float | None = None
    host_assignment_id: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a node last said of an assignment; `heard_s` is monotonic, `guest_memory_bytes` what is left for guests."""

    fraction_done: float
    heard_s: float
    measured: Measured = NOTHING_DONE
    share_trained: float = 0.0
    longest_steps_left: int = 0
    guest_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """After how many attempts in a row that failed on a node before their first tick it rests, and until when.

    `failed_s`, when the last of them failed, is wall time, `until_s` monotonic; `why` is what that one said.
    """

    failures: int
    failed_s: float
    until_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Changes:
    """The rows that an operation made or changed, and the nodes that it forgot, to be kept in one transaction."""

    nodes: tuple[NodeRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    assignments: tuple[AssignmentRow, ...] = ()
    new_task_ids: frozenset[str] = frozenset()
    new_assignment_ids: frozenset[str] = frozenset()
    forgotten_node_ids: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.nodes or self.tasks or self.assignments or self.forgotten_node_ids)


@dataclass
class ClusterState:
    """All that placement knows. `assignments` holds live ones only."""

    nodes: dict[str, NodeRow] = field(default_factory=dict)
    tasks: dict[str, TaskRow] = field(default_factory=dict)
    assignments: dict[str, AssignmentRow] = field(default_factory=dict)
    # Gone after a restart. On the monotonic clock: node -> end of its lease, task -> earliest retry, node -> its rest.
    lease_end_s: dict[str, float] = field(default_factory=dict)
    retry_at_s: dict[str, float] = field(default_factory=dict)
    rests: dict[str, Rest] = field(default_factory=dict)
    # Task -> the most that was ever done of it, and what that was at its last failure.
    furthest: dict[str, float] = field(default_factory=dict)
    failed_at: dict[str, float] = field(default_factory=dict)
    # Task -> the node with which it was lost, as long as that node may turn out to have lived.
    lost_with: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    # Node -> wall time of its latest heartbeat.
    last_seen_s: dict[str, float] = field(default_factory=dict)

    def copy(self) -> ClusterState:
        """Return the state as it is now, for another thread: rows are frozen, the tables are its own."""
        return ClusterState(**{table.name: dict(getattr(self, table.name)) for table in fields(self)})

    def apply(self, changes: Changes) -> None:
        """Take over what an operation changed, once it is kept."""
        self.nodes.update((row.node_id, row) for row in changes.nodes)
        self.tasks.update((row.task_id, row) for row in changes.tasks)
        for node_id in changes.forgotten_node_ids:
            for kept in (self.nodes, self.lease_end_s, self.last_seen_s, self.rests):
                kept.pop(node_id, None)
        for row in changes.assignments:
            if row.outcome is None:
                self.assignments[row.assignment_id] = row
            else:
                self.assignments.pop(row.assignment_id, None)
                self.progress.pop(row.assignment_id, None)

    def on_node(self, node_id: str) -> Iterator[AssignmentRow]:
        """Yield the live assignments of a node."""
        return (row for row in self.assignments.values() if row.node_id == node_id)

    def guests(self, node_id: str | None = None) -> dict[str, list[AssignmentRow]]:
        """Return the live guests of each assignment (of one node; None: of all) that has any."""
        found: dict[str, list[AssignmentRow]] = {}
        for row in self.assignments.values() if node_id is None else self.on_node(node_id):
            if row.host_assignment_id:
                found.setdefault(row.host_assignment_id, []).append(row)
        return found

    def task_state(self, task: TaskRow) -> TaskState:
        """Return where a task stands."""
        if task.ended is not None:
            return task.ended
        if task.assignment_id:
            assignment = self.assignments[task.assignment_id]
            return TaskState.ASSIGNED if assignment.stop is None else TaskState.STOPPING
        return TaskState.HELD if task.held else TaskState.WAITING

    def free_gpus(self, node_id: str) -> set[int]:
        """Return the indices of a node's GPUs that no live assignment holds."""
        taken = {index for row in self.on_node(node_id) for index in row.gpu_indices}
        return set(range(self.nodes[node_id].spec.gpus)) - taken


class Draft:
    """The state as an operation sees and changes it. Nothing reaches `base` before `ClusterState.apply`."""

    def __init__(self, base: ClusterState) -> None:
        self.base = base
        self._nodes: dict[str, NodeRow] = {}
        self._tasks: dict[str, TaskRow] = {}
        self._assignments: dict[str, AssignmentRow] = {}
        self._forgotten: list[str] = []

    def node(self, node_id: str) -> NodeRow | None:
        """Return a node as it is in the draft."""
        return self._nodes.get(node_id) or self.base.nodes.get(node_id)

    def task(self, task_id: str) -> TaskRow | None:
        """Return a task as it is in the draft."""
        return self._tasks.get(task_id) or self.base.tasks.get(task_id)

    def assignment(self, assignment_id: str) -> AssignmentRow | None:
        """Return a live assignment as it is in the draft."""
        row = self._assignments.get(assignment_id) or self.base.assignments.get(assignment_id)
        return row if row is not None and row.outcome is None else None

    def on_node(self, node_id: str) -> list[AssignmentRow]:
        """Return the live assignments of a node as they are in the draft."""
        rows = {**self.base.assignments, **self._assignments}.values()
        return [row for row in rows if row.node_id == node_id and row.outcome is None]

    def put(self, row: NodeRow | TaskRow | AssignmentRow) -> None:
        """Make or change a row."""
        if isinstance(row, NodeRow):
            self._nodes[row.node_id] = row
        elif isinstance(row, TaskRow):
            self._tasks[row.task_id] = row
        else:
            self._assignments[row.assignment_id] = row

    def forget(self, node_id: str) -> None:
        """Forget a node that has no live assignments, as the last thing that is done about it."""
        self._forgotten.append(node_id)

    def changes(self) -> Changes:
        """Return the rows that differ from the base."""
        return Changes(
            nodes=tuple(_changed(self._nodes.items(), self.base.nodes)),
            tasks=tuple(_changed(self._tasks.items(), self.base.tasks)),
            assignments=tuple(_changed(self._assignments.items(), self.base.assignments)),
            # Not a difference of the keys: that would go through all tasks that there are.
            new_task_ids=frozenset(key for key in self._tasks if key not in self.base.tasks),
            new_assignment_ids=frozenset(key for key in self._assignments if key not in self.base.assignments),
            forgotten_node_ids=tuple(self._forgotten),
        )


def _changed(drafted: Iterable[tuple[str, _Row]], base: dict[str, _Row]) -> Iterator[_Row]:
    return (row for key, row in drafted if base.get(key) != row)
