"""What the planner is shown of the cluster: a snapshot, whose rows are kept for as long as they say the truth.

Times are Unix seconds. A row that stays the same object costs nobody anything: not to make, and not to read again. So
no row says what time it is; what does depend on the time is made anew when that comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from operator import is_not

from alto_placement import planner
from alto_placement.forecasts import Forecasts, Outlook
from alto_placement.moves import Basis
from alto_placement.policy import Policy
from alto_placement.sharing import ALONE, Shared, SharingView
from alto_placement.state import AssignmentRow, ClusterState, Moment, NodeRow, NodeState, Progress, TaskRow, TaskState

# An executor that is asked to stop writes a checkpoint at its next tick.
CHECKPOINT_WITHIN_S = 30.0
# A task that overstays its prediction is expected to end any moment, never in the past.
OVERSTAY_S = 1.0
# What was asked to stop writes a checkpoint and ends.
STOPS_WITHIN_S = 5.0
# So many tasks are predicted anew for one snapshot because models have moved; the others of theirs with the next ones.
MOST_RENEWED = 100
# The wall clock may gain or lose so much on the monotonic one before what runs is shown anew.
CLOCKS_APART_S = 0.05

_NODE_STATES = {
    NodeState.READY: planner.NodeState.READY,
    NodeState.RESTING: planner.NodeState.CORDONED,
    NodeState.CORDONED: planner.NodeState.CORDONED,
    NodeState.DRAINING: planner.NodeState.DRAINING,
    NodeState.LEAVING: planner.NodeState.DRAINING,
    NodeState.LEFT: planner.NodeState.LOST,
    NodeState.LOST: planner.NodeState.LOST,
}


@dataclass(frozen=True, slots=True)
class _Run:
    """A task that has a place as it is shown until `until_s`, while assignment, progress and sharing are the same.

    After that it is shown anew from the same `outlook`. A guest whose host has ended holds nothing and is not shown: it
    is about to wait again. `end` is when it ends: a duration from Unix time 0.
    """

    row: AssignmentRow
    progress: Progress | None
    shared: Shared
    outlook: Outlook
    until_s: float
    end: planner.Duration
    shown: planner.RunningTask | None


class _Ends(Mapping[str, planner.Duration]):
    """When each task that has a place ends: few are asked for."""

    def __init__(self, runs: Mapping[str, _Run]) -> None:
        self._runs = runs

    def __getitem__(self, task_id: str) -> planner.Duration:
        return self._runs[task_id].end

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)


class ClusterPicture:
    """The cluster as the planner is shown it, kept from one snapshot to the next.

    What it was made of is compared, not announced: rows of the state by identity, so that nobody who changes the state
    need think of the picture; another state, or a clock that went back, begins another picture. Only the forecasts say
    which of their models have moved (see `moves`); of the tasks that rest on those `most_renewed` are predicted anew
    for each snapshot, who has waited for it longest first.
    """

    def __init__(self, forecasts: Forecasts, policy: Policy, most_renewed: int | None = MOST_RENEWED) -> None:
        self._forecasts = forecasts
        self._policy = policy
        self._most_renewed = most_renewed
        self._forget()

    @property
    def is_behind(self) -> bool:
        """Whether models have moved and tasks that rest on them have not been predicted anew yet."""
        return bool(self._due or self._moved)

    def _forget(self) -> None:
        self._state: ClusterState | None = None
        self._shown_s = float("-inf")
        self._nodes: dict[str, tuple[NodeRow, planner.Node]] = {}
        self._kinds: list[str] = []
        # Side by side, in the order of the state: each task as it was seen, and as it is shown where it waits.
        self._tasks: dict[str, TaskRow] = {}
        self._waiting: dict[str, planner.WaitingTask | None] = {}
        self._running: dict[str, _Run] = {}
        self._tenants: dict[str, int] = {}  # how many tasks of each have not ended
        # What each task's row rests on beside the task, and the other way round.
        self._bases: dict[str, tuple[Basis, ...]] = {}
        self._resting_on: dict[Basis, dict[str, None]] = {}
        self._at_every_snapshot: set[str] = set()
        # Models that have moved, and of the first of those the tasks that are to be predicted anew.
        self._moved: dict[Basis, None] = {}
        self._due: dict[str, None] = {}
        self._moves_seen = self._forecasts.moves.since(0)[1]
        self._clocks_apart_s = 0.0

    def snapshot(
        self, state: ClusterState, usage_gpu_s: Mapping[str, float], now: Moment, epoch: int
    ) -> tuple[planner.Snapshot, Mapping[str, planner.Duration]]:
        """Return the planner's view of the cluster at this moment, and when each task that has a place will end.

        `usage_gpu_s` is each tenant's decayed usage. The ends are durations from Unix time 0.
        """
        if state is not self._state or now.wall_s < self._shown_s:
            self._forget()
        self._state, self._shown_s = state, now.wall_s
        self._running = self._running.copy()  # the last snapshot's ends go on being read
        sharing = SharingView(state, self._forecasts, self._policy.sharing)
        changed = self._changed_tasks(state)
        moved = [*self._at_every_snapshot, *self._moved_nodes(state), *self._moved_forecasts()]
        for task_id in dict.fromkeys((*changed, *moved)):
            self._renew(task_id, state, sharing, now)
        runs = self._runs(state, sharing, now)
        policy = self._policy
        snapshot = planner.Snapshot(
            now_s=now.wall_s,
            nodes=[shown for _, shown in self._nodes.values()],
            waiting=list(filter(None, self._waiting.values())),
            running=[run.shown for run in runs.values() if run.shown is not None],
            reservations=[one for one in policy.reservations if _is_here(one, state) and one.end_s > now.wall_s],
            tenants=_tenants(policy, usage_gpu_s, self._tenants.keys()),
            objective=policy.objective,
            epoch=epoch,
        )
        return snapshot, _Ends(runs)

    def _moved_nodes(self, state: ClusterState) -> Iterable[str]:
        """Take in nodes that changed or are gone; return the tasks that must be shown anew for it."""
        moved: dict[str, None] = {}
        for node_id, node in state.nodes.items():
            before = self._nodes.get(node_id)
            if before is not None and before[0] is node:
                continue
            shown = planner_node(node)
            if before is not None and before[1] == shown:
                shown = before[1]
            else:
                moved.update(self._resting_on.get(("node", node_id), {}))
            self._nodes[node_id] = node, shown
        if len(self._nodes) > len(state.nodes):
            self._nodes = {node_id: self._nodes[node_id] for node_id in state.nodes}
        kinds = kinds_of(state)
        if kinds != self._kinds:
            self._kinds = kinds
            return self._tasks
        return moved

    def _changed_tasks(self, state: ClusterState) -> list[str]:
        """Take in tasks that came, changed or are gone; return those that are there."""
        tasks, seen = state.tasks, self._tasks
        # Both are in the order in which tasks came: side by side they are compared without a look into any.
        rows = list(compress(tasks.values(), map(is_not, tasks.values(), seen.values())))
        rows += islice(tasks.values(), len(seen), None)
        changed = [row for row in rows if seen.get(row.task_id) is not row]
        new = sum(row.task_id not in seen for row in changed)
        if len(seen) + new != len(tasks):
            for task_id in seen.keys() - tasks.keys():
                self._count(seen[task_id], -1)
                self._rest_on(task_id, ())
                for kept in (seen, self._waiting, self._running, self._due):
                    kept.pop(task_id, None)
                self._at_every_snapshot.discard(task_id)
        for row in changed:
            if row.task_id in seen:
                self._count(seen[row.task_id], -1)
            self._count(row, 1)
            seen[row.task_id] = row
        return [row.task_id for row in changed]

    def _count(self, task: TaskRow, number: int) -> None:
        if task.ended is None:
            count = self._tenants[task.tenant] = self._tenants.get(task.tenant, 0) + number
            if not count:
                del self._tenants[task.tenant]

    def _moved_forecasts(self) -> list[str]:
        """Return the tasks that are to be predicted anew now."""
        moved, self._moves_seen = self._forecasts.moves.since(self._moves_seen)
        self._moved.update(dict.fromkeys(moved))
        while self._moved and (self._most_renewed is None or len(self._due) < self._most_renewed):
            basis = next(iter(self._moved))
            del self._moved[basis]
            self._due.update(self._resting_on.get(basis, {}))
        return list(islice(self._due, self._most_renewed))

    def _renew(self, task_id: str, state: ClusterState, sharing: SharingView, now: Moment) -> None:
        """Show a task anew: at once where it waits, and what has a place when it is its turn."""
        task = state.tasks[task_id]
        self._due.pop(task_id, None)
        self._running.pop(task_id, None)
        self._at_every_snapshot.discard(task_id)
        where = state.task_state(task)
        if where is not TaskState.WAITING:
            self._waiting[task_id] = None
            if where not in (TaskState.ASSIGNED, TaskState.STOPPING):
                self._rest_on(task_id, ())
            return
        kinds = kinds_for(task, self._kinds)
        delay_s = state.retry_at_s.get(task_id, now.monotonic_s) - now.monotonic_s
        if delay_s > 0 or task.enqueued_s > now.wall_s:
            self._at_every_snapshot.add(task_id)
        self._waiting[task_id] = waiting_task(task, kinds, state, self._forecasts, now.wall_s, delay_s, sharing)
        is_begun = task.fraction_done > 0.0
        bases = self._forecasts.bases(task, kinds, is_begun)
        self._rest_on(task_id, (*bases, ("node", task.ran_on)) if is_begun else bases)

    def _runs(self, state: ClusterState, sharing: SharingView, now: Moment) -> dict[str, _Run]:
        """Return the tasks that have a place, as they are shown."""
        apart_s = now.wall_s - now.monotonic_s
        if abs(apart_s - self._clocks_apart_s) > CLOCKS_APART_S:
            self._running.clear()
            self._clocks_apart_s = apart_s
        rows, shares, now_s = list(state.assignments.values()), sharing.sharing, now.wall_s
        task_ids = [row.task_id for row in rows]
        # Most are as they were. They are told by as little as can be: there may be ten thousand.
        runs = list(map(self._running.get, task_ids))
        heard = list(map(state.progress.get, state.assignments))
        perhaps_changed = [
            index
            for index, (run, row, progress) in enumerate(zip(runs, rows, heard, strict=True))
            if run is None
            or run.row is not row
            or run.progress is not progress
            or now_s >= run.until_s
            or run.shared is not ALONE
            or row.assignment_id in shares
        ]
        for index in perhaps_changed:
            run, row, progress = runs[index], rows[index], heard[index]
            shared = sharing.of(row) if row.assignment_id in shares else ALONE
            is_same = run is not None and run.row is row and run.progress is progress and run.shared == shared
            if run is not None and is_same and now_s < run.until_s:
                continue
            task, kind = state.tasks[row.task_id], state.nodes[row.node_id].spec.gpu_kind
            if run is not None and is_same and run.outlook.at_s >= row.started_s:  # else it moves with the clock
                outlook = run.outlook
            else:
                outlook = self._forecasts.outlook(task, row, kind, progress, now, shared.slowdown, anew=run is None)
                bases = self._forecasts.bases(task, [kind], is_begun=True)
                self._rest_on(row.task_id, (*bases, ("node", row.node_id)))
            runs[index] = self._run(task, row, kind, progress, shared, outlook, sharing, now_s)
        self._running = dict(zip(task_ids, filter(None, runs), strict=True))
        return self._running

    def _run(
        self,
        task: TaskRow,
        row: AssignmentRow,
        kind: str,
        progress: Progress | None,
        shared: Shared,
        outlook: Outlook,
        sharing: SharingView,
        now_s: float,
    ) -> _Run:
        left, at_s = outlook.left, outlook.at_s
        # As foreseen, until the first of its ends is so near that the least that is left counts instead.
        until_s = at_s + min(left.expected_s, left.upper_s, left.low_s, left.high_s)
        until_s -= max(OVERSTAY_S, outlook.least_s)
        if now_s < until_s:
            end = _from(at_s, left)
        else:
            until_s = now_s
            end = _from(now_s, _at_least(OVERSTAY_S, outlook.left_at(now_s)))
        # What ends before a guest could have started by itself takes none in.
        start_s = self._forecasts.start_s(task, kind)
        takes_guests = end.expected_s - now_s > start_s
        if now_s < at_s + left.expected_s - start_s:
            until_s = min(until_s, at_s + left.expected_s - start_s)
        stops = row.stop is not None
        if stops or row.started_s > now_s:
            until_s = now_s
        host = row if shared is ALONE else shared.host
        if host is None:
            return _Run(row, progress, shared, outlook, until_s, end, None)
        shown = planner.RunningTask(
            task_id=task.task_id,
            tenant=task.tenant,
            parts=(planner.Part(host.node_id, host.gpu_indices),),
            started_s=min(row.started_s, now_s),
            expected_end_s=now_s + STOPS_WITHIN_S if stops else end.expected_s,
            upper_end_s=now_s + STOPS_WITHIN_S if stops else end.upper_s,
            priority=task.priority,
            checkpoint_within_s=None if stops else CHECKPOINT_WITHIN_S,
            resume=(planner.Choice(task.gpus, left, task.gpu_kind, one_node=True),),
            backbone=sharing.backbone(task),
            sharing=sharing.asked(task, [kind]),
            free_memory_bytes=sharing.free_memory_bytes(row, shared) if takes_guests else 0,
            guest_of=host.task_id if host is not row else "",
        )
        return _Run(row, progress, shared, outlook, until_s, end, shown)

    def _rest_on(self, task_id: str, bases: tuple[Basis, ...]) -> None:
        """Note what a task's row rests on."""
        before = self._bases.get(task_id, ())
        if bases == before:
            return
        for basis in before:
            self._resting_on[basis].pop(task_id, None)
            if not self._resting_on[basis]:
                del self._resting_on[basis]
        for basis in bases:
            self._resting_on.setdefault(basis, {})[task_id] = None
        if bases:
            self._bases[task_id] = bases
        else:
            del self._bases[task_id]


