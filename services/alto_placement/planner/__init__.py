"""The planner: a pure function from a snapshot of the cluster to a plan. No gRPC, SQL, torch or clock of its own.

from alto_placement.planner import Snapshot, plan
answer = plan(Snapshot(now_s=..., nodes=[...], waiting=[...]), budget_s=0.05)
"""

from alto_placement.planner import exact
from alto_placement.planner.engine import Memory, plan
from alto_placement.planner.errors import (
    DuplicateRowError,
    GpuConflictError,
    InvalidRowError,
    ReservationConflictError,
    SnapshotError,
    TaskNeverFitsError,
    UnknownNodeError,
)
from alto_placement.planner.fitting import check_can_ever_fit
from alto_placement.planner.model import (
    Change,
    ChangeKind,
    Choice,
    Duration,
    Explanation,
    Node,
    NodeState,
    Objective,
    Part,
    Placement,
    Plan,
    Preemption,
    PreemptionReason,
    Reservation,
    RunningTask,
    Sharing,
    Snapshot,
    Tenant,
    WaitingTask,
    WaitReason,
)

__all__ = [
    "Change",
    "ChangeKind",
    "Choice",
    "DuplicateRowError",
    "Duration",
    "Explanation",
    "GpuConflictError",
    "InvalidRowError",
    "Memory",
    "Node",
    "NodeState",
    "Objective",
    "Part",
    "Placement",
    "Plan",
    "Preemption",
    "PreemptionReason",
    "Reservation",
    "ReservationConflictError",
    "RunningTask",
    "Sharing",
    "Snapshot",
    "SnapshotError",
    "TaskNeverFitsError",
    "Tenant",
    "UnknownNodeError",
    "WaitReason",
    "WaitingTask",
    "check_can_ever_fit",
    "exact",
    "plan",
]
