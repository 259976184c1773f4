"""What the commands about the cluster do: for operators, and for who wants to know why a task waits."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime

from alto.v1 import placement_pb2
from alto_client.operator import without_ended
from google.protobuf.timestamp_pb2 import Timestamp

from alto_cli.connection import connect, connect_as_operator
from alto_cli.newest import task_or_newest
from alto_cli.options import OperatorTarget, Target
from alto_cli.output import print_facts, print_json, print_message, print_table, say
from alto_cli.view.gantt import RUNNING, gantt_lines, task_letters
from alto_cli.view.why import why_facts
from alto_cli.view.wording import bytes_text, duration_text, percent_text
from alto_cli.wire_json import as_json, enum_word

CLEAR_SCREEN = "\x1b[2J\x1b[H"


def show_plan(target: OperatorTarget, json_output: bool) -> None:
    """Print the plan."""
    with connect_as_operator(target) as client:
        plan = client.plan()
    if json_output:
        print_message(plan)
    else:
        print_plan(plan)


def watch_plan(target: OperatorTarget, json_output: bool) -> None:
    """Print the plan and each new one, until interrupted; on a terminal each takes the place of the one before."""
    with connect_as_operator(target) as client:
        for plan in client.watch_plan():
            if json_output:
                print_message(plan)
                continue
            if sys.stdout.isatty():
                print(CLEAR_SCREEN, end="")
            # A watch tells of each task that has ended once more; a chart is of those that have not.
            print_plan(without_ended(plan))


def print_plan(plan: placement_pb2.Plan) -> None:
    """Print a plan as a chart with a table under it."""
    now = datetime.now(UTC)
    letters = task_letters(plan)
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    for line in gantt_lines(plan, letters, now, shutil.get_terminal_size((100, 24)).columns, is_unicode):
        print(line)
    tasks = sorted(plan.tasks, key=lambda task: task.start_time.ToDatetime() if task.node_id else datetime.max)
    rows = [
        [
            letters.get(task.task_id, "-"),
            task.task_id,
            task.tenant,
            _state(task),
            _in(task.start_time) if task.HasField("start_time") else "-",
            _in(task.end_time) if task.HasField("end_time") else "-",
            _why(task),
        ]
        for task in tasks
    ]
    columns = ["", "task", "tenant", "state", "start", "end", "why"]
    print_table(columns, rows, empty="nothing is planned: every task has ended")
    makespan = plan.makespan.ToTimedelta().total_seconds()
    bound = plan.makespan_lower_bound.ToTimedelta().total_seconds()
    if rows and makespan > 0:
        gap = f"; no plan can be shorter than {duration_text(bound)} (gap {percent_text(1 - bound / makespan)})"
        say(f"all done in {duration_text(makespan)}{gap if bound > 0 else ''}")


def why(task_id: str, target: Target, json_output: bool) -> None:
    """Print why a task is where it is."""
    with connect(target) as client:
        task = client.get_task(task_or_newest(client, task_id))
    if json_output:
        print_message(task)
    else:
        print_facts(why_facts(task, datetime.now(UTC)))


def show_nodes(target: OperatorTarget, json_output: bool) -> None:
    """Print the nodes."""
    with connect_as_operator(target) as client:
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
    for node in nodes:
        if node.HasField("rest"):
            say(f"{node.node_id} rests and takes work again {_in(node.rest.until_time)}, {_failures(node.rest)}")


def drain(node_id: str, undo: bool, target: OperatorTarget, json_output: bool) -> None:
    """Empty a node, or let it take work again."""
    with connect_as_operator(target) as client:
        _tell_node(client.cordon(node_id, cordoned=False) if undo else client.drain(node_id), json_output)


def cordon(node_id: str, cordoned: bool, target: OperatorTarget, json_output: bool) -> None:
    """Stop a node from taking more work, or let it again."""
    with connect_as_operator(target) as client:
        _tell_node(client.cordon(node_id, cordoned=cordoned), json_output)


def _tell_node(node: placement_pb2.Node, json_output: bool) -> None:
    if json_output:
        print_message(node)
    else:
        say(f"{node.node_id} is {enum_word(placement_pb2.NodeState.DESCRIPTOR, node.state).lower()}")


def _failures(rest: placement_pb2.NodeRest) -> str:
    count = "an attempt" if rest.failures == 1 else f"{rest.failures} attempts in a row"
    return f"because {count} failed there before the first step: {rest.message}"


def _state(task: placement_pb2.PlannedTask) -> str:
    return enum_word(placement_pb2.PlacementState.DESCRIPTOR, task.state).lower().replace("_", " ")


def _why(task: placement_pb2.PlannedTask) -> str:
    if task.HasField("failure"):
        return task.failure.message
    if task.state in RUNNING and task.forecast.is_guest:
        return f"shares {task.forecast.host_task_id}'s executor"
    return task.queue.explanation


def _in(stamp: Timestamp) -> str:
    seconds = (stamp.ToDatetime(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    return f"in {duration_text(seconds)}" if seconds >= 0 else f"{duration_text(-seconds)} ago"
