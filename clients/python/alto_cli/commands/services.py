"""The commands that start and stop ALTO's three services on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json


def up(
    port_base: Annotated[
        int, typer.Option(min=1, max=65532, help="First of four ports: admission, its internal side, placement, node.")
    ] = 7410,
    detach: Annotated[bool, typer.Option("--detach", help="Return once all serve; `alto down` stops them.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Most seconds to wait for all to serve.")] = 120,
    json_output: Json = False,
) -> None:
    """Start the three services here and look after them."""
    with failures(json_output):
        from alto_cli.up.command import up as start

        start(port_base, detach, timeout_s, json_output)


def down(
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Most seconds to wait.")] = 60,
    json_output: Json = False,
) -> None:
    """Stop the services of `alto up`."""
    with failures(json_output):
        from alto_cli.up.command import down as stop

        stop(timeout_s, json_output)


def status(json_output: Json = False) -> None:
    """Show the services of `alto up`."""
    with failures(json_output):
        from alto_cli.up.command import status as show

        show(json_output)
