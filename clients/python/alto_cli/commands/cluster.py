"""The commands about the cluster. But for `why` they are for who runs ALTO, and talk to placement."""

from __future__ import annotations

from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, OperatorTarget, Target, TaskOrNewest, with_target

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's id.", show_default=False)]


@with_target
def plan(
    watch: Annotated[bool, typer.Option("--watch", help="Follow it: show each new plan.")] = False,
    *,
    target: OperatorTarget,
    json_output: Json = False,
) -> None:
    """Show the plan: which task goes where, and when."""
    with failures(json_output):
        from alto_cli import cluster

        (cluster.watch_plan if watch else cluster.show_plan)(target, json_output)


@with_target
def why(task: TaskOrNewest = "", *, target: Target, json_output: Json = False) -> None:
    """Tell why a task waits, until when, what would help."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.why(task, target, json_output)


@with_target
def nodes(target: OperatorTarget, json_output: Json = False) -> None:
    """List the nodes."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.show_nodes(target, json_output)


@with_target
def drain(
    node: Node,
    undo: Annotated[bool, typer.Option("--undo", help="Let the node take work again.")] = False,
    *,
    target: OperatorTarget,
    json_output: Json = False,
) -> None:
    """Empty a node; its tasks go on elsewhere."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.drain(node, undo, target, json_output)


@with_target
def cordon(node: Node, target: OperatorTarget, json_output: Json = False) -> None:
    """Let a node take no more work."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.cordon(node, True, target, json_output)


@with_target
def uncordon(node: Node, target: OperatorTarget, json_output: Json = False) -> None:
    """Let a node take work again."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.cordon(node, False, target, json_output)
