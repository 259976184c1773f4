"""How the cluster changes: each operation takes a draft and a moment, changes rows, and answers. Pure.

The rules that everything else rests on:
- A task has at most one live assignment, and each new one has a higher epoch than all before it.
- An assignment ends once: by its node's word, or because its node is lost or restarted.
- Whatever comes late, twice or out of order names an assignment and an epoch, and is passed over when it is not live.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from alto.v1 import error_pb2
from alto_common.errors import DomainError, invalid_fields, not_found, reason_name
from alto_common.violations import Violation

from alto_placement.planner.model import MAX_GPUS_PER_NODE
from alto_placement.state import (
    AssignmentRow,
    Draft,
    FailureCause,
    Moment,
    NodeRow,
    NodeSpec,
    NodeState,
    Outcome,
    Progress,
    Rest,
    StopReason,
    TaskRow,
    TaskState,
)

# Beyond any limit that an operator may set; a number that goes on doubling is too large in the end.
_MOST_DOUBLINGS = 30


@dataclass(frozen=True)
class Rules:
    """What the operator chose: the lease, and how often a failing task is tried again (delay doubles, to a limit).

    A node on which attempts fail at their start rests by the same rule. A lost one is forgotten after `keep_lost_s`.
    """

    lease_s: float = 15.0
    max_failures: int = 3
    retry_delay_s: float = 2.0
    max_retry_delay_s: float = 60.0
    keep_lost_s: float = 86400.0

    def delay_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return min(self.retry_delay_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), self.max_retry_delay_s)


@dataclass(frozen=True)
class Reported:
    """What a heartbeat says of one assignment."""

    assignment_id: str
    epoch: int
    progress: Progress


INCARNATIONS_REMEMBERED = 16
# Of a task: what must have been done beyond all that was done at its last failure to have come further. Of a week a
# hundredth takes hours: for an attempt that lasted so long, anything beyond it will do.
FURTHER = 0.01
LASTED_S = 600.0

_LOST = FailureCause(
    reason_name(error_pb2.ERROR_REASON_EXECUTION_FAILED), "its node was lost while it trained the task"
)

# A stop asked for by the task's owner replaces one asked for by the operator, never the other way round.
_STOP_RANK = {
    StopReason.PREEMPTED: 0,
    StopReason.DRAINED: 0,
    StopReason.PAUSED: 1,
    StopReason.CANCELLED: 2,
    StopReason.SUPERSEDED: 3,
}


def enqueue(draft: Draft, task: TaskRow) -> TaskRow:
    """Queue a task. The same task_id again changes nothing and returns the task as it is."""
    known = draft.task(task.task_id)
    if known is not None:
        return known
    draft.put(task)
    return task


def dequeue(draft: Draft, task_id: str, now: Moment) -> None:
    """Take a task out; an assignment is asked to stop first. An unknown or ended task is no error."""
    task = draft.task(task_id)
    if task is None or task.ended is not None:
        if task is not None and task.ended is TaskState.GIVEN_UP and not task.dequeued:
            draft.put(replace(task, dequeued=True))
        return
    task = replace(task, dequeued=True)
    draft.put(task)
    _settle(draft, task, now)


def update(
    draft: Draft,
    task_id: str,
    now: Moment,
    *,
    held: bool | None = None,
    priority: int | None = None,
    stop_trial_ids: Sequence[str] = (),
) -> TaskRow:
    """Hold a task back or let it go, change its priority, stop trials. Raises RESOURCE_NOT_FOUND.

    A task that has ended stays as it is: an update may always come too late.
    """
    task = draft.task(task_id)
    if task is None:
        raise not_found("task", task_id)
    if task.ended is not None:
        return task
    task = replace(
        task,
        held=task.held if held is None else held,
        priority=task.priority if priority is None else priority,
        stopped_trial_ids=tuple(dict.fromkeys((*task.stopped_trial_ids, *stop_trial_ids))),
    )
    draft.put(task)
    return _settle(draft, task, now)


def register(draft: Draft, spec: NodeSpec, incarnation: str, now: Moment, rules: Rules) -> NodeRow:
    """Make a node known. Another incarnation means that its process restarted: what it had is over at once.

    Raises STATE_CONFLICT for an incarnation that was superseded: a call of a process that is gone, which came late.
    """
    if spec.gpus > MAX_GPUS_PER_NODE:
        raise invalid_fields([Violation("node.gpus", spec.gpus, f"give at most {MAX_GPUS_PER_NODE} places a node")])
    known = draft.node(spec.node_id) or NodeRow(spec, incarnation)
    superseded = known.superseded
    if known.incarnation != incarnation:
        if incarnation in superseded:
            raise _superseded(spec.node_id)
        # The process has died, not only been cut off: what was lost with it stays counted.
        _forget_losses(draft, spec.node_id)
        _lose_assignments(draft, spec.node_id, now, rules)
        superseded = (*superseded, known.incarnation)[-INCARNATIONS_REMEMBERED:]
        known = replace(_rested(draft, known), leaving=False)
    elif known.lost:
        _take_back_losses(draft, spec.node_id)
    node = replace(known, spec=spec, incarnation=incarnation, superseded=superseded, lost=False, last_seen_s=now.wall_s)
    draft.put(node)
    _renew(draft, spec.node_id, now, rules)
    # A node that came back with fewer GPUs than its assignments hold cannot keep those.
    rows = draft.on_node(spec.node_id)
    lost = {row.assignment_id for row in rows if any(index >= spec.gpus for index in row.gpu_indices)}
    for row in rows:
        if row.assignment_id in lost or row.host_assignment_id in lost:
            _end(draft, row, Outcome.LOST, now)
    return node


def require_incarnation(draft: Draft, node_id: str, incarnation: str) -> NodeRow:
    """Return the node. Raises RESOURCE_NOT_FOUND when it must register, STATE_CONFLICT when it was superseded."""
    node = draft.node(node_id)
    if node is None:
        raise not_found("node", node_id)
    if node.incarnation != incarnation:
        raise _superseded(node_id)
    return node


def heartbeat(
    draft: Draft,
    node_id: str,
    incarnation: str,
    reported: Sequence[Reported],
    now: Moment,
    rules: Rules,
    leaving: bool = False,
) -> tuple[str, ...]:
    """Renew the node's leases and note its progress. Returns the assignments it lists that are not its own any more.

    A node that is leaving is drained by that, and what it does not list ends at once: it never begins it.
    """
    node = require_incarnation(draft, node_id, incarnation)
    has_left = leaving and not reported
    if node.lost:
        _take_back_losses(draft, node_id)
    if (node.leaving, node.lost) != (leaving, has_left):
        draft.put(replace(node, leaving=leaving, lost=has_left, last_seen_s=now.wall_s))
    _renew(draft, node_id, now, rules)
    if leaving:
        _leave(draft, node_id, {status.assignment_id for status in reported}, now)
    stale = []
    for status in reported:
        row = draft.assignment(status.assignment_id)
        if row is None or row.epoch != status.epoch or row.node_id != node_id:
            stale.append(status.assignment_id)
        else:
            draft.base.progress[row.assignment_id] = status.progress
            _note_work(draft, row)
    return tuple(stale)


def assignment_ended(
    draft: Draft,
    node_id: str,
    incarnation: str,
    assignment_id: str,
    epoch: int,
    outcome: Outcome,
    failure: FailureCause | None,
    now: Moment,
    rules: Rules,
    last: Progress | None = None,
) -> None:
    """Take a node's word on how an assignment ended, and where it stood then.

    Passed over when the assignment is not live under this epoch.
    """
    require_incarnation(draft, node_id, incarnation)
    row = draft.assignment(assignment_id)
    if row is None or row.epoch != epoch or row.node_id != node_id:
        return
    if last is not None:
        draft.base.progress[assignment_id] = last
    task = draft.task(row.task_id)
    assert task is not None, "an assignment has a task"
    _note_work(draft, row)
    if outcome is Outcome.FAILED_RETRIABLE and not _has_begun(draft, row):
        _let_rest(draft, row.node_id, task, failure, now, rules)
    _end(draft, row, outcome, now)
    task = draft.task(row.task_id)
    assert task is not None, "an assignment has a task"
    if outcome in (Outcome.COMPLETED, Outcome.FAILED):
        draft.put(_ended(task, TaskState.FINISHED, now, failure))
    elif outcome is Outcome.UNSHARED and task.ended is None and not task.alone:
        # Whose fault it was shows when each is tried alone: until then it is nobody's.
        draft.put(replace(task, alone=True))
    elif outcome in (Outcome.FAILED_RETRIABLE, Outcome.UNSHARED) and task.ended is None:
        task = _count_failure(draft, task, row, failure, now, rules)
        if task.ended is None:
            draft.base.retry_at_s[task.task_id] = now.monotonic_s + rules.delay_s(task.failures)


def expire(draft: Draft, now: Moment, rules: Rules) -> tuple[str, ...]:
    """Declare the nodes lost whose lease has run out, end what they had, and return their names.

    Nodes that have rested take work again, and all that rest where no other does.
    """
    resting = [node for node in draft.base.nodes.values() if node.rests]
    others = bool(resting) and any(_takes_work(node) for node in draft.base.nodes.values())
    for row in resting:
        rest = draft.base.rests.get(row.node_id)
        if rest is None or rest.until_s <= now.monotonic_s or not others:
            draft.put(replace(row, rests=False))
    lost = []
    for node_id, end_s in list(draft.base.lease_end_s.items()):
        node = draft.node(node_id)
        if node is not None and not node.lost and end_s <= now.monotonic_s:
            # One not heard of since placement started may have been well until then.
            last_seen_s = draft.base.last_seen_s.get(node_id, now.wall_s)
            draft.put(replace(node, lost=True, leaving=False, last_seen_s=last_seen_s))
            for task_id in _lose_assignments(draft, node_id, now, rules):
                draft.base.lost_with[task_id] = node_id
            lost.append(node_id)
    return tuple(lost)


def forget_lost(draft: Draft, now: Moment, rules: Rules) -> tuple[str, ...]:
    """Forget the nodes that were lost, or left, long ago, with all that was said of them, and return their names."""
    long_ago_s = now.wall_s - rules.keep_lost_s
    lost = [node for node in draft.base.nodes.values() if node.lost and node.last_seen_s < long_ago_s]
    for node in lost:
        _forget_losses(draft, node.node_id)
        draft.forget(node.node_id)
    return tuple(node.node_id for node in lost)


def assign(
    draft: Draft,
    task_id: str,
    node_id: str,
    gpu_indices: Sequence[int],
    assignment_id: str,
    now: Moment,
    host_task_id: str = "",
) -> AssignmentRow | None:
    """Place a task under the next epoch; None when the plan is out of date: the task, node or GPUs are not free.

    With a host it becomes a guest: in the host's executor, as long as that lasts, and without GPUs of its own.
    """
    task, node = draft.task(task_id), draft.node(node_id)
    if task is None or node is None or not _takes_work(node):
        return None
    if task.ended is not None or task.assignment_id or task.held:
        return None
    if draft.base.retry_at_s.get(task_id, now.monotonic_s) > now.monotonic_s:
        return None
    host = _host(draft, host_task_id, node) if host_task_id else None
    if host_task_id:
        if host is None or task.alone:
            return None
        gpu_indices = ()
    elif len(set(gpu_indices)) != task.gpus:
        return None  # a task never runs on other than it asked for
    taken = {index for row in draft.on_node(node_id) for index in row.gpu_indices}
    if taken.intersection(gpu_indices) or not all(0 <= index < node.spec.gpus for index in gpu_indices):
        return None
    row = AssignmentRow(
        assignment_id=assignment_id,
        task_id=task_id,
        epoch=next_epoch(task),
        node_id=node_id,
        incarnation=node.incarnation,
        gpu_indices=tuple(gpu_indices),
        started_s=now.wall_s,
        host_assignment_id=host.assignment_id if host is not None else "",
    )
    draft.put(row)
    draft.put(replace(task, epoch=row.epoch, attempts=task.attempts + 1, assignment_id=assignment_id))
    draft.base.retry_at_s.pop(task_id, None)
    return row


def _host(draft: Draft, task_id: str, node: NodeRow) -> AssignmentRow | None:
    """Return a task's assignment when it may take in a guest now: on this node, with GPUs of its own, and staying."""
    task = draft.task(task_id)
    row = draft.assignment(task.assignment_id) if task is not None and not task.alone else None
    if row is None or row.host_assignment_id or row.stop is not None or row.node_id != node.node_id:
        return None
    return row if row.incarnation == node.incarnation else None


