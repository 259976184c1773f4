"""What the commands for operators do."""

from __future__ import annotations

from datetime import UTC, datetime

from alto.v1 import placement_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from alto_cli import exit_codes
from alto_cli.connection import connect_as_operator
from alto_cli.failures import CommandError
from alto_cli.output import print_facts, print_json, print_message, print_table, say
from alto_cli.view.wording import bytes_text, duration_text, percent_text
from alto_cli.wire_json import as_json, enum_word


def show_plan(json_output: bool) -> None:
    """Print the plan."""
    with connect_as_operator() as client:
        plan = client.plan()
    if json_output:
        print_message(plan)
        return
    rows = [
        [
            task.task_id,
            task.tenant,
            _state(task),
            task.node_id or "-",
            " ".join(map(str, task.gpu_indices)) or "-",
            _in(task.start_time) if task.HasField("start_time") else "-",
            _in(task.end_time) if task.HasField("end_time") else "-",
            _why(task),
        ]
        for task in plan.tasks
    ]
    columns = ["task", "tenant", "state", "node", "gpus", "start", "end", "why"]
    print_table(columns, rows, empty="nothing is planned: every task has ended")
    makespan = plan.makespan.ToTimedelta().total_seconds()
    bound = plan.makespan_lower_bound.ToTimedelta().total_seconds()
    if rows and makespan > 0:
        gap = f"; no plan can be shorter than {duration_text(bound)} (gap {percent_text(1 - bound / makespan)})"
        say(f"all done in {duration_text(makespan)}{gap if bound > 0 else ''}")


def why(task_id: str, json_output: bool) -> None:
    """Print why one task waits."""
    with connect_as_operator() as client:
        plan = client.plan()
    task = next((task for task in plan.tasks if task.task_id == task_id), None)
    if task is None:
        raise CommandError(
            f"{task_id} is not in the plan",
            "it has ended, or there is no such task: see `alto show` and `alto list`",
            exit_code=exit_codes.NOT_FOUND,
        )
    if json_output:
        print_message(task)
        return
    start = task.queue.predicted_start_time if task.HasField("queue") else task.start_time
    end = task.queue.predicted_end_time if task.HasField("queue") else task.end_time
    print_facts(
        [
            ("task", task.task_id),
            ("state", _state(task)),
            ("why", _why(task)),
            ("reason", task.queue.reason),
            ("node", task.node_id),
            ("start", _in(start) if start.seconds else ""),
            ("end", _in(end) if end.seconds else ""),
            ("attempts", str(task.attempts)),
        ]
    )


def show_nodes(json_output: bool) -> None:
    """Print the nodes."""
    with connect_as_operator() as client:
        nodes = client.nodes()
    if json_output:
        print_json({"nodes": [as_json(node) for node in nodes]})
        return
    rows = [
        [
            node.node_id,
            enum_word(placement_pb2.NodeState.DESCRIPTOR, node.state).lower(),
            node.gpu_kind,
            f"{node.gpus_in_use}/{node.gpus}",
            bytes_text(node.memory_bytes_per_gpu),
            node.address,
            node.version,
            _in(node.last_seen_time) if node.HasField("last_seen_time") else "-",
        ]
        for node in nodes
    ]
    columns = ["node", "state", "kind", "in use", "memory each", "address", "version", "seen"]
    print_table(columns, rows, empty="no node has joined yet")


def drain(node_id: str, undo: bool, json_output: bool) -> None:
    """Empty a node, or let it take work again."""
    with connect_as_operator() as client:
        node = client.cordon(node_id, cordoned=False) if undo else client.drain(node_id)
    if json_output:
        print_message(node)
    else:
        say(f"{node_id} is {enum_word(placement_pb2.NodeState.DESCRIPTOR, node.state).lower()}")


def _state(task: placement_pb2.PlannedTask) -> str:
    return enum_word(placement_pb2.PlacementState.DESCRIPTOR, task.state).lower().replace("_", " ")


def _why(task: placement_pb2.PlannedTask) -> str:
    return task.failure.message if task.HasField("failure") else task.queue.explanation


def _in(stamp: Timestamp) -> str:
    seconds = (stamp.ToDatetime(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    return f"in {duration_text(seconds)}" if seconds >= 0 else f"{duration_text(-seconds)} ago"
