"""The policies that the planner is compared with: FIFO, EASY, shortest first, least attained service, an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alto_placement.simulator.cluster import Cluster, Job, Parts, Run

Decision = tuple[Sequence[str], Sequence[tuple[str, Parts]]]
OVERDUE_S = 60.0  # what runs beyond its prediction is expected to end after this


class _NoWake:
    def wake_s(self, now_s: float, running: dict[str, Run]) -> float | None:
        """Return None: asked at events alone."""
        return None


class Fifo(_NoWake):
    """Strictly by arrival: who does not fit holds up all behind."""

    def decide(self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster) -> Decision:
        """Start the head of the queue while it fits."""
        starts: list[tuple[str, Parts]] = []
        for job in waiting.values():
            parts = cluster.fit(job.gpus)
            if parts is None:
                break
            cluster.take(parts)
            starts.append((job.job_id, parts))
        _undo(cluster, starts)
        return [], starts


class Ordered(_NoWake):
    """By a key of the job; whoever fits starts."""

    def __init__(self, key: Callable[[Job], float]) -> None:
        self.key = key

    def decide(self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster) -> Decision:
        """Start all that fits, first by key first."""
        starts: list[tuple[str, Parts]] = []
        refused = 1 << 30
        for job in sorted(waiting.values(), key=lambda job: (self.key(job), job.submit_s, job.job_id)):
            parts = cluster.fit(job.gpus) if job.gpus < refused else None
            if parts is None:
                refused = min(refused, job.gpus)
                if refused == 1:
                    break
                continue
            cluster.take(parts)
            starts.append((job.job_id, parts))
        _undo(cluster, starts)
        return [], starts


class Easy(_NoWake):
    """By arrival, with a reservation for the head and backfilling that does not delay it."""

    def decide(self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster) -> Decision:
        """Start heads while they fit, then whoever ends before the head could start or leaves its nodes alone."""
        starts: list[tuple[str, Parts]] = []
        queue = list(waiting.values())
        position = 0
        ends = [[now_s] * cluster.gpus_per_node for _ in range(cluster.nodes)]
        for run in running.values():
            _mark(ends, run.parts, max(run.since_s + run.job.predicted_s, now_s + OVERDUE_S))
        while position < len(queue):
            parts = cluster.fit(queue[position].gpus)
            if parts is None:
                break
            self._start(queue[position], parts, now_s, starts, cluster, ends)
            position += 1
        if position < len(queue):
            shadow_s, kept = _shadow(queue[position].gpus, cluster.gpus_per_node, ends)
            # The narrowest refused so far, among those that would delay the head and those that would not.
            refused = {False: 1 << 30, True: 1 << 30}
            for job in queue[position + 1 :]:
                short = now_s + job.predicted_s <= shadow_s
                if job.gpus >= refused[short]:
                    continue
                parts = cluster.fit(job.gpus, frozenset() if short else kept)
                if parts is not None:
                    self._start(job, parts, now_s, starts, cluster, ends)
                    continue
                refused[short] = job.gpus
                if refused[True] == 1:
                    break
        _undo(cluster, starts)
        return [], starts

    def _start(
        self,
        job: Job,
        parts: Parts,
        now_s: float,
        starts: list[tuple[str, Parts]],
        cluster: Cluster,
        ends: list[list[float]],
    ) -> None:
        cluster.take(parts)
        starts.append((job.job_id, parts))
        _mark(ends, parts, now_s + job.predicted_s)


class Preemptive:
    """At every event the first by `rank` that fit together run, on whatever nodes; all others stop, at no cost."""

    def __init__(
        self, rank: Callable[[float, Job, Run | None], float], wake: Callable[[float, Run], float] | None
    ) -> None:
        self.rank = rank
        self.wake = wake

    def wake_s(self, now_s: float, running: dict[str, Run]) -> float | None:
        """Return when a running job's rank next changes."""
        if self.wake is None or not running:
            return None
        return min(self.wake(now_s, run) for run in running.values())

    def decide(self, now_s: float, waiting: dict[str, Job], running: dict[str, Run], cluster: Cluster) -> Decision:
        """Keep in place who runs on; pack the newly chosen around them, moving others when that is needed."""
        active = [(self.rank(now_s, job, None), job.submit_s, job.job_id, job) for job in waiting.values()]
        active += [(self.rank(now_s, r.job, r), r.job.submit_s, r.job.job_id, r.job) for r in running.values()]
        empty = Cluster(cluster.nodes, cluster.gpus_per_node)
        chosen: dict[str, Parts] = {}
        refused = 1 << 30
        for _, _, job_id, job in sorted(active):
            if job.gpus >= refused:
                continue
            run = running.get(job_id)
            in_place = run is not None and all(empty.free[node] & mask == mask for node, mask in run.parts)
            parts = run.parts if run is not None and in_place else empty.fit(job.gpus)
            if parts is None:
                refused = min(refused, job.gpus)
                if refused == 1:
                    break
                continue
            empty.take(parts)
            chosen[job_id] = parts
        stops = [job_id for job_id, run in running.items() if chosen.get(job_id) != run.parts]
        starts = [(job_id, parts) for job_id, parts in chosen.items() if job_id not in running or job_id in stops]
        return stops, starts


