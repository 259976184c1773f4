"""Which running tasks must leave at their next checkpoint: for a drain, a higher priority or a reclaimed quota."""

from __future__ import annotations

from dataclasses import dataclass

from alto_placement.planner.answers import Placements
from alto_placement.planner.fitting import matches
from alto_placement.planner.model import (
    Node,
    NodeState,
    Preemption,
    PreemptionReason,
    RunningTask,
    Snapshot,
    WaitingTask,
)

MOST_CLAIMS = 8  # waiting tasks that may have others preempted for them in one plan


@dataclass(frozen=True)
class _Claim:
    task: WaitingTask
    reason: PreemptionReason
    predicted_start_s: float


def preemptions(snapshot: Snapshot, placements: Placements, highest_priority: int) -> tuple[Preemption, ...]:
    """Return the preemptions that the plan orders. A task without a checkpoint is never among them.

    `highest_priority` is that of the waiting tasks. A claim is served only if it starts earlier by it than the plan
    predicts. Victims are taken from one node: lowest priority first, then those that have run least.
    """
    draining = {node.node_id for node in snapshot.nodes if node.state is NodeState.DRAINING}
    orders = [
        Preemption(task.task_id, snapshot.now_s + task.checkpoint_within_s, PreemptionReason.NODE_DRAINS)
        for task in (snapshot.running if draining else ())
        if task.checkpoint_within_s is not None and any(part.node_id in draining for part in task.parts)
    ]
    if not snapshot.objective.preempt or not snapshot.running:
        return tuple(orders)
    claims = _claims(snapshot, placements, highest_priority)
    if not claims:
        return tuple(orders)
    taken = {order.task_id for order in orders}
    held = _held(snapshot)
    for claim in claims:
        victims = _victims(snapshot, claim, taken, held)
        if victims:
            # The next claim sees the cluster as this one leaves it.
            for victim in victims:
                held[victim.tenant] -= len(victim.parts[0].gpu_indices)
            held[claim.task.tenant] = held.get(claim.task.tenant, 0) + _width(claim.task)
        for victim in victims:
            assert victim.checkpoint_within_s is not None
            at_s = snapshot.now_s + victim.checkpoint_within_s
            orders.append(Preemption(victim.task_id, at_s, claim.reason, claim.task.task_id))
            taken.add(victim.task_id)
    return tuple(orders)


def _claims(snapshot: Snapshot, placements: Placements, highest_priority: int) -> list[_Claim]:
    lowest = min(task.priority for task in snapshot.running)
    if highest_priority <= lowest and not _may_borrow(snapshot):
        return []
    held = _held(snapshot)
    borrowers = _borrowing(snapshot, held)
    if not borrowers and highest_priority <= lowest:
        return []
    tenants = {tenant.tenant: tenant for tenant in snapshot.tenants}
    claims: list[_Claim] = []
    ordered = sorted(enumerate(snapshot.waiting), key=lambda row: (-row[1].priority, row[1].arrived_s, row[1].task_id))
    for index, task in ordered:
        if len(claims) >= MOST_CLAIMS:
            break
        placement = placements.of(index)
        start = placement.start_s if placement else float("inf")
        if start <= snapshot.now_s or task.not_before_s > snapshot.now_s:
            continue
        if task.priority > lowest:
            claims.append(_Claim(task, PreemptionReason.PRIORITY, start))
            continue
        row = tenants.get(task.tenant)
        width = _width(task)
        own = (
            borrowers
            and row is not None
            and row.quota_gpus is not None
            and held.get(task.tenant, 0) + width <= row.quota_gpus
        )
        if own and row is not None and row.cohort in borrowers.values():
            claims.append(_Claim(task, PreemptionReason.QUOTA_RECLAIMED, start))
    return claims


def _held(snapshot: Snapshot) -> dict[str, int]:
    held: dict[str, int] = {}
    for task in snapshot.running:
        if not task.guest_of:
            held[task.tenant] = held.get(task.tenant, 0) + sum(len(part.gpu_indices) for part in task.parts)
    return held


def _may_borrow(snapshot: Snapshot) -> bool:
    return any(row.cohort and row.quota_gpus is not None for row in snapshot.tenants)


def _borrowing(snapshot: Snapshot, held: dict[str, int]) -> dict[str, str]:
    """Return the tenants that hold more than their quota, with their cohorts."""
    if not _may_borrow(snapshot):
        return {}
    return {
        row.tenant: row.cohort
        for row in snapshot.tenants
        if row.cohort and row.quota_gpus is not None and held.get(row.tenant, 0) > row.quota_gpus
    }


