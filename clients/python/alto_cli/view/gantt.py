"""The plan as a chart of characters: a lane for each GPU, time to the right, a letter for each task."""

from __future__ import annotations

import string
from collections.abc import Mapping
from datetime import UTC, datetime

from alto.v1 import placement_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from alto_cli.view.wording import duration_text, printable

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
MANY = "*"  # a task beyond the letters
LEAST_COLUMNS = 20
MOST_LANES = 64
RUNNING = (placement_pb2.PLACEMENT_STATE_ASSIGNED, placement_pb2.PLACEMENT_STATE_STOPPING)


def task_letters(plan: placement_pb2.Plan) -> dict[str, str]:
    """Return a letter for each task that has a place, in the order in which they start."""
    placed = [task for task in plan.tasks if task.node_id and task.HasField("end_time")]
    placed.sort(key=lambda task: (task.start_time.ToDatetime(), task.task_id))
    return {task.task_id: LETTERS[i] if i < len(LETTERS) else MANY for i, task in enumerate(placed)}


def gantt_lines(
    plan: placement_pb2.Plan, letters: Mapping[str, str], now: datetime, width: int, is_unicode: bool = True
) -> list[str]:
    """Return the chart, at most `width` wide. What runs is a letter on a bar, what is planned a letter on dots."""
    lanes = [(node.node_id, gpu) for node in plan.nodes for gpu in range(node.gpus)]
    shown = lanes[:MOST_LANES]
    placed = [task for task in plan.tasks if task.task_id in letters]
    if not shown or not placed:
        return []
    names = [f"{printable(node_id)}/{gpu}" for node_id, gpu in shown]
    label = max(len(name) for name in names)
    columns = max(LEAST_COLUMNS, width - label - 3)
    horizon_s = max(1.0, max(_seconds(task.end_time, now) for task in placed))
    per_column_s = horizon_s / columns
    bar, dots, edge = ("━", "┄", "│") if is_unicode else ("=", ".", "|")
    rows = {lane: [" "] * columns for lane in shown}
    for task in sorted(placed, key=lambda task: _seconds(task.start_time, now)):
        first = min(columns - 1, max(0, int(_seconds(task.start_time, now) / per_column_s)))
        last = min(columns, max(first + 1, round(_seconds(task.end_time, now) / per_column_s)))
        fill = bar if task.state in RUNNING else dots
        for gpu in task.gpu_indices:
            row = rows.get((task.node_id, gpu))
            if row is not None:
                row[first:last] = [letters[task.task_id], *([fill] * (last - first - 1))]
    lines = [f"{name.ljust(label)} {edge}{''.join(rows[lane])}{edge}" for name, lane in zip(names, shown, strict=True)]
    if len(lanes) > len(shown):
        lines.append(f"... and {len(lanes) - len(shown)} GPUs more")
    end = f"{duration_text(horizon_s)}"
    lines.append(f"{' ' * label} {'now'.ljust(columns + 2 - len(end))}{end}")
    return lines


def _seconds(stamp: Timestamp, now: datetime) -> float:
    return (stamp.ToDatetime(tzinfo=UTC) - now).total_seconds()