def next_epoch(task: TaskRow) -> int:
    """Return the epoch of a task's next assignment.

    A task's epochs begin at the second at which it was queued: a placement that lost its database and is given the
    task again never gives out an epoch that a node or admission has seen.
    """
    return max(task.epoch + 1, int(task.enqueued_s))


def preempt(draft: Draft, task_id: str, reason: StopReason) -> None:
    """Ask a task's assignment to stop at a checkpoint; the task then waits again."""
    task = draft.task(task_id)
    row = draft.assignment(task.assignment_id) if task is not None else None
    if row is not None:
        _ask_to_stop(draft, row, reason)


def cordon(draft: Draft, node_id: str, cordoned: bool) -> NodeRow:
    """Stop a node from taking more work, or let it again (which takes back a drain too)."""
    node = draft.node(node_id)
    if node is None:
        raise not_found("node", node_id)
    node = replace(_rested(draft, node), cordoned=cordoned, draining=node.draining and cordoned)
    draft.put(node)
    return node


def drain(draft: Draft, node_id: str) -> NodeRow:
    """Empty a node: ask everything on it to stop at a checkpoint, and let it take no more."""
    node = draft.node(node_id)
    if node is None:
        raise not_found("node", node_id)
    node = replace(node, cordoned=True, draining=True)
    draft.put(node)
    for row in draft.on_node(node_id):
        _ask_to_stop(draft, row, StopReason.DRAINED)
    return node


