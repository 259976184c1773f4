"""Which server a command talks to, and under which credential."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alto_cli import exit_codes
from alto_cli.client_file import ClientFile
from alto_cli.failures import CommandError

if TYPE_CHECKING:
    from alto_client import AltoClient, OperatorClient


def connect(server: str, api_key: str) -> AltoClient:
    """Return a client of `server`; what is not given comes from the file of `alto up`.

    The local key goes to the local server only: naming another server without a key is refused.
    """
    from alto_client import AltoClient

    local = ClientFile.load()
    if not server:
        if local is None:
            raise CommandError(
                "no server is known",
                "start one on this machine: alto up",
                "or name one: --server HOST:PORT --api-key KEY (or ALTO_SERVER and ALTO_API_KEY)",
                exit_code=exit_codes.UNREACHABLE,
            )
        server = local.address
    if not api_key:
        if local is None or server != local.address:
            raise CommandError(
                f"no API key for {server}", "give one with --api-key or ALTO_API_KEY", exit_code=exit_codes.PERMISSION
            )
        api_key = local.api_key
    return AltoClient(server, api_key)


def connect_as_operator() -> OperatorClient:
    """Return a client of the placement service that `alto up` runs on this machine."""
    from alto_client import OperatorClient

    local = ClientFile.load()
    if local is None:
        raise CommandError(
            "no services run on this machine", "start them with `alto up`", exit_code=exit_codes.UNREACHABLE
        )
    return OperatorClient(local.placement_address, local.service_token)