class LeastAttained(Preemptive):
    """Least attained service in three queues (1 and 10 GPU-hours), by arrival within each, as Tiresias does."""

    LIMITS_GPU_S = (3600.0, 36000.0)

    def __init__(self) -> None:
        self._attained: dict[str, float] = {}
        super().__init__(self._queue, self._next_limit)

    def _used(self, now_s: float, job: Job, run: Run | None) -> float:
        done = self._attained.get(job.job_id, 0.0)
        if run is not None:
            done = (job.actual_s - run.left_s + now_s - run.since_s) * job.gpus
            self._attained[job.job_id] = done
        return done

    def _queue(self, now_s: float, job: Job, run: Run | None) -> float:
        used = self._used(now_s, job, run)
        return float(sum(used >= limit - 1e-6 for limit in self.LIMITS_GPU_S))

    def _next_limit(self, now_s: float, run: Run) -> float:
        used = self._used(now_s, run.job, run)
        left = [limit - used for limit in self.LIMITS_GPU_S if limit - used > 1e-6]
        return now_s + left[0] / run.job.gpus if left else float("inf")


def preemptive_oracle() -> Preemptive:
    """Return the policy that knows actual durations, preempts and moves at no cost: least remaining area first."""
    return Preemptive(_RemainingArea(), None)


class _RemainingArea:
    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def __call__(self, now_s: float, job: Job, run: Run | None) -> float:
        if run is not None:
            self._left[job.job_id] = run.left_s - (now_s - run.since_s)
        return self._left.get(job.job_id, job.actual_s) * job.gpus


def _undo(cluster: Cluster, starts: Sequence[tuple[str, Parts]]) -> None:
    """Give back what was only tried: the simulation takes it when it carries out the decision."""
    for _, parts in starts:
        cluster.give_back(parts)


def _mark(ends: list[list[float]], parts: Parts, end_s: float) -> None:
    for node, mask in parts:
        for gpu in range(len(ends[node])):
            if mask >> gpu & 1:
                ends[node][gpu] = end_s


def _shadow(gpus: int, gpus_per_node: int, ends: list[list[float]]) -> tuple[float, frozenset[int]]:
    """Return when a job of `gpus` GPUs can start at the earliest, and the nodes kept for it."""
    kept: set[int] = set()
    shadow = 0.0
    left = gpus
    while left > 0:
        width = min(left, gpus_per_node)
        time_s, node = min((sorted(times)[width - 1], n) for n, times in enumerate(ends) if n not in kept)
        kept.add(node)
        shadow = max(shadow, time_s)
        left -= width
    return shadow, frozenset(kept)