def _superseded(node_id: str) -> DomainError:
    return DomainError(
        error_pb2.ERROR_REASON_STATE_CONFLICT,
        f"another process has registered as node {node_id!r}: this one must stop; "
        "give each node an id of its own when this was not a restart",
    )


def _settle(draft: Draft, task: TaskRow, now: Moment) -> TaskRow:
    """Bring a task's assignment, or its end, in line with what its owner wants."""
    row = draft.assignment(task.assignment_id)
    if row is None:
        if task.dequeued and task.ended is None:
            task = _ended(task, TaskState.FINISHED, now, None)
            draft.put(task)
    elif task.dequeued:
        _ask_to_stop(draft, row, StopReason.CANCELLED)
    elif task.held:
        _ask_to_stop(draft, row, StopReason.PAUSED)
    elif row.stop is StopReason.PAUSED:
        # Let go again before it has stopped: it stops all the same, and then waits for a place instead of being held.
        draft.put(replace(row, stop=StopReason.PREEMPTED))
    return task


def _ask_to_stop(draft: Draft, row: AssignmentRow, reason: StopReason) -> None:
    if row.stop is None or _STOP_RANK[reason] > _STOP_RANK[row.stop]:
        draft.put(replace(row, stop=reason))


def _lose_assignments(draft: Draft, node_id: str, now: Moment, rules: Rules) -> list[str]:
    """End what a lost node had, and return the tasks against which that counts.

    A task may be what its node died of. It is not where the node had not begun it, or was about to let go of it.
    """
    counted = []
    for row in draft.on_node(node_id):
        _end(draft, row, Outcome.LOST, now)
        task = draft.task(row.task_id)
        assert task is not None, "an assignment has a task"
        if task.ended is None and row.stop is None and row.assignment_id in draft.base.progress:
            _count_failure(draft, task, row, _LOST, now, rules)
            counted.append(task.task_id)
    return counted


