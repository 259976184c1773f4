"""The loops around the state machine: one operation at a time, kept before it counts; leases; plans; sessions; watches.

Every change goes through `_commit`: the operation runs on a draft, the store keeps what it changed, and only then does
the state in memory change and anybody hear of it. A failed write is followed by reading everything again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import structlog
from alto_common.loops import end_loops

from alto_placement import lifecycle, planner
from alto_placement.clock import SteadyClock
from alto_placement.first_come import WaitBound
from alto_placement.learning import Learning
from alto_placement.lifecycle import Reported
from alto_placement.links import LeaseRenewal, NodeLink, StopOrder
from alto_placement.placeable import check_placeable
from alto_placement.settings import PlacementSettings
from alto_placement.snapshot import ClusterPicture, kinds_for, kinds_of, planner_node, waiting_task
from alto_placement.state import (
    Changes,
    ClusterState,
    Draft,
    FailureCause,
    Moment,
    NodeRow,
    NodeSpec,
    Outcome,
    StopReason,
    TaskRow,
    TaskState,
)
from alto_placement.store import PlacementStore
from alto_placement.watches import PlanFacts, PlanView, PlanWatch, facts_of

_Answer = TypeVar("_Answer")

# Ended tasks stay in memory this long: a watcher that reconnects in time hears of them.
ENDED_KEPT_S = 3600.0

# What the end of the service waits for a database that is silent, before psycopg is told to give up: 10 s more.
LAST_SAVE_S = 5.0

# While tasks have yet to be predicted anew, a plan is made so often.
CATCH_UP_S = 0.1

# Of a plan's length: what thinking it over may take before its orders are given.
THOUGHT_SHARE = 1e-3

_PREEMPTED = {
    planner.PreemptionReason.PRIORITY: StopReason.PREEMPTED,
    planner.PreemptionReason.QUOTA_RECLAIMED: StopReason.PREEMPTED,
    planner.PreemptionReason.NODE_DRAINS: StopReason.DRAINED,
}

log = structlog.get_logger("alto.placement")


class PlacementEngine:
    """Placement as a running thing. `start` reads the store and begins the loops, `stop` ends them."""

    def __init__(
        self,
        store: PlacementStore,
        settings: PlacementSettings,
        clock: Callable[[], Moment] | None = None,
    ) -> None:
        self.state = ClusterState()
        self.is_stopping = False
        self._store = store
        self._settings = settings
        self._rules = settings.rules
        self._policy = settings.policy
        self._waits = WaitBound(self._policy.wait_patience)
        self._clock = clock or SteadyClock()
        self._learning = Learning(store, self._clock)
        self._picture = ClusterPicture(self._learning.forecasts, self._policy)
        self._memory = planner.Memory()
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._revision = 0
        self._nodes_known_s = float("inf")
        self._facts = PlanFacts()
        self._is_planning_broken = False
        self._links: dict[str, NodeLink] = {}
        self._watches: set[PlanWatch] = set()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read the store, give every node a whole lease to come back in, and begin."""
        await self._learning.load()
        await self._reload()
        # Above every revision of an earlier start.
        self._revision = int(self._clock().wall_s * 1000)
        self._nodes_known_s = self._clock().monotonic_s + self._rules.lease_s
        loops = (self._watch_leases(), self._keep_planning(), self._learning.keep(self._settings.keep_learned_s))
        self._loops = [asyncio.create_task(loop) for loop in loops]
        self._changed.set()

    async def stop(self) -> None:
        """End the loops, the sessions and the watches."""
        await end_loops(self._loops)
        try:
            async with asyncio.timeout(LAST_SAVE_S):
                await self._learning.save()
        except Exception:
            log.exception("what was learned last could not be kept")
        for link in self._links.values():
            link.close()
        self.is_stopping = True
        for watch in self._watches:
            watch.announce(())

    @property
    def is_alive(self) -> bool:
        """Whether the loops run and plans are made."""
        return bool(self._loops) and not any(loop.done() for loop in self._loops) and not self._is_planning_broken

    def now(self) -> Moment:
        """Return the present on the engine's clocks."""
        return self._clock()

    # --- tasks ---

    async def enqueue(self, task: TaskRow) -> TaskRow:
        """Queue a task; the same task_id again changes nothing. Raises TASK_UNPLACEABLE."""
        if task.task_id not in self.state.tasks:
            known = await self._store.task(task.task_id)
            if known is not None:
                return known
            self.check_placeable(task)
        return await self._commit(lambda draft, now: lifecycle.enqueue(draft, task))

    async def dequeue(self, task_id: str) -> None:
        """Take a task out; unknown is no error."""
        await self._commit(lambda draft, now: lifecycle.dequeue(draft, task_id, now))

    async def update(
        self, task_id: str, held: bool | None, priority: int | None, stop_trial_ids: Sequence[str]
    ) -> TaskRow:
        """Hold, let go, change the priority, stop trials. Raises RESOURCE_NOT_FOUND."""
        return await self._commit(
            lambda draft, now: lifecycle.update(
                draft, task_id, now, held=held, priority=priority, stop_trial_ids=stop_trial_ids
            )
        )

    def estimate(self, task: TaskRow) -> tuple[planner.Duration, str, str]:
        """Return how long such a task would take, what that rests on, and on which kind. Raises TASK_UNPLACEABLE."""
        self.check_placeable(task)
        forecasts = self._learning.forecasts
        predicted, kind = min(
            ((forecasts.whole(task, kind), kind) for kind in kinds_for(task, kinds_of(self.state))),
            key=lambda one: one[0].expected_s,
        )
        return predicted, forecasts.basis(task.base_model, kind, task.gpus), kind

    def check_placeable(self, task: TaskRow) -> None:
        """Raise TASK_UNPLACEABLE when no node that is known could ever hold the task.

        For a lease after the start nodes are still joining: nothing is refused, it waits with the reason.
        """
        if self._clock().monotonic_s < self._nodes_known_s:
            return
        kinds = kinds_for(task, kinds_of(self.state))
        asked = waiting_task(task, kinds, self.state, self._learning.forecasts, self._clock().wall_s)
        check_placeable(asked, [planner_node(node) for node in self.state.nodes.values()])

    # --- nodes ---

    async def register(self, spec: NodeSpec, incarnation: str) -> NodeRow:
        """Make a node known; a new incarnation ends what the old one had."""
        node = await self._commit(lambda draft, now: lifecycle.register(draft, spec, incarnation, now, self._rules))
        log.info("node registered", node_id=spec.node_id, incarnation=incarnation, gpus=spec.gpus)
        return node

    async def cordon(self, node_id: str, cordoned: bool) -> NodeRow:
        """Stop a node from taking more work, or let it again."""
        return await self._commit(lambda draft, now: lifecycle.cordon(draft, node_id, cordoned))

    async def drain(self, node_id: str) -> NodeRow:
        """Empty a node."""
        return await self._commit(lambda draft, now: lifecycle.drain(draft, node_id))

    def open_link(self, node_id: str, incarnation: str) -> NodeLink:
        """Begin a session; an earlier one of the same node ends. Raises when the incarnation is not the latest."""
        lifecycle.require_incarnation(Draft(self.state), node_id, incarnation)
        earlier = self._links.get(node_id)
        if earlier is not None:
            earlier.close()
        link = self._links[node_id] = NodeLink(node_id, incarnation)
        return link

    def close_link(self, link: NodeLink) -> None:
        """Forget a session that ended; its leases run on."""
        if self._links.get(link.node_id) is link:
            del self._links[link.node_id]

    async def heartbeat(self, link: NodeLink, reported: Sequence[Reported], leaving: bool = False) -> None:
        """Renew the node's leases, learn from its progress, and tell it what it does not confirm."""
        stale = await self._commit(
            lambda draft, now: lifecycle.heartbeat(
                draft, link.node_id, link.incarnation, reported, now, self._rules, leaving
            )
        )
        if self._learning.heard(self.state, self._facts, link.node_id, reported):
            self._changed.set()
        link.listed = frozenset(status.assignment_id for status in reported)
        link.told.clear()
        link.tell(LeaseRenewal())
        for assignment_id in stale:
            link.tell(StopOrder(assignment_id, StopReason.SUPERSEDED))
        link.tell_pending(self.state)

    async def assignment_ended(
        self,
        link: NodeLink,
        assignment_id: str,
        epoch: int,
        outcome: Outcome,
        failure: FailureCause | None,
        last: Reported | None = None,
    ) -> None:
        """Take a node's word on how an assignment ended, and where it stood then."""
        if last is not None:
            self._learning.heard(self.state, self._facts, link.node_id, [last])
        row = self.state.assignments.get(assignment_id)
        task_id = None if row is None else row.task_id
        await self._commit(
            lambda draft, now: lifecycle.assignment_ended(
                draft,
                link.node_id,
                link.incarnation,
                assignment_id,
                epoch,
                outcome,
                failure,
                now,
                self._rules,
                None if last is None else last.progress,
            )
        )
        self._log_end(link.node_id, assignment_id, epoch, outcome, failure, task_id)

    # --- the plan ---

    def view(self, ended: Sequence[TaskRow] = ()) -> PlanView:
        """Return the plan as it is now."""
        return PlanView(self._revision, self._clock(), self.state, self._facts, tuple(ended))

    def open_watch(self) -> PlanWatch:
        """Begin a watch; it first sees the plan as it is, and the tasks that ended in the last hour."""
        watch = PlanWatch()
        watch.announce(task for task in self.state.tasks.values() if task.ended is not None)
        self._watches.add(watch)
        return watch

    def close_watch(self, watch: PlanWatch) -> None:
        """Forget a watch."""
        self._watches.discard(watch)

    # --- inside ---

    async def _commit(self, operation: Callable[[Draft, Moment], _Answer]) -> _Answer:
        # A caller that goes away must not leave the memory behind the store.
        return await asyncio.shield(self._commit_now(operation))

    async def _commit_now(self, operation: Callable[[Draft, Moment], _Answer]) -> _Answer:
        async with self._lock:
            draft = Draft(self.state)
            answer = operation(draft, self._clock())
            changes = draft.changes()
            if changes:
                try:
                    await self._store.save(changes)
                except Exception:
                    await self._reload()
                    raise
                self._learning.ended(self.state, changes)
                self.state.apply(changes)
                self._announce(changes)
            return answer

    def _log_end(
        self,
        node_id: str,
        assignment_id: str,
        epoch: int,
        outcome: Outcome,
        failure: FailureCause | None,
        task_id: str | None,
    ) -> None:
        why = None if failure is None else failure.message
        known = {"task_id": task_id, "node_id": node_id, "assignment_id": assignment_id, "epoch": epoch}
        log.info("assignment ended", **known, outcome=outcome.value, why=why)
        rest = self.state.rests.get(node_id)
        if outcome is Outcome.FAILED_RETRIABLE and rest is not None and self.state.nodes[node_id].rests:
            rest_s = round(rest.until_s - self._clock().monotonic_s, 1)
            log.warning("node rests: attempts fail there", node_id=node_id, failures=rest.failures, rest_s=rest_s)

    def _announce(self, changes: Changes) -> None:
        for row in changes.assignments:
            if row.outcome is Outcome.LOST:
                log.warning("assignment lost", task_id=row.task_id, node_id=row.node_id, epoch=row.epoch)
        for node in changes.nodes:
            if node.leaving:
                log.info("node has left" if node.lost else "node is leaving", node_id=node.node_id)
        for task in changes.tasks:
            if task.ended is TaskState.GIVEN_UP and not task.dequeued:
                why = None if task.failure is None else task.failure.message
                log.warning("task given up", task_id=task.task_id, why=why)
        self._revision += 1
        self._changed.set()
        # What a node must be told depends on its assignments and their tasks.
        told = {row.node_id for row in changes.assignments}
        live = (self.state.assignments.get(task.assignment_id) for task in changes.tasks)
        told.update(row.node_id for row in live if row is not None)
        for node_id in told & self._links.keys():
            self._links[node_id].tell_pending(self.state)
        ended = [task for task in changes.tasks if task.ended is not None]
        for watch in self._watches:
            watch.announce(ended)

    async def _reload(self) -> None:
        now = self._clock()
        self.state = await self._store.load(ended_since_s=now.wall_s - ENDED_KEPT_S)
        for node in self.state.nodes.values():
            self.state.lease_end_s[node.node_id] = now.monotonic_s + self._rules.lease_s

    async def _watch_leases(self) -> None:
        interval_s = min(1.0, self._rules.lease_s / 10)
        before = self._clock().monotonic_s
        while True:
            await asyncio.sleep(interval_s)
            now = self._clock()
            # A stall of this process is not the nodes' silence: their heartbeats may be waiting to be read.
            stalled_s = now.monotonic_s - before - interval_s
            before = now.monotonic_s
            if stalled_s > interval_s:
                for node_id in self.state.lease_end_s:
                    self.state.lease_end_s[node_id] += stalled_s
            try:
                for node_id in await self._commit(lambda draft, at: lifecycle.expire(draft, at, self._rules)):
                    log.warning("node lost", node_id=node_id, lease_s=self._rules.lease_s)
                for node_id in await self._commit(lambda draft, at: lifecycle.forget_lost(draft, at, self._rules)):
                    log.info("node forgotten: lost for too long", node_id=node_id)
                self._forget_ended(now)
            except Exception:
                log.exception("leases could not be looked after; trying again")

    async def _keep_planning(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s()):
                    await self._changed.wait()
            await asyncio.sleep(self._settings.debounce_s)
            self._changed.clear()
            try:
                await self._replan()
                self._is_planning_broken = False
            except Exception:
                self._is_planning_broken = True
                log.exception("no plan could be made; the last one stays")
                await asyncio.sleep(self._settings.refresh_s)
                self._changed.set()

    def _idle_s(self) -> float:
        """Return how long the plan may stay as it is when nothing happens."""
        now_s = self._clock().monotonic_s
        retries = [at_s - now_s for at_s in self.state.retry_at_s.values() if at_s > now_s]
        refresh_s = min(CATCH_UP_S, self._settings.refresh_s) if self._picture.is_behind else self._settings.refresh_s
        return max(0.01, min([refresh_s, *retries]))

    async def _replan(self) -> None:
        now = self._clock()
        usage_gpu_s = self._learning.usage(self.state)
        snapshot, ends = self._picture.snapshot(self.state, usage_gpu_s, now, self._revision)
        if self._waits.is_set:
            snapshot = await asyncio.to_thread(self._waits.applied, snapshot)
        plan = await self._think(snapshot)
        self._facts = facts_of(plan, snapshot, ends)
        for placement in plan.starting:
            part = placement.parts[0]
            row = await self._commit(
                lambda draft, at, p=placement, part=part: lifecycle.assign(  # type: ignore[misc]
                    draft,
                    p.task_id,
                    part.node_id,
                    part.gpu_indices,
                    f"assignment-{secrets.token_hex(8)}",
                    at,
                    p.host_task_id,
                )
            )
            if row is not None:
                self._learning.begun(self.state, row)
                of = placement.host_task_id or None
                log.info("task assigned", task_id=row.task_id, node_id=row.node_id, epoch=row.epoch, guest_of=of)
        for order in plan.preemptions:
            await self._commit(
                lambda draft, at, o=order: lifecycle.preempt(draft, o.task_id, _PREEMPTED[o.reason])  # type: ignore[misc]
            )
            log.info("task preempted", task_id=order.task_id, reason=order.reason.value, for_task_id=order.for_task_id)
        if snapshot.waiting or snapshot.running:
            self._revision += 1
            for watch in self._watches:
                watch.announce(())

    async def _think(self, snapshot: planner.Snapshot) -> planner.Plan:
        """Return a plan. What starts is not moved again, so orders that leave others waiting are worth more thought."""
        usual_s = self._settings.plan_budget_s
        plan = await asyncio.to_thread(planner.plan, snapshot, budget_s=usual_s, memory=self._memory)
        budget_s = min(self._settings.decision_budget_s, THOUGHT_SHARE * plan.makespan_s)
        if budget_s <= usual_s or not plan.starting or len(plan.starting) == len(snapshot.waiting):
            return plan
        await asyncio.to_thread(planner.exact.load)
        return await asyncio.to_thread(planner.plan, snapshot, budget_s=budget_s, memory=self._memory)

    def _forget_ended(self, now: Moment) -> None:
        state = self.state
        for task_id, task in list(state.tasks.items()):
            if task.ended_s is not None and task.ended_s < now.wall_s - ENDED_KEPT_S:
                del state.tasks[task_id]
                for kept in (state.retry_at_s, state.furthest, state.failed_at, state.lost_with):
                    kept.pop(task_id, None)
