"""Latency of a re-plan: from an event (an arrival, a completion) to the new plan and its orders.

    make bench NAME=planner_scale

The cluster is full and the queue long. Each event changes one row, all others are the same objects and the planner has
its memory of them. The plan is the whole plan, with a
place for every task. Three queues of each size: `sizes`, all just arrived and no bound of waits; `waits_bounded`, the
same with waits bounded by first come first served, whose virtual schedule is shown every snapshot: a re-plan is then
both, and `follow` is the virtual schedule's part; `overdue`, so bounded too, of tasks that arrived during the last day,
so that GPUs are kept for most of them. `service` is the whole service without its wire and its database, see
`placement_events`: an event and its re-plan, from forecasts that move to orders; each size in a process of its own, as
a service is. The last line is one JSON object;
progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import structlog
from alto_placement.first_come import WaitBound
from alto_placement.planner import Choice, Duration, Memory, Node, RunningTask, Snapshot, WaitingTask, plan
from alto_placement.server import GARBAGE_THRESHOLDS
from alto_placement.simulator import violations
from placement_events import measure_service

SIZES = ((1_000, 256, 1000), (10_000, 1_024, 400), (100_000, 10_000, 200))
SERVICE_SIZES = ((10_000, 1_024, 300), (100_000, 10_000, 100))
SERVICE_WARM_UP = 100
WAIT_PATIENCE = 1.25  # x the longest wait of first come first served


def task(number: int, now_s: float, draw: random.Random) -> WaitingTask:
    choice = Choice(draw.choice((1, 2, 4, 8)), Duration.certain(draw.lognormvariate(8.0, 1.0)))
    return WaitingTask(f"t{number:07}", f"tenant{number % 20}", (choice,), now_s)


def measure(tasks: int, gpus: int, events: int, seed: int, patience: float, waited_s: float) -> dict[str, Any]:
    draw = random.Random(seed)
    nodes = tuple(Node(f"n{index:05}", "gpu", 8) for index in range(gpus // 8))
    memory, bound = Memory(), WaitBound(patience)
    now = 0.0
    arriving = (task(number, now - draw.uniform(0.0, waited_s), draw) for number in range(tasks))
    waiting = {row.task_id: row for row in arriving}
    running: dict[str, RunningTask] = {}
    number = tasks
    delays: list[float] = []
    processor: list[float] = []  # the same plans in processor time, which a busy machine disturbs less
    following: list[float] = []  # what of it the virtual schedule took, in processor time
    for event in range(-1, events):  # the first plan fills the cluster and is reported apart
        if event >= 0 and (event % 2 == 0 or not running):
            arrived = task(number, now, draw)
            waiting[arrived.task_id] = arrived
            number += 1
        elif event >= 0:
            ended = min(running.values(), key=lambda row: row.expected_end_s)
            now = max(now, ended.expected_end_s)
            del running[ended.task_id]
        began, began_processor = time.perf_counter(), time.process_time()
        snapshot = Snapshot(now, nodes, tuple(waiting.values()), tuple(running.values()), epoch=event + 1)
        began_following = time.process_time()
        snapshot = bound.applied(snapshot)
        following.append(1000 * (time.process_time() - began_following))
        answer = plan(snapshot, memory=memory)
        delays.append(1000 * (time.perf_counter() - began))
        processor.append(1000 * (time.process_time() - began_processor))
        if event in (-1, events - 1) and tasks <= 10_000:
            wrong = violations(snapshot, answer)
            if wrong:
                raise SystemExit(f"{tasks} x {gpus}: {wrong[:5]}")
        for placed in answer.starting:
            row = waiting.pop(placed.task_id)
            running[row.task_id] = RunningTask(
                row.task_id, row.tenant, placed.parts, placed.start_s, placed.end_s, placed.end_s
            )
    first, ordered, cpu, follow = delays[0], sorted(delays[1:]), sorted(processor[1:]), sorted(following[1:])
    figures = {
        "tasks": tasks,
        "gpus": gpus,
        "events": events,
        "first_ms": round(first, 2),
        "p50_ms": round(ordered[len(ordered) // 2], 3),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "max_ms": round(ordered[-1], 3),
        "cpu_p50_ms": round(cpu[len(cpu) // 2], 3),
        "cpu_p99_ms": round(cpu[int(0.99 * (len(cpu) - 1))], 3),
    }
    if not math.isinf(patience):
        figures |= {
            "follow_cpu_first_ms": round(following[0], 2),
            "follow_cpu_p50_ms": round(follow[len(follow) // 2], 3),
            "follow_cpu_p99_ms": round(follow[int(0.99 * (len(follow) - 1))], 3),
        }
    print(f"  {figures}", file=sys.stderr)
    return figures


def service(tasks: int, gpus: int, events: int, seed: int) -> dict[str, Any]:
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    figures = asyncio.run(measure_service(tasks, gpus, events, seed, WAIT_PATIENCE, SERVICE_WARM_UP))
    print(f"  {figures}", file=sys.stderr)
    return figures


def in_own_process(size: tuple[int, int, int], seed: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(service, *size, seed).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = {
        "benchmark": "planner_scale",
        "sizes": [measure(*size, options.seed, math.inf, 0.0) for size in SIZES],
        "waits_bounded": [measure(*size, options.seed, WAIT_PATIENCE, 0.0) for size in SIZES],
        "overdue": [measure(*size, options.seed, WAIT_PATIENCE, 86400.0) for size in SIZES],
        "service": [in_own_process(size, options.seed) for size in SERVICE_SIZES],
        "wait_patience": WAIT_PATIENCE,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