def _count_failure(
    draft: Draft, task: TaskRow, row: AssignmentRow, failure: FailureCause | None, now: Moment, rules: Rules
) -> TaskRow:
    """Count a failure in a row, the first again when the task has come further; give up a task with too many."""
    reached = draft.base.furthest.get(task.task_id, 0.0)
    beyond = 0.0 if now.wall_s - row.started_s >= LASTED_S else FURTHER
    further = reached > draft.base.failed_at.get(task.task_id, 0.0) + beyond
    draft.base.failed_at[task.task_id] = reached
    task = replace(task, failures=1 if further else task.failures + 1, failure=failure)
    if task.failures >= rules.max_failures:
        task = _ended(task, TaskState.GIVEN_UP, now, _given_up(task, failure))
    draft.put(task)
    return task


def _take_back_losses(draft: Draft, node_id: str) -> None:
    """Count nothing against the tasks of a node that lives: it was cut off, whatever it trained."""
    for task_id in _forget_losses(draft, node_id):
        task = draft.task(task_id)
        if task is not None and task.ended is None:
            draft.put(replace(task, failures=max(0, task.failures - 1)))


def _forget_losses(draft: Draft, node_id: str) -> list[str]:
    """Forget which tasks a node was lost with, and return them."""
    lost_with = draft.base.lost_with
    task_ids = [task_id for task_id, lost_node_id in lost_with.items() if lost_node_id == node_id]
    for task_id in task_ids:
        del lost_with[task_id]
    return task_ids