def snapshot_of(
    state: ClusterState,
    forecasts: Forecasts,
    policy: Policy,
    usage_gpu_s: Mapping[str, float],
    now: Moment,
    epoch: int,
) -> tuple[planner.Snapshot, Mapping[str, planner.Duration]]:
    """Return what a picture of the cluster that was made just now shows."""
    return ClusterPicture(forecasts, policy).snapshot(state, usage_gpu_s, now, epoch)


def planner_node(node: NodeRow) -> planner.Node:
    """Return a node as the planner sees it."""
    spec = node.spec
    return planner.Node(spec.node_id, spec.gpu_kind, spec.gpus, _NODE_STATES[node.state], spec.memory_bytes_per_gpu)


def waiting_task(
    task: TaskRow,
    kinds: Sequence[str],
    state: ClusterState,
    forecasts: Forecasts,
    now_s: float,
    delay_s: float = 0.0,
    sharing: SharingView | None = None,
) -> planner.WaitingTask:
    """Return a queued task as the planner sees it: rigid, on one node, a choice for each of these kinds of GPU.

    It is held back for `delay_s`, when that is more than 0. Without `sharing` it is shown as one that never shares.
    """
    can_resume = _can_resume(task, state)
    choices = tuple(
        planner.Choice(
            task.gpus,
            forecasts.rest(task, kind, can_resume),
            kind,
            memory_bytes=-(-task.size.least_memory_bytes // task.gpus),
            one_node=True,
        )
        for kind in kinds
    )
    return planner.WaitingTask(
        task_id=task.task_id,
        tenant=task.tenant,
        choices=choices,
        # A clock that was ahead when the task came must not make it wait for the present to catch up.
        arrived_s=min(task.enqueued_s, now_s),
        priority=task.priority,
        backbone=sharing.backbone(task) if sharing is not None else task.base_model,
        sharing=sharing.asked(task, kinds) if sharing is not None else None,
        not_before_s=now_s + delay_s if delay_s > 0 else float("-inf"),
        begun=task.keeps_turn,
    )


def kinds_of(state: ClusterState) -> list[str]:
    """Return the kinds of GPU that there are, GPUs before CPUs."""
    return sorted({node.spec.gpu_kind for node in state.nodes.values()}, key=lambda kind: (kind == "cpu", kind)) or [""]


def kinds_for(task: TaskRow, kinds_here: list[str]) -> list[str]:
    """Return the kinds of GPU that a task may run on: those that there are, its own alone if it asks for one."""
    return [task.gpu_kind] if task.gpu_kind else kinds_here


def _can_resume(task: TaskRow, state: ClusterState) -> bool:
    """Return whether the node that has the task's checkpoint takes work: another one begins anew."""
    node = state.nodes.get(task.ran_on)
    return node is not None and node.state is NodeState.READY


def _is_here(reservation: planner.Reservation, state: ClusterState) -> bool:
    node = state.nodes.get(reservation.part.node_id)
    return node is not None and max(reservation.part.gpu_indices) < node.spec.gpus


def _tenants(policy: Policy, usage_gpu_s: Mapping[str, float], present: Collection[str]) -> list[planner.Tenant]:
    known = {row.tenant: row for row in policy.tenants}
    rows = [known.get(tenant) or planner.Tenant(tenant) for tenant in sorted({*present, *known})]
    return [dataclasses.replace(row, usage_gpu_s=usage_gpu_s.get(row.tenant, 0.0)) for row in rows]


def _from(start_s: float, left: planner.Duration) -> planner.Duration:
    return planner.Duration(
        start_s + left.expected_s, start_s + left.upper_s, start_s + left.low_s, start_s + left.high_s
    )


def _at_least(least_s: float, left: planner.Duration) -> planner.Duration:
    expected_s = max(least_s, left.expected_s)
    return planner.Duration(
        expected_s, max(expected_s, left.upper_s), min(expected_s, left.low_s), max(expected_s, left.high_s)
    )
