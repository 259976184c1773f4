"""The virtual schedule as plainly as it can be said: what the compiled one must say too, to the last bit.

See alto_placement.first_come for what it is; here every row is looked at in every snapshot and every list made anew.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from alto_placement.planner.fitting import matches
from alto_placement.planner.model import Choice, Node, NodeState, RunningTask, Snapshot, WaitingTask

REMEMBERED = 1000  # starts whose waits count
BACKFILL_DEPTH = 256  # how far behind the first in line to look for who fits
PRIOR_S = 100 * 3600.0  # of tasks that took what was predicted: weight of predictions as they are
LEAST_S = 1e-3

Parts = dict[str, int]
"""GPUs by node."""


@dataclass(slots=True)
class _Task:
    """A task that waits or runs virtually. `seconds` is the best that is known of its duration."""

    row: WaitingTask
    predicted_s: float
    seconds: float
    really_began_s: float | None = None
    parts: Parts = field(default_factory=dict)  # empty while it waits
    began_s: float = 0.0

    @property
    def end_s(self) -> float:
        return self.began_s + self.seconds

    @property
    def shapes(self) -> tuple[tuple[int, str, int, bool], ...]:
        return tuple((one.gpus, one.gpu_kind, one.memory_bytes, one.one_node) for one in self.row.choices)


class FirstCome:
    """The virtual schedule. Shown every snapshot in turn, it says how long its tasks had to wait at most."""

    def __init__(self) -> None:
        self._now_s = self._shown_s = -math.inf  # of the schedule; of the last snapshot
        self._nodes: Sequence[Node] = ()
        self._free: dict[str, int] = {}
        self._present: dict[str, _Task] = {}  # in reality: in the last snapshot
        self._tasks: dict[str, _Task] = {}  # that wait or run virtually
        self._queue: list[tuple[float, str]] = []  # arrived_s, task_id
        self._running: dict[str, _Task] = {}
        self._waits_s: deque[float] = deque(maxlen=REMEMBERED)
        self._first = ""  # task_id of the first in line that does not fit
        self._first_wait_s = 0.0  # the longest that it was predicted to wait
        self._ready_for: dict[tuple[str, int], list[Node]] = {}  # by kind and memory
        self._predicted_s = self._taken_s = PRIOR_S  # of all tasks that ended

    @property
    def longest_wait_s(self) -> float:
        """The longest wait of the last starts and, predicted, of the first in line."""
        return max([self._first_wait_s, *self._waits_s])

    def line(self) -> list[str]:
        """Return who waits virtually, first come first."""
        return [task_id for _, task_id in self._queue]

    def running(self) -> list[tuple[str, list[tuple[str, int]], float, float]]:
        """Return what runs virtually: task, GPUs by node, beginning and end."""
        return [(one, list(run.parts.items()), run.began_s, run.end_s) for one, run in self._running.items()]

    def follow(self, snapshot: Snapshot) -> None:
        """Carry the schedule on to the time of `snapshot` and take in what it says. A clock that went back stands."""
        self._carry_on(max(self._now_s, snapshot.now_s))
        if list(snapshot.nodes) != self._nodes:
            self._take_nodes(list(snapshot.nodes))
        rows: dict[str, WaitingTask | RunningTask] = {row.task_id: row for row in snapshot.waiting}
        rows.update((row.task_id, row) for row in snapshot.running)
        for task_id in [task_id for task_id in self._present if task_id not in rows]:
            self._note_end(self._present.pop(task_id))
        for task_id, row in rows.items():
            if task_id not in self._present:
                self._present[task_id] = self._tasks.get(task_id) or self._take_in(row)
            if isinstance(row, RunningTask):
                self._note_run(row, self._present[task_id])
        self._present = {task_id: self._present[task_id] for task_id in rows}  # in the order of these rows
        self._shown_s = self._now_s
        self._carry_on(self._now_s)

    # --- what really happens ---

    def _take_in(self, row: WaitingTask | RunningTask) -> _Task:
        """Put a new task in line; one that runs already, when the schedule begins, runs on where it is."""
        if isinstance(row, WaitingTask):
            predicted_s = min(choice.duration.expected_s for choice in row.choices)
            task = _Task(row, predicted_s, predicted_s * self._taken_s / self._predicted_s)
            self._tasks[row.task_id] = task
            insort(self._queue, (row.arrived_s, row.task_id))
            return task
        seconds = max(LEAST_S, row.expected_end_s - row.started_s)
        task = _Task(WaitingTask(row.task_id, row.tenant, row.resume, row.started_s), seconds, seconds)
        parts = {part.node_id: len(part.gpu_indices) for part in row.parts}
        if not row.guest_of and all(self._free.get(node_id, 0) >= gpus for node_id, gpus in parts.items()):
            self._tasks[row.task_id] = task
            self._place(row.task_id, parts, row.started_s)
        return task

    def _note_run(self, row: RunningTask, task: _Task) -> None:
        task.really_began_s = row.started_s
        seconds = row.expected_end_s - row.started_s
        if not math.isclose(seconds, task.predicted_s, rel_tol=1e-6):  # it was corrected while it runs
            task.seconds = max(LEAST_S, seconds)

    def _note_end(self, task: _Task) -> None:
        """A task is gone in reality: virtually it lasts as long as it really did."""
        # Who was not seen running ran between two snapshots, or was taken back: hardly at all either way.
        began_s = self._shown_s if task.really_began_s is None else task.really_began_s
        task.seconds = max(LEAST_S, self._now_s - began_s)
        if task.really_began_s is not None:
            self._taken_s += task.seconds
            self._predicted_s += task.predicted_s
        elif task.row.task_id in self._tasks and not task.parts and not self._is_placeable(task):
            self._queue.remove((task.row.arrived_s, task.row.task_id))
            del self._tasks[task.row.task_id]

    def _take_nodes(self, nodes: Sequence[Node]) -> None:
        """Take in how the cluster is now; what runs virtually on a node that is gone waits again."""
        self._nodes = nodes
        self._ready_for.clear()
        alive = {node.node_id: node.gpus for node in nodes if node.state is not NodeState.LOST}
        for task_id, task in list(self._running.items()):
            if any(gpus > alive.get(node_id, 0) for node_id, gpus in task.parts.items()):
                del self._running[task_id]
                task.parts = {}
                if task.row.choices and task_id in self._present:
                    insort(self._queue, (task.row.arrived_s, task_id))
                else:
                    del self._tasks[task_id]
        self._free = {node.node_id: node.gpus for node in nodes}
        for task in self._running.values():
            for node_id, gpus in task.parts.items():
                self._free[node_id] -= gpus

    # --- the virtual schedule ---

    def _carry_on(self, until_s: float) -> None:
        """End and start what ends and starts until then."""
        while True:
            next_s = min((task.end_s for task in self._running.values()), default=math.inf)
            if next_s > until_s:
                break
            self._now_s = max(self._now_s, next_s)
            for task_id in [task_id for task_id, task in self._running.items() if task.end_s <= self._now_s]:
                self._end(task_id)
            self._start()
        self._now_s = until_s
        self._start()

    def _end(self, task_id: str) -> None:
        task = self._running.pop(task_id)
        for node_id, gpus in task.parts.items():
            self._free[node_id] += gpus
        del self._tasks[task_id]

    def _place(self, task_id: str, parts: Parts, at_s: float) -> None:
        task = self._running[task_id] = self._tasks[task_id]
        task.parts, task.began_s = parts, at_s
        for node_id, gpus in parts.items():
            self._free[node_id] -= gpus

    def _begin(self, task_id: str, parts: Parts) -> None:
        self._place(task_id, parts, self._now_s)
        self._waits_s.append(self._now_s - self._tasks[task_id].row.arrived_s)

    def _start(self) -> None:
        """Start the first while they fit, then who ends before the next of them can start or leaves its nodes alone."""
        line: list[str] = []  # from the first that does not fit
        gone: set[str] = set()
        for _, task_id in self._queue:
            task = self._tasks[task_id]
            if not self._is_placeable(task):
                continue
            parts = self._fit(task, frozenset()) if not line else None
            if parts is not None:
                self._begin(task_id, parts)
                gone.add(task_id)
                continue
            line.append(task_id)
            if len(line) == BACKFILL_DEPTH:
                break
        if self._first and self._first not in line[:1]:
            self._waits_s.append(self._first_wait_s)
            self._first, self._first_wait_s = "", 0.0
        if line:
            first = self._tasks[line[0]]
            start_s, kept = self._earliest(first)
            self._first, self._first_wait_s = line[0], max(self._first_wait_s, start_s - first.row.arrived_s)
            gone |= self._backfill(line[1:], start_s, kept)
        if gone:
            self._queue = [one for one in self._queue if one[1] not in gone]

    def _backfill(self, line: Sequence[str], first_start_s: float, kept: frozenset[str]) -> set[str]:
        """Start who fits and does not delay the first in line, who has `kept` from `first_start_s` on."""
        gone: set[str] = set()
        refused: set[tuple[bool, object]] = set()
        for task_id in line:
            task = self._tasks[task_id]
            is_short = self._now_s + task.predicted_s <= first_start_s
            if (is_short, task.shapes) in refused:
                continue
            parts = self._fit(task, frozenset() if is_short else kept)
            if parts is None:
                refused.add((is_short, task.shapes))
            else:
                self._begin(task_id, parts)
                gone.add(task_id)
        return gone

    def _fit(self, task: _Task, barred: frozenset[str]) -> Parts | None:
        """Return GPUs for a task now, each part on the fullest node that has them; None where it does not fit."""
        for choice in task.row.choices:
            free = {node.node_id: self._free[node.node_id] for node in self._ready(choice)}
            parts: Parts = {}
            for width in self._widths(choice):
                fitting = [
                    one for one, gpus in free.items() if gpus >= width and one not in parts and one not in barred
                ]
                if not fitting:
                    break
                parts[min(fitting, key=lambda one: free[one])] = width
            if parts and sum(parts.values()) == choice.gpus:
                return parts
        return None

    def _earliest(self, task: _Task) -> tuple[float, frozenset[str]]:
        """Return when a task can start at the earliest, and the nodes that it then takes."""
        ends: dict[str, list[tuple[float, int]]] = {}
        for run in self._running.values():
            for node_id, gpus in run.parts.items():
                predicted_s = max(self._now_s, run.began_s + run.predicted_s)
                ends.setdefault(node_id, []).append((predicted_s, gpus))
        best: tuple[float, frozenset[str]] = (math.inf, frozenset())
        for choice in task.row.choices:
            kept: set[str] = set()
            start_s = self._now_s
            for width in self._widths(choice):
                found = [
                    (self._free_from(node.node_id, width, ends.get(node.node_id, [])), node.node_id)
                    for node in self._ready(choice)
                    if node.node_id not in kept and node.gpus >= width
                ]
                if not found:
                    break
                at_s, node_id = min(found)
                kept.add(node_id)
                start_s = max(start_s, at_s)
            else:
                if kept and start_s < best[0]:
                    best = start_s, frozenset(kept)
        return best

    def _free_from(self, node_id: str, width: int, ends: list[tuple[float, int]]) -> float:
        free = self._free[node_id]
        if free >= width:
            return self._now_s
        for end_s, gpus in sorted(ends):
            free += gpus
            if free >= width:
                return end_s
        return math.inf

    def _ready(self, choice: Choice) -> list[Node]:
        key = choice.gpu_kind, choice.memory_bytes
        if key not in self._ready_for:
            ready = [node for node in self._nodes if node.state is NodeState.READY and matches(choice, node)]
            self._ready_for[key] = sorted(ready, key=lambda node: -node.gpus)
        return self._ready_for[key]

    def _is_placeable(self, task: _Task) -> bool:
        return any(self._widths(choice) for choice in task.row.choices)

    def _widths(self, choice: Choice) -> list[int]:
        """Return the GPUs of each part: whole nodes, widest first, and a remainder; none where they do not suffice."""
        widths: list[int] = []
        left = choice.gpus
        for node in self._ready(choice):
            widths.append(min(left, node.gpus))
            left -= widths[-1]
            if left == 0:
                return [] if choice.one_node and len(widths) > 1 else widths
        return []