def _leave(draft: Draft, node_id: str, listed: Collection[str], now: Moment) -> None:
    """Ask what a leaving node lists to stop, and end what it does not."""
    for row in draft.on_node(node_id):
        _ask_to_stop(draft, row, StopReason.DRAINED)
    for row in draft.on_node(node_id):
        if row.assignment_id not in listed:
            _end(draft, row, Outcome.STOPPED, now)


def _let_rest(
    draft: Draft, node_id: str, task: TaskRow, failure: FailureCause | None, now: Moment, rules: Rules
) -> None:
    """Let a node rest on which an attempt failed before its first tick, longer with each in a row.

    Whatever is wrong with it (a full disk, models that are not there) shall not eat up the queue, and the task is tried
    elsewhere first. So none rests while no other that could hold the task takes work.
    """
    node = draft.node(node_id)
    assert node is not None, "an assignment has a node"
    others = (other for other in draft.base.nodes.values() if other.node_id != node_id and _takes_work(other))
    if any(other.spec.gpus >= task.gpus and task.gpu_kind in ("", other.spec.gpu_kind) for other in others):
        failures = draft.base.rests[node_id].failures + 1 if node_id in draft.base.rests else 1
        until_s = now.monotonic_s + rules.delay_s(failures + 1)
        draft.base.rests[node_id] = Rest(failures, now.wall_s, until_s, failure.message if failure else "")
        draft.put(replace(node, rests=True))


def _takes_work(node: NodeRow) -> bool:
    return node.state is NodeState.READY


def _note_work(draft: Draft, row: AssignmentRow) -> None:
    """Note a first tick: of an attempt begun since others failed on its node, it shows that the node can work."""
    rest = draft.base.rests.get(row.node_id)
    node = draft.node(row.node_id)
    if rest is not None and node is not None and row.started_s > rest.failed_s and _has_begun(draft, row):
        draft.put(_rested(draft, node))


def _rested(draft: Draft, node: NodeRow) -> NodeRow:
    """Forget what failed on a node, and return it as one that takes work."""
    draft.base.rests.pop(node.node_id, None)
    return replace(node, rests=False)


def _has_begun(draft: Draft, row: AssignmentRow) -> bool:
    """Whether an attempt has got to its first tick."""
    progress = draft.base.progress.get(row.assignment_id)
    return progress is not None and progress.measured.ticks > 0


def _given_up(task: TaskRow, failure: FailureCause | None) -> FailureCause | None:
    """Say with the last failure how many there were."""
    if failure is None or task.failures == 1:
        return failure
    sentence = f"given up after {task.failures} attempts in a row that came no further, the last on {task.ran_on}"
    return replace(failure, message=f"{sentence}: {failure.message}")


def _end(draft: Draft, row: AssignmentRow, outcome: Outcome, now: Moment) -> None:
    """End a live assignment and free its task, which waits again, is held, or has been taken out."""
    progress = draft.base.progress.get(row.assignment_id)
    draft.put(replace(row, outcome=outcome, ended_s=now.wall_s))
    task = draft.task(row.task_id)
    assert task is not None, "an assignment has a task"
    reached = draft.base.furthest.get(row.task_id, task.fraction_done)
    draft.base.furthest[row.task_id] = max(reached, 0.0 if progress is None else progress.fraction_done)
    # What this attempt never got to say is what its node had before: a checkpoint of its own, or nothing.
    before = task.fraction_done if row.node_id == task.ran_on else 0.0
    done = progress.fraction_done if progress is not None and _has_begun(draft, row) else before
    # Without having been asked a node stops what it trains when its lease is about to run out.
    by_node = outcome is Outcome.STOPPED and row.stop in (None, StopReason.DRAINED)
    lost_place = by_node or outcome in (Outcome.LOST, Outcome.UNSHARED)
    # A guest had no place of its own to lose, and gains none by having been one.
    keeps_turn = task.keeps_turn if row.host_assignment_id else lost_place
    task = replace(task, assignment_id="", fraction_done=done, ran_on=row.node_id, keeps_turn=keeps_turn)
    draft.put(task)
    if task.dequeued:
        draft.put(_ended(task, TaskState.FINISHED, now, None))


def _ended(task: TaskRow, how: TaskState, now: Moment, failure: FailureCause | None) -> TaskRow:
    return replace(task, ended=how, ended_s=now.wall_s, failure=failure, assignment_id="")


def _renew(draft: Draft, node_id: str, now: Moment, rules: Rules) -> None:
    draft.base.lease_end_s[node_id] = now.monotonic_s + rules.lease_s
    draft.base.last_seen_s[node_id] = now.wall_s
