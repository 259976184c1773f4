"""The planner as a policy of the simulation: the code that serves, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alto_placement.first_come import WaitBound
from alto_placement.planner import (
    Choice,
    Duration,
    Memory,
    Node,
    Objective,
    Part,
    Plan,
    RunningTask,
    Snapshot,
    WaitingTask,
    plan,
)
from alto_placement.planner.answers import indices
from alto_placement.simulator.cluster import Cluster, Job, Parts, Run


class Planned:
    """Re-plans at every event and carries out what the plan starts now. `check` sees every plan.

    No wait is meant to be longer than `wait_patience` x the longest that first come first served would have caused.
    """

    def __init__(
        self, objective: Objective, budget_s: float = 0.0, check: bool = False, wait_patience: float = math.inf
    ) -> None:
        self.objective = objective
        self.bound = WaitBound(wait_patience)
        self.budget_s = budget_s
        self.check = check
        self.planning_s: list[float] = []
        self._memory = Memory()
        self._nodes: tuple[Node, ...] = ()
        self._waiting: dict[str, WaitingTask] = {}
        self._running: dict[str, RunningTask] = {}
        self._epoch = 0

    def wake_s(self, now_s: float, running: dict[str, Run]) -> float | None:
        """Return None: asked at events alone."""
        return None

    def decide(
        self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster
    ) -> tuple[Sequence[str], Sequence[tuple[str, Parts]]]:
        """Return what the plan starts now; it never stops anything."""
        if not self._nodes:
            self._nodes = tuple(Node(str(n), "gpu", cluster.gpus_per_node) for n in range(cluster.nodes))
        snapshot = self.bound.applied(self.snapshot(now_s, waiting, running))
        if not waiting:
            return [], []
        answer = plan(snapshot, budget_s=self.budget_s, memory=self._memory)
        self.planning_s.append(answer.planning_s)
        if self.check:
            self._check(snapshot, answer)
        starts = [
            (
                placement.task_id,
                tuple((int(part.node_id), sum(1 << gpu for gpu in part.gpu_indices)) for part in placement.parts),
            )
            for placement in answer.starting
        ]
        return [], starts

    def snapshot(self, now_s: float, waiting: dict[str, Job], running: dict[str, Run]) -> Snapshot:
        """Return the planner's view; rows that did not change are the same objects as last time."""
        self._epoch += 1
        self._running = {job_id: self._running.get(job_id) or _running(run) for job_id, run in running.items()}
        self._waiting = {job_id: self._waiting.get(job_id) or _waiting(job) for job_id, job in waiting.items()}
        return Snapshot(
            now_s=now_s,
            nodes=self._nodes,
            waiting=tuple(self._waiting.values()),
            running=tuple(self._running.values()),
            objective=self.objective,
            epoch=self._epoch,
        )

    def _check(self, snapshot: Snapshot, answer: Plan) -> None:
        from alto_placement.simulator.checker import violations

        found = violations(snapshot, answer)
        if found:
            raise AssertionError(found[:5])


def _waiting(job: Job) -> WaitingTask:
    choice = Choice(job.gpus, Duration.certain(job.predicted_s))
    return WaitingTask(job.job_id, job.tenant, (choice,), job.submit_s)


def _running(run: Run) -> RunningTask:
    parts = tuple(Part(str(node), indices(mask)) for node, mask in run.parts)
    end = run.since_s + run.job.predicted_s
    return RunningTask(run.job.job_id, run.job.tenant, parts, run.since_s, end, end)
