"""The vocabulary of a plan: what the planner is shown (a snapshot) and what it answers (a plan). Plain frozen data.

All times are seconds on one clock that the caller chooses; `now_s` of the snapshot is the present on that clock. All
durations are seconds of wall time. A node offers `gpus` worker places; on a node without GPUs these are CPU places and
the planner does not care.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_GPUS_PER_NODE = 64


@dataclass(frozen=True, slots=True)
class Duration:
    """How long something will take: expectation, upper bound without early exit, and a 90 % interval.

    The planner packs by `expected_s`. 0 < low_s <= expected_s <= upper_s and low_s <= high_s.
    """

    expected_s: float
    upper_s: float
    low_s: float
    high_s: float

    @classmethod
    def certain(cls, seconds: float) -> Duration:
        """Return a duration that is known exactly."""
        return cls(seconds, seconds, seconds, seconds)


class NodeState(enum.StrEnum):
    """What a node may be used for."""

    READY = "ready"
    CORDONED = "cordoned"  # what runs stays, nothing new starts
    DRAINING = "draining"  # what runs leaves at its next checkpoint, nothing new starts
    LOST = "lost"  # nothing is believed to run there


@dataclass(frozen=True, slots=True)
class Node:
    """One host: `gpus` identical places (at most 64) of one kind, each with `memory_bytes` (0: not limited)."""

    node_id: str
    gpu_kind: str
    gpus: int
    state: NodeState = NodeState.READY
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a task: a number of GPUs, how long it then takes, and what the GPUs must be.

    `gpu_kind` empty means any kind. `memory_bytes` is needed on each GPU. A choice wider than the widest node that
    matches takes whole nodes and one remainder; `one_node` forbids that.
    """

    gpus: int
    duration: Duration
    gpu_kind: str = ""
    memory_bytes: int = 0
    one_node: bool = False


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a task asks of, or offers to, an executor over the same backbone.

    `memory_bytes` is what its adapters need on each GPU beside the backbone. `throughput_share` in (0, 1] is the
    fraction of the executor's saturated throughput that the task uses when alone: two tasks whose shares add up to at
    most 1 do not slow each other down.
    """

    memory_bytes: int
    throughput_share: float


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """A task in the queue. Its choices are alternatives; a rigid task has one.

    A higher `priority` goes first. `arrived_s` is when it first came, whatever happened to it since.
    `not_before_s` holds a task back (a pause, a retry delay). `sharing` None means that it must have GPUs of its own.
    `begun` marks a task that held GPUs and lost them (its node died): it keeps its turn, so GPUs are kept for it ahead
    of all others of its priority that have not begun or came later. Its choices then last as long as what remains.
    """

    task_id: str
    tenant: str
    choices: tuple[Choice, ...]
    arrived_s: float
    priority: int = 0
    backbone: str = ""
    sharing: Sharing | None = None
    not_before_s: float = float("-inf")
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Some GPUs of one node, by index in ascending order."""

    node_id: str
    gpu_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A task that holds GPUs now. The planner never moves it.

    `ends` are absolute times: expectation, upper bound and interval of the end, as known now; an expectation in the
    past means "any moment". `checkpoint_within_s` is how long after an order its checkpoint comes; None means that it
    cannot be preempted. `resume` are the choices it would have after a preemption (remaining work and restart cost).
    `sharing` describes its own load and `free_memory_bytes` what its executor has left on each GPU for guests.
    `guest_of` is set for a task that lives in another task's executor: its parts are then the host's and take no GPUs
    of their own.
    """

    task_id: str
    tenant: str
    parts: tuple[Part, ...]
    started_s: float
    expected_end_s: float
    upper_end_s: float
    priority: int = 0
    checkpoint_within_s: float | None = None
    resume: tuple[Choice, ...] = ()
    backbone: str = ""
    sharing: Sharing | None = None
    free_memory_bytes: int = 0
    guest_of: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """GPUs kept free during [start_s, end_s), for maintenance or for one waiting task (`task_id`).

    Running tasks are not disturbed by it; a task that would overlap it is not started there.
    """

    reservation_id: str
    part: Part
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Tenant:
    """Share and limits of one tenant.

    `weight` > 0 is its part of the cluster under contention. `usage_gpu_s` is its attained GPU-seconds, decayed by the
    caller (see `fairness.decayed`). `quota_gpus` None means no quota; otherwise it may hold that many GPUs at any time
    and, in a `cohort`, borrow up to `borrow_gpus` more (None: without limit) that others of the cohort leave unused,
    until they claim them back. Without a cohort nothing is borrowed.
    """

    tenant: str
    weight: float = 1.0
    usage_gpu_s: float = 0.0
    quota_gpus: int | None = None
    cohort: str = ""
    borrow_gpus: int | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What the operator wants, as weights of dimensionless terms; lower is better.

    score = makespan * (makespan / its bound) + completion * (mean completion / its bound)
          + lateness * (mean time beyond the wait deadline / mean predicted duration).

    The wait of a task is bounded: its deadline is arrived_s + max(patience * predicted duration, min_patience_s), and
    a task past its deadline is given a reservation ahead of all others of its priority. It is never later than
    arrived_s + max(longest_wait_s, min_patience_s); who waited that long goes first, longest wait first.
    `fairness` in [0, 1]: 0 ignores tenants' usage, 1 orders tenants by weighted usage before anything but priority.
    `preempt` allows preemption at a checkpoint for priority and reclaimed quota.
    """

    makespan: float = 1.0
    completion: float = 1.0
    lateness: float = 1.0
    patience: float = 10.0
    min_patience_s: float = 3600.0
    fairness: float = 1.0
    longest_wait_s: float = float("inf")
    preempt: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the planner may know. Rows are immutable: a row that did not change should be the same object again,
    then it costs nothing to read.

    `epoch` grows with every event that the caller has applied and is copied to the plan.
    """

    now_s: float
    nodes: Sequence[Node]
    waiting: Sequence[WaitingTask] = ()
    running: Sequence[RunningTask] = ()
    reservations: Sequence[Reservation] = ()
    tenants: Sequence[Tenant] = ()
    objective: Objective = field(default_factory=Objective)
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """A task's place in the plan. It is an order when start_s is the snapshot's now_s, else a prediction.

    `choice` indexes the task's choices. `host_task_id` is set when the task joins that task's executor.
    """

    task_id: str
    choice: int
    parts: tuple[Part, ...]
    start_s: float
    end_s: float
    host_task_id: str = ""


class PreemptionReason(enum.StrEnum):
    """Why a running task must leave at its next checkpoint."""

    PRIORITY = "priority"
    QUOTA_RECLAIMED = "quota_reclaimed"
    NODE_DRAINS = "node_drains"


@dataclass(frozen=True, slots=True)
class Preemption:
    """An order: checkpoint `task_id` at `at_s`, stop it and queue it again. `for_task_id` is who gains, if anyone."""

    task_id: str
    at_s: float
    reason: PreemptionReason
    for_task_id: str = ""


class WaitReason(enum.StrEnum):
    """The first thing that keeps a task from running now."""

    STARTS_NOW = "starts_now"
    JOINS_EXECUTOR = "joins_executor"
    HELD_BACK = "held_back"  # not_before_s is in the future
    GPUS_BUSY = "gpus_busy"  # not enough free GPUs of its kind in the cluster
    FRAGMENTED = "fragmented"  # enough free GPUs, but not together
    TURN_OF_OTHERS = "turn_of_others"  # it would fit now, but what is free is for those ahead of it
    RESERVED = "reserved"  # it would fit now, but a reservation keeps the GPUs
    QUOTA = "quota"  # its tenant holds all it may hold
    NO_NODE_READY = "no_node_ready"  # nodes that could hold it exist, none takes work now
    NEVER_FITS = "never_fits"  # no node of this cluster can hold it


class ChangeKind(enum.StrEnum):
    """What would let a task start earlier."""

    TASKS_END = "tasks_end"  # any of `waits_for` ending early
    FEWER_GPUS = "fewer_gpus"  # a choice of at most `amount` GPUs
    MORE_GPUS = "more_gpus"  # `amount` more GPUs in the cluster
    MORE_QUOTA = "more_quota"  # `amount` more GPUs of quota
    HIGHER_PRIORITY = "higher_priority"  # a priority of at least `amount`
    NODE_READY = "node_ready"  # a matching node joining or being uncordoned
    TIME = "time"  # nothing but the clock reaching `amount` (seconds)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that would help a waiting task, with the figure that `kind` names."""

    kind: ChangeKind
    amount: float = 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a task is where it is in the plan.

    `waits_for` are the tasks on the GPUs it will take, running or planned, soonest end first (at most eight).
    `shares_with` are the tasks whose executor it joins: the host, then the guests that are there already.
    `ahead` counts waiting tasks before it in line. `deadline_s` is when its bounded wait ends. Predicted times are None
    for a task that has no place in the plan. `largest_fit_gpus` is set for NEVER_FITS.
    """

    reason: WaitReason
    waits_for: tuple[str, ...] = ()
    shares_with: tuple[str, ...] = ()
    ahead: int = 0
    predicted_start_s: float | None = None
    predicted_end_s: float | None = None
    latest_end_s: float | None = None
    deadline_s: float | None = None
    changes: tuple[Change, ...] = ()
    largest_fit_gpus: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer: a place for every task that can be placed, orders for now, and what is proven about it.

    `placements` and `explanations` may be lazy; read them as a sequence and a mapping. `places` are the placements by
    task_id, `starting` those that are orders. `makespan_s` counts from now_s; `lower_bound_s` is a proven lower bound
    on any plan's makespan over the same snapshot, `gap` = makespan_s / lower_bound_s - 1. `mean_completion_s` and its
    bound count from now_s over the waiting tasks. `source` names the candidate that won. `effort` is the work of the
    search: given to `plan` with the same snapshot and seed it repeats these placements.
    """

    epoch: int
    now_s: float
    placements: Sequence[Placement]
    places: Mapping[str, Placement]
    starting: tuple[Placement, ...]
    preemptions: tuple[Preemption, ...]
    unplaced: tuple[str, ...]
    makespan_s: float
    lower_bound_s: float
    mean_completion_s: float
    mean_completion_bound_s: float
    explanations: Mapping[str, Explanation]
    source: str
    effort: tuple[int, ...]
    planning_s: float

    @property
    def gap(self) -> float:
        """Return how far the makespan can at most be from the best possible one, as a fraction."""
        return self.makespan_s / self.lower_bound_s - 1.0 if self.lower_bound_s > 0 else 0.0
