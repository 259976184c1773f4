"""What a node holds, as a pure state machine: assignments, what placement has been told of them, and the lease.

The rules: an assignment is taken up once, and only under a higher epoch than any of the same task before; it is listed
in every heartbeat until placement has heard how it ended; without a renewed lease everything must stop, at a checkpoint
as long as there is time for one; a node that is leaving takes up nothing more.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

# Of a lease that nothing renews: what is left of it for checkpoints. Before that a silence may still pass, such as that
# of a connection which died unnoticed, or of a placement that is started again.
SHARE_FOR_CHECKPOINTS = 1 / 3


class StopReason(enum.StrEnum):
    """Why an assignment must stop. LEASE_ENDS and LEASE_LOST are the node's own, the others are placement's word."""

    CANCELLED = "cancelled"
    PAUSED = "paused"
    DRAINED = "drained"
    PREEMPTED = "preempted"
    SUPERSEDED = "superseded"
    LEASE_ENDS = "lease_ends"
    LEASE_LOST = "lease_lost"

    @property
    def is_immediate(self) -> bool:
        """Whether there is no time for a checkpoint: another may already be training the task."""
        return self in (StopReason.SUPERSEDED, StopReason.LEASE_LOST)


class EndKind(enum.StrEnum):
    """How an assignment ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED_RETRIABLE = "failed_retriable"
    FAILED = "failed"
    UNSHARED = "unshared"  # the executor that it shared broke down, or had no room: nobody knows by whose fault


@dataclass(frozen=True)
class Ending:
    """How an assignment ended; `reason` (of ErrorReason) and `message` say why when it failed."""

    kind: EndKind
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Progress:
    """How far an assignment is. `measured` is the executor's MeasuredWork, serialised, for placement to learn from."""

    fraction_done: float = 0.0
    seconds_remaining: float | None = None
    tokens_per_second: float = 0.0
    measured: bytes = b""
    guest_memory_bytes: int = 0


@dataclass
class Held:
    """One assignment that placement still counts as this node's. `ending` is set when it is over.

    A guest has no GPUs of its own, but a host: the assignment in whose worker it is trained.
    """

    assignment_id: str
    task_id: str
    epoch: int
    gpu_indices: tuple[int, ...]
    host_assignment_id: str = ""
    progress: Progress = field(default_factory=Progress)
    ending: Ending | None = None


@dataclass(frozen=True)
class EndedNotice:
    """What placement must be told of an assignment that is over."""

    assignment_id: str
    epoch: int
    ending: Ending


@dataclass(frozen=True)
class Turn:
    """What to send now: how assignments ended, then a heartbeat that lists `listed` (in that order)."""

    notices: tuple[EndedNotice, ...]
    listed: tuple[Held, ...]
    leaving: bool


@dataclass(frozen=True)
class _InFlight:
    sent_s: float
    told: frozenset[str]
    was_last_word: bool


class Assignments:
    """Everything that the node holds. Times are of its own monotonic clock.

    `leaving` is set, for good, when the node's process is to end, `has_left` when placement knows that nothing is left.
    """

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.leaving = False
        self.has_left = False
        self.lease_end_s: float | None = None
        self._checkpoints_from_s = 0.0
        self._highest_epoch: dict[str, int] = {}
        self._in_flight: deque[_InFlight] = deque()

    def offer(
        self,
        assignment_id: str,
        task_id: str,
        epoch: int,
        gpu_indices: tuple[int, ...],
        now_s: float,
        host_assignment_id: str = "",
    ) -> Held | None:
        """Take up an assignment; None when it is known, or older than one of the same task that was taken up before.

        None, too, for a node that is leaving: its heartbeats, which do not list the offer, give it back.
        Without a lease nothing is taken up either: the offer may have waited in the stream for longer than it counts.
        Placement repeats what still does.
        """
        if self.leaving or self.lease_end_s is None or now_s >= self.lease_end_s:
            return None
        if assignment_id in self.held or epoch <= self._highest_epoch.get(task_id, 0):
            return None
        self._highest_epoch[task_id] = epoch
        held = self.held[assignment_id] = Held(assignment_id, task_id, epoch, gpu_indices, host_assignment_id)
        return held

    def outdated_by(self, held: Held) -> list[Held]:
        """Return the running assignments of the same task that a newer one has taken the place of."""
        return [
            other
            for other in self.held.values()
            if other.task_id == held.task_id and other.epoch < held.epoch and other.ending is None
        ]

    def end(self, assignment_id: str, ending: Ending) -> None:
        """Note that an assignment is over; it stays listed until placement has heard it."""
        held = self.held.get(assignment_id)
        if held is not None and held.ending is None:
            held.ending = ending

    def drop(self, assignment_id: str) -> None:
        """Forget an assignment that placement does not count as this node's any more."""
        self.held.pop(assignment_id, None)

    def begin_session(self) -> None:
        """A new stream: nothing of the old one's will be answered."""
        self._in_flight.clear()

    def next_turn(self, now_s: float, first: bool) -> Turn:
        """Return what to send now; the first message of a session is the heartbeat alone."""
        over = [] if first else [held for held in self.held.values() if held.ending is not None]
        notices = tuple(EndedNotice(h.assignment_id, h.epoch, h.ending) for h in over if h.ending is not None)
        told = frozenset(notice.assignment_id for notice in notices)
        self._in_flight.append(_InFlight(now_s, told, self.leaving and not self.held))
        return Turn(notices, tuple(self.held.values()), self.leaving)

    def renewed(self, lease_s: float) -> frozenset[str]:
        """Note that placement has answered the oldest unanswered heartbeat: the lease counts from when that was sent.

        Whatever was told before that heartbeat has been kept: those assignments are forgotten, and returned.
        """
        if not self._in_flight:
            return frozenset()
        answered = self._in_flight.popleft()
        self.lease_end_s = max(self.lease_end_s or 0.0, answered.sent_s + lease_s)
        self._checkpoints_from_s = self.lease_end_s - SHARE_FOR_CHECKPOINTS * lease_s
        for assignment_id in answered.told:
            self.drop(assignment_id)
        self.has_left = self.has_left or answered.was_last_word
        return answered.told

    def near_lease_end(self, now_s: float) -> list[Held]:
        """Return the running assignments that should stop at a checkpoint: there is just time for it."""
        if self.lease_end_s is None or not self._checkpoints_from_s <= now_s < self.lease_end_s:
            return []
        return [held for held in self.held.values() if held.ending is None]

    def without_lease(self, now_s: float) -> list[Held]:
        """Return the running assignments that must stop now because the lease has run out."""
        if self.lease_end_s is None or now_s < self.lease_end_s:
            return []
        return [held for held in self.held.values() if held.ending is None]
