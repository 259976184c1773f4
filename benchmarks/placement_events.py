"""The placement service under a stream of events, without its wire and its database: what a re-plan costs it.

The engine is the service's own: state, forecasts that learn, snapshot, virtual first come first served, plan, orders,
what watchers are told. Its store keeps nothing. Each event is an arrival or a natural end; before it, the heartbeats
that come in 0.2 s are taken in (a node sends one every 3 s). Runs are some 7 % faster or slower than predicted and
searches end after 40 to 100 % of their work, so that what is predicted keeps moving.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Sequence
from typing import Any

from alto_placement.durations import Measured
from alto_placement.engine import PlacementEngine
from alto_placement.lifecycle import Reported
from alto_placement.links import NodeLink
from alto_placement.policy import ObjectiveWeights
from alto_placement.settings import PlacementSettings
from alto_placement.state import (
    AssignmentRow,
    Changes,
    ClusterState,
    Moment,
    NodeSpec,
    Outcome,
    Progress,
    TaskRow,
    WorkSize,
)
from alto_placement.store import PlacementStore

GIB = 2**30
TOKENS_PER_TICK = 8192.0
HEARTBEATS_PER_EVENT = 0.2 / 3.0  # of each node
MODELS = {"small": 1_000_000_000, "middle": 3_000_000_000, "large": 8_000_000_000}


class NoStore(PlacementStore):
    """Keeps nothing: its time is not the planner's."""

    def __init__(self) -> None:
        pass

    async def task(self, task_id: str) -> TaskRow | None:
        """Return nothing."""
        return None

    async def save(self, changes: Changes) -> None:
        """Keep nothing."""

    async def load(self, ended_since_s: float = 0.0) -> ClusterState:
        """Return an empty cluster."""
        return ClusterState()


