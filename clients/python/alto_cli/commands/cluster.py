"""The commands about the cluster. But for `why` they are for who runs ALTO, and talk to the services of `alto up`."""

from __future__ import annotations

from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import ApiKey, Json, RootCertificates, Server, Target, TaskOrNewest

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's id.", show_default=False)]


def plan(
    watch: Annotated[bool, typer.Option("--watch", help="Follow it: show each new plan.")] = False,
    json_output: Json = False,
) -> None:
    """Show the plan: which task goes where, and when."""
    with failures(json_output):
        from alto_cli import cluster

        (cluster.watch_plan if watch else cluster.show_plan)(json_output)


def why(
    task: TaskOrNewest = "",
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Tell why a task waits, until when, what would help."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.why(task, Target(server, api_key, root_certificates), json_output)


def nodes(json_output: Json = False) -> None:
    """List the nodes."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.show_nodes(json_output)


def drain(
    node: Node,
    undo: Annotated[bool, typer.Option("--undo", help="Let the node take work again.")] = False,
    json_output: Json = False,
) -> None:
    """Empty a node; its tasks go on elsewhere."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.drain(node, undo, json_output)


def cordon(node: Node, json_output: Json = False) -> None:
    """Let a node take no more work."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.cordon(node, True, json_output)


def uncordon(node: Node, json_output: Json = False) -> None:
    """Let a node take work again."""
    with failures(json_output):
        from alto_cli import cluster

        cluster.cordon(node, False, json_output)
