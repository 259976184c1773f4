"""The simulated cluster: GPUs, jobs, virtual time. What decides is a policy; this only carries out and keeps count."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a trace. Policies may see `predicted_s`; only the simulation knows `actual_s`."""

    job_id: str
    submit_s: float
    gpus: int
    predicted_s: float
    actual_s: float
    tenant: str


Parts = tuple[tuple[int, int], ...]
"""GPUs held: (node index, mask of its GPUs) for each node."""


@dataclass(slots=True)
class Run:
    """A job that holds GPUs: since when, and the seconds of work it still had then."""

    job: Job
    parts: Parts
    since_s: float
    left_s: float
    version: int


class Cluster:
    """Nodes of equal size with a mask of free GPUs each."""

    def __init__(self, nodes: int, gpus_per_node: int) -> None:
        self.gpus_per_node = gpus_per_node
        self.free = [(1 << gpus_per_node) - 1] * nodes

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return len(self.free)

    def fit(self, gpus: int, barred: frozenset[int] = frozenset()) -> Parts | None:
        """Return GPUs for a job now, best fit, whole nodes first for a wide job; None when it does not fit."""
        found: list[tuple[int, int]] = []
        left = gpus
        while left > 0:
            width = min(left, self.gpus_per_node)
            used = {node for node, _ in found}
            best = min(
                (
                    (free.bit_count(), node)
                    for node, free in enumerate(self.free)
                    if free.bit_count() >= width and node not in used and node not in barred
                ),
                default=None,
            )
            if best is None:
                return None
            found.append((best[1], lowest_bits(self.free[best[1]], width)))
            left -= width
        return tuple(found)

    def take(self, parts: Parts) -> None:
        """Mark GPUs as held. Raises ValueError when one is not free."""
        for node, mask in parts:
            if self.free[node] & mask != mask:
                raise ValueError(f"node {node}: a GPU is held twice")
            self.free[node] &= ~mask

    def give_back(self, parts: Parts) -> None:
        """Mark GPUs as free."""
        for node, mask in parts:
            self.free[node] |= mask


def lowest_bits(mask: int, count: int) -> int:
    """Return the `count` lowest bits that are set in `mask`."""
    found = 0
    for _ in range(count):
        low = mask & -mask
        found |= low
        mask ^= low
    return found


class Policy(Protocol):
    """Decides at every event. `stop` leaves a job with its work done so far kept."""

    def decide(
        self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster
    ) -> tuple[Sequence[str], Sequence[tuple[str, Parts]]]:
        """Return (jobs to stop, jobs to start and where). What stops is free for what starts."""
        ...

    def wake_s(self, now_s: float, running: dict[str, Run]) -> float | None:
        """Return when to be asked again though nothing happens; None for never."""
        ...


@dataclass
class Outcome:
    """What came of a simulation: completion and longest wait in seconds after submission, by job."""

    completion_s: dict[str, float] = field(default_factory=dict)
    first_start_s: dict[str, float] = field(default_factory=dict)
    preemptions: int = 0
    makespan_s: float = 0.0
    decisions: int = 0

    def mean_completion_s(self) -> float:
        """Return the mean over all jobs."""
        return sum(self.completion_s.values()) / len(self.completion_s)

    def longest_wait_s(self) -> float:
        """Return the longest time from submission to the first start."""
        return max(self.first_start_s.values())


def simulate(jobs: Sequence[Job], cluster: Cluster, policy: Policy) -> Outcome:
    """Run all jobs to their end and return what came of it. Raises RuntimeError if the policy starves a job."""
    outcome = Outcome()
    arrivals = sorted(jobs, key=lambda job: (job.submit_s, job.job_id))
    left = {job.job_id: job.actual_s for job in jobs}
    waiting: dict[str, Job] = {}
    running: dict[str, Run] = {}
    ends: list[tuple[float, str, int]] = []
    version = 0
    arrived = 0
    now = 0.0
    while arrived < len(arrivals) or running or waiting:
        times = [ends[0][0]] if ends else []
        if arrived < len(arrivals):
            times.append(arrivals[arrived].submit_s)
        wake = policy.wake_s(now, running)
        if wake is not None:
            times.append(wake)
        if not times:
            raise RuntimeError(f"{len(waiting)} jobs wait for ever")
        now = max(now, min(times))
        while arrived < len(arrivals) and arrivals[arrived].submit_s <= now:
            waiting[arrivals[arrived].job_id] = arrivals[arrived]
            arrived += 1
        while ends and ends[0][0] <= now:
            _, job_id, of = heapq.heappop(ends)
            run = running.get(job_id)
            if run is not None and run.version == of:
                cluster.give_back(run.parts)
                del running[job_id]
                outcome.completion_s[job_id] = now - run.job.submit_s
                outcome.makespan_s = now
        stops, starts = policy.decide(now, waiting, running, cluster)
        outcome.decisions += 1
        outcome.preemptions += len(stops)
        for job_id in stops:
            run = running.pop(job_id)
            cluster.give_back(run.parts)
            left[job_id] = run.left_s - (now - run.since_s)
            waiting[job_id] = run.job
        for job_id, parts in starts:
            job = waiting.pop(job_id)
            cluster.take(parts)
            version += 1
            running[job_id] = Run(job, parts, now, left[job_id], version)
            heapq.heappush(ends, (now + left[job_id], job_id, version))
            outcome.first_start_s.setdefault(job_id, now - job.submit_s)
        while ends and (ends[0][1] not in running or running[ends[0][1]].version != ends[0][2]):
            heapq.heappop(ends)
    return outcome
