"""Streams of snapshots in which everything happens that may: as a cluster shows them, and worse."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from alto_placement.planner import Choice, Duration, Node, NodeState, Part, RunningTask, Snapshot, WaitingTask

KINDS = ("h100", "a100")


class RandomStream:
    """A cluster to which anything may happen. Rows that did not change are the same objects, or not: it is drawn."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._now_s = 1000.0
        self._count = 0
        self._nodes = {f"n{index}": self._node(f"n{index}") for index in range(self._draw.randint(1, 7))}
        self._waiting: dict[str, WaitingTask] = {}
        self._running: dict[str, RunningTask] = {}
        self._gone: list[WaitingTask] = []
        self._rate = self._draw.choice((1, 2, 4))  # arrivals for each end
        self._copies_rows = self._draw.random() < 0.3

    def snapshots(self, count: int) -> Iterator[Snapshot]:
        """Return so many snapshots, each after a few events."""
        for _ in range(self._draw.choice((0, 0, 5, 5, 40, 40, 400))):
            self._arrive()
        for _ in range(count):
            for _ in range(self._draw.choice((0, 1, 1, 1, 3))):
                self._happen()
            self._now_s += self._draw.choice((0.0, 1.0, self._draw.expovariate(0.01), self._draw.expovariate(0.001)))
            yield self._shown()

    def _happen(self) -> None:
        events = [self._arrive] * 4 * self._rate + [self._start] * 8 + [self._end] * 4 + [self._correct] * 3
        events += [self._change_node, self._take_back, self._leave, self._return, self._turn_clock_back]
        self._draw.choice(events)()

    def _shown(self) -> Snapshot:
        waiting, running, nodes = [*self._waiting.values()], [*self._running.values()], [*self._nodes.values()]
        if self._copies_rows:
            waiting, running = (
                [dataclasses.replace(row) for row in waiting],
                [dataclasses.replace(row) for row in running],
            )
            nodes = [dataclasses.replace(node) for node in nodes]
        if self._draw.random() < 0.1:
            self._draw.shuffle(waiting)
            self._draw.shuffle(running)
            self._draw.shuffle(nodes)
        if self._draw.random() < 0.5:
            return Snapshot(self._now_s, nodes, waiting, running)
        return Snapshot(self._now_s, tuple(nodes), tuple(waiting), tuple(running))

    def _node(self, node_id: str) -> Node:
        draw = self._draw
        state = draw.choice((*[NodeState.READY] * 6, *NodeState))
        return Node(node_id, draw.choice(KINDS), draw.choice((1, 2, 4, 8, 8)), state, draw.choice((0, 40, 80)))

    def _choice(self) -> Choice:
        draw = self._draw
        seconds = draw.choice((60.0, draw.lognormvariate(7.0, 1.5)))
        gpus = draw.choice((1, 1, 1, 2, 2, 4, 8, 12, 20))
        memory = draw.choice((0, 0, 30, 40, 41, 80, 200))
        return Choice(gpus, Duration.certain(seconds), draw.choice(("", "", *KINDS)), memory, draw.random() < 0.4)

    def _arrive(self) -> None:
        self._count += 1
        choices = tuple(self._choice() for _ in range(self._draw.choice((1, 1, 1, 2, 3))))
        # Some are told late, and of one second there are several.
        arrived_s = self._now_s - self._draw.choice((0.0, 0.0, 50.0, 5000.0))
        row = WaitingTask(f"t{self._count % 97:02}-{self._count}", "ada", choices, arrived_s)
        self._waiting[row.task_id] = row

    def _start(self) -> None:
        """Start anything anywhere: what is shown need not be what a sound cluster would do."""
        if not self._waiting:
            return
        row = self._waiting.pop(self._draw.choice(list(self._waiting)))
        choice = self._draw.choice(row.choices)
        left, parts = choice.gpus, []
        for node in self._draw.sample(list(self._nodes.values()), len(self._nodes)):
            parts.append(Part(node.node_id, tuple(range(min(left, node.gpus)))))
            left -= len(parts[-1].gpu_indices)
            if left == 0:
                break
        seconds = choice.duration.expected_s * self._draw.choice((1.0, 1.0, self._draw.uniform(0.2, 3.0)))
        end_s = self._now_s + seconds
        guest_of = self._draw.choice(("", "", "", next(iter(self._running), "")))
        resume = self._draw.choice((row.choices, row.choices, ()))
        self._running[row.task_id] = RunningTask(
            row.task_id, "ada", tuple(parts), self._now_s, end_s, end_s, resume=resume, guest_of=guest_of
        )
        self._gone.append(row)

    def _end(self) -> None:
        if self._running:
            del self._running[self._draw.choice(list(self._running))]

    def _correct(self) -> None:
        if not self._running:
            return
        row = self._running[self._draw.choice(list(self._running))]
        end_s = self._now_s + self._draw.choice((-10.0, 5.0, self._draw.lognormvariate(6.0, 1.5)))
        self._running[row.task_id] = dataclasses.replace(row, expected_end_s=end_s)

    def _take_back(self) -> None:
        """A task that ran waits again."""
        known = {row.task_id: row for row in self._gone}
        back = [task_id for task_id in self._running if task_id in known]
        if back:
            task_id = self._draw.choice(back)
            del self._running[task_id]
            self._waiting[task_id] = known[task_id]

    def _leave(self) -> None:
        if self._waiting:
            self._gone.append(self._waiting.pop(self._draw.choice(list(self._waiting))))

    def _return(self) -> None:
        """A task that was gone comes again, perhaps with other choices."""
        if not self._gone:
            return
        row = self._draw.choice(self._gone)
        if row.task_id not in self._running:
            self._waiting[row.task_id] = dataclasses.replace(
                row, choices=self._draw.choice((row.choices, (self._choice(),)))
            )

    def _change_node(self) -> None:
        node_id = f"n{self._draw.randrange(9)}"
        known = self._nodes.get(node_id)
        if known is None or self._draw.random() < 0.2:
            self._nodes[node_id] = self._node(node_id)
        elif self._draw.random() < 0.2:
            del self._nodes[node_id]
        else:
            self._nodes[node_id] = dataclasses.replace(known, state=self._draw.choice(list(NodeState)))

    def _turn_clock_back(self) -> None:
        self._now_s -= 30.0