class EventStream:
    """An engine with a full cluster and a long queue, and the events that come to it."""

    def __init__(self, tasks: int, gpus: int, seed: int, wait_patience: float) -> None:
        self.draw = random.Random(seed)
        self.moment = Moment(0.0, 1e9)
        settings = PlacementSettings(
            service_token="none",
            plan_budget_s=0,
            decision_budget_s=0,
            objective=ObjectiveWeights(wait_patience=wait_patience),
        )
        self.engine = PlacementEngine(NoStore(), settings, lambda: self.moment)
        self.links = [NodeLink(f"n{index:05}", "first") for index in range(gpus // 8)]
        self.waiting_at_first = tasks
        self.number = 0
        self.next_to_report = 0
        self.speeds: dict[str, float] = {}
        self.ends: list[tuple[float, str]] = []

    async def fill(self) -> None:
        """Register the nodes and queue the tasks."""
        for link in self.links:
            await self.engine.register(NodeSpec(link.node_id, "h100", 8, 80 * GIB), link.incarnation)
        for _ in range(self.waiting_at_first):
            await self.engine.enqueue(self.task())

    def task(self) -> TaskRow:
        """Return a new task."""
        self.number += 1
        model = self.draw.choice(list(MODELS))
        steps = max(50, int(self.draw.lognormvariate(8.0, 1.0)))
        gpus = self.draw.choice((1, 2, 4, 8))
        size = WorkSize(
            train_tokens=int(steps * TOKENS_PER_TICK * 4 * gpus),
            steps=steps,
            total_lora_rank=64,
            base_parameters=MODELS[model],
            expected_share=0.7,
            trials=8,
            longest_steps=steps,
            shape=f"halving-{self.number % 3}",
            least_memory_bytes=20 * GIB,
            adapter_memory_bytes=GIB,
        )
        name = f"t{self.number:07}"
        return TaskRow(name, f"tenant{self.number % 20}", b"", model, gpus, "", size, self.moment.wall_s)

    def note_starts(self) -> None:
        """Draw how each run that is new goes on."""
        for row in self.engine.state.assignments.values():
            if row.assignment_id not in self.speeds:
                task = self.engine.state.tasks[row.task_id]
                full_s = 1.4 * self.engine.estimate(task)[0].expected_s * self.draw.lognormvariate(0.0, 0.07)
                self.speeds[row.assignment_id] = full_s
                end_s = row.started_s + full_s * self.draw.uniform(0.4, 1.0)
                heapq.heappush(self.ends, (end_s, row.assignment_id))

    def reported(self, row: AssignmentRow) -> Reported:
        """Return what its node says of a run."""
        size = self.engine.state.tasks[row.task_id].size
        elapsed_s = self.moment.wall_s - row.started_s
        fraction = min(1.0, elapsed_s / self.speeds[row.assignment_id])
        tokens = fraction * size.train_tokens
        ticks = tokens / TOKENS_PER_TICK
        measured = Measured(float(round(ticks)), tokens, 8.0 * round(ticks), elapsed_s)
        left = round((1.0 - fraction) * size.longest_steps)
        progress = Progress(fraction, self.moment.monotonic_s, measured, fraction, left)
        return Reported(row.assignment_id, row.epoch, progress)

    async def hear(self, links: Sequence[NodeLink]) -> None:
        """Take in a heartbeat of each of these nodes."""
        on_node: dict[str, list[AssignmentRow]] = {}
        for row in self.engine.state.assignments.values():
            on_node.setdefault(row.node_id, []).append(row)
        for link in links:
            await self.engine.heartbeat(link, [self.reported(row) for row in on_node.get(link.node_id, ())])
            while not link.outbox.empty():
                link.outbox.get_nowait()

    def next_links(self) -> list[NodeLink]:
        """Return the nodes whose heartbeats are due."""
        count = max(1, round(HEARTBEATS_PER_EVENT * len(self.links)))
        first, self.next_to_report = self.next_to_report, self.next_to_report + count
        return [self.links[index % len(self.links)] for index in range(first, first + count)]

    async def end_next(self) -> None:
        """Let time pass until the next run ends, and end it."""
        end_s, assignment_id = heapq.heappop(self.ends)
        passed_s = max(0.0, end_s - self.moment.wall_s)
        self.moment = Moment(self.moment.monotonic_s + passed_s, self.moment.wall_s + passed_s)
        row = self.engine.state.assignments[assignment_id]
        link = self.links[int(row.node_id[1:])]
        last = self.reported(row)
        await self.engine.assignment_ended(link, assignment_id, row.epoch, Outcome.COMPLETED, None, last)


async def measure_service(
    tasks: int, gpus: int, events: int, seed: int, wait_patience: float, warm_up: int = 0
) -> dict[str, Any]:
    """Return what events cost the service, in processor and wall ms: the event itself, and its re-plan.

    The first `warm_up` events are not counted: nothing is known then, and every heartbeat changes what is predicted.
    """
    stream = EventStream(tasks, gpus, seed, wait_patience)
    await stream.fill()
    began = time.process_time()
    await stream.engine._replan()
    first_ms = 1000 * (time.process_time() - began)
    stream.note_starts()
    wall, processor, heard = [], [], []
    for event in range(warm_up + events):
        began = time.process_time()
        await stream.hear(stream.next_links())
        heard.append(1000 * (time.process_time() - began))
        began_wall, began = time.perf_counter(), time.process_time()
        if event % 2 == 0:
            await stream.engine.enqueue(stream.task())
        else:
            await stream.end_next()
        await stream.engine._replan()
        wall.append(1000 * (time.perf_counter() - began_wall))
        processor.append(1000 * (time.process_time() - began))
        stream.note_starts()
    return {
        "tasks": tasks,
        "gpus": gpus,
        "events": events,
        "first_cpu_ms": round(first_ms, 1),
        **_quantiles("", wall[warm_up:]),
        **_quantiles("cpu_", processor[warm_up:]),
        **_quantiles("heartbeats_cpu_", heard[warm_up:]),
    }


def _quantiles(name: str, figures_ms: list[float]) -> dict[str, float]:
    ordered = sorted(figures_ms)
    return {
        f"{name}p50_ms": round(ordered[len(ordered) // 2], 2),
        f"{name}p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 2),
        f"{name}max_ms": round(ordered[-1], 2),
    }
