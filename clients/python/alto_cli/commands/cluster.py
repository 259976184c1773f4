"""The commands about the cluster. But for `why` they are for who runs ALTO, and talk to placement."""

from __future__ import annotations

from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import (
    ApiKey,
    ClientCertificate,
    ClientKey,
    Json,
    OperatorTarget,
    Placement,
    RootCertificates,
    Server,
    ServiceToken,
    Target,
    TaskOrNewest,
)

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's id.", show_default=False)]


def plan(
    watch: Annotated[bool, typer.Option("--watch", help="Follow it: show each new plan.")] = False,
    placement: Placement = "",
    service_token: ServiceToken = "",
    root_certificates: RootCertificates = None,
    client_certificate: ClientCertificate = None,
    client_key: ClientKey = None,
    json_output: Json = False,
) -> None:
    """Show the plan: which task goes where, and when."""
    with failures(json_output):
        from alto_cli import cluster

        target = OperatorTarget(placement, service_token, root_certificates, client_certificate, client_key)
        (cluster.watch_plan if watch else cluster.show_plan)(target, json_output)


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


def nodes(
    placement: Placement = "",
    service_token: ServiceToken = "",
    root_certificates: RootCertificates = None,
    client_certificate: ClientCertificate = None,
    client_key: ClientKey = None,
    json_output: Json = False,
) -> None:
    """List the nodes."""
    with failures(json_output):
        from alto_cli import cluster

        target = OperatorTarget(placement, service_token, root_certificates, client_certificate, client_key)
        cluster.show_nodes(target, json_output)


def drain(
    node: Node,
    undo: Annotated[bool, typer.Option("--undo", help="Let the node take work again.")] = False,
    placement: Placement = "",
    service_token: ServiceToken = "",
    root_certificates: RootCertificates = None,
    client_certificate: ClientCertificate = None,
    client_key: ClientKey = None,
    json_output: Json = False,
) -> None:
    """Empty a node; its tasks go on elsewhere."""
    with failures(json_output):
        from alto_cli import cluster

        target = OperatorTarget(placement, service_token, root_certificates, client_certificate, client_key)
        cluster.drain(node, undo, target, json_output)


def cordon(
    node: Node,
    placement: Placement = "",
    service_token: ServiceToken = "",
    root_certificates: RootCertificates = None,
    client_certificate: ClientCertificate = None,
    client_key: ClientKey = None,
    json_output: Json = False,
) -> None:
    """Let a node take no more work."""
    with failures(json_output):
        from alto_cli import cluster

        target = OperatorTarget(placement, service_token, root_certificates, client_certificate, client_key)
        cluster.cordon(node, True, target, json_output)


def uncordon(
    node: Node,
    placement: Placement = "",
    service_token: ServiceToken = "",
    root_certificates: RootCertificates = None,
    client_certificate: ClientCertificate = None,
    client_key: ClientKey = None,
    json_output: Json = False,
) -> None:
    """Let a node take work again."""
    with failures(json_output):
        from alto_cli import cluster

        target = OperatorTarget(placement, service_token, root_certificates, client_certificate, client_key)
        cluster.cordon(node, False, target, json_output)
