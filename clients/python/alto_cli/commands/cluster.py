"""The commands for who runs ALTO: they talk to the placement service that `alto up` started on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, Task


def plan(json_output: Json = False) -> None:
    """Show the plan: which task goes where, and when."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.show_plan(json_output)


def why(task: Task, json_output: Json = False) -> None:
    """Tell why a task waits, and until when."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.why(task, json_output)


def nodes(json_output: Json = False) -> None:
    """List the nodes."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.show_nodes(json_output)


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's id.", show_default=False)],
    undo: Annotated[bool, typer.Option("--undo", help="Let the node take work again.")] = False,
    json_output: Json = False,
) -> None:
    """Empty a node; its tasks go on elsewhere."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.drain(node, undo, json_output)