def _victims(snapshot: Snapshot, claim: _Claim, taken: set[str], held: dict[str, int]) -> list[RunningTask]:
    gpus = _width(claim.task)
    cohort = next((row.cohort for row in snapshot.tenants if row.tenant == claim.task.tenant), "")
    borrowers = {tenant for tenant, of in _borrowing(snapshot, held).items() if of == cohort and cohort}

    def yields(running: RunningTask) -> bool:
        if running.checkpoint_within_s is None or running.guest_of or len(running.parts) != 1:
            return False
        if snapshot.now_s + running.checkpoint_within_s >= min(claim.predicted_start_s, running.expected_end_s):
            return False
        if claim.reason is PreemptionReason.PRIORITY:
            return running.priority < claim.task.priority
        return running.tenant in borrowers and running.priority <= claim.task.priority

    best: list[RunningTask] = []
    yielding = [task for task in snapshot.running if yields(task)]
    for node in snapshot.nodes:
        choices = [choice for choice in claim.task.choices if choice.gpus == gpus and matches(choice, node)]
        if node.state is not NodeState.READY or not choices or node.gpus < gpus:
            continue
        needed_s = min(choice.duration.expected_s for choice in choices)
        found = _victims_on(snapshot, node, gpus, needed_s, yielding, taken)
        if found and not _may_hold(snapshot, claim.task.tenant, gpus, held, found):
            continue  # its quota keeps it waiting whoever leaves
        if found and (not best or _cost(found, snapshot.now_s) < _cost(best, snapshot.now_s)):
            best = found
    return best


def _victims_on(
    snapshot: Snapshot, node: Node, gpus: int, needed_s: float, yielding: list[RunningTask], taken: set[str]
) -> list[RunningTask]:
    """Return the tasks to preempt on `node` so that `gpus` become free there; empty when that is not possible."""
    reserved = _reserved(snapshot, node, needed_s)
    busy = {
        gpu
        for t in snapshot.running
        if not t.guest_of
        for p in t.parts
        if p.node_id == node.node_id
        for gpu in p.gpu_indices
    }
    free = len(set(range(node.gpus)) - busy - reserved)
    found: list[RunningTask] = []
    here = [task for task in yielding if task.parts[0].node_id == node.node_id and task.task_id not in taken]
    for task in sorted(here, key=lambda row: (row.priority, -row.started_s, row.task_id)):
        if free >= gpus:
            break
        gained = len(set(task.parts[0].gpu_indices) - reserved)
        if gained:
            found.append(task)
            free += gained
    return found if free >= gpus else []


def _reserved(snapshot: Snapshot, node: Node, needed_s: float) -> set[int]:
    """Return the GPUs of `node` that a reservation wants before a task that needs `needed_s` would be over."""
    end_s = snapshot.now_s + needed_s
    return {
        gpu
        for one in snapshot.reservations
        if one.part.node_id == node.node_id and one.start_s < end_s and one.end_s > snapshot.now_s
        for gpu in one.part.gpu_indices
    }


def _may_hold(snapshot: Snapshot, tenant: str, gpus: int, held: dict[str, int], leaving: list[RunningTask]) -> bool:
    """Return whether quotas let `tenant` have `gpus` more once `leaving` are gone."""
    row = next((one for one in snapshot.tenants if one.tenant == tenant), None)
    if row is None or row.quota_gpus is None:
        return True
    after = dict(held)
    for task in leaving:
        after[task.tenant] -= len(task.parts[0].gpu_indices)
    wanted = after.get(tenant, 0) + gpus
    if wanted <= row.quota_gpus:
        return True
    if not row.cohort or (row.borrow_gpus is not None and wanted > row.quota_gpus + row.borrow_gpus):
        return False
    cohort = [one for one in snapshot.tenants if one.cohort == row.cohort]
    if any(one.quota_gpus is None for one in cohort):
        return True
    return sum(after.get(one.tenant, 0) for one in cohort) + gpus <= sum(one.quota_gpus or 0 for one in cohort)


def _width(task: WaitingTask) -> int:
    return min(choice.gpus for choice in task.choices)


def _cost(victims: list[RunningTask], now_s: float) -> tuple[int, float]:
    lost = sum((now_s - task.started_s) * len(task.parts[0].gpu_indices) for task in victims)
    return max(task.priority for task in victims), lost
