"""Which server a command talks to, and under which credential."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alto_cli import exit_codes
from alto_cli.client_file import ClientFile
from alto_cli.failures import CommandError
from alto_cli.options import Target

if TYPE_CHECKING:
    from alto_client import AltoClient, OperatorClient


def connect(target: Target) -> AltoClient:
    """Return a client of a server; what is not given comes from the file of `alto up`.

    The local key goes to the local server only: naming another server without a key is refused. That server speaks
    plaintext: root certificates are for others.
    """
    from alto_client import AltoClient

    local = ClientFile.load()
    server, api_key = target.server, target.api_key
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
    if target.root_certificates is None or (local is not None and server == local.address):
        return AltoClient(server, api_key)
    try:
        return AltoClient(server, api_key, root_certificates=target.root_certificates.read_bytes())
    except ValueError as error:
        raise CommandError(
            f"{target.root_certificates}: {error}", "name another file: --root-certificates, ALTO_ROOT_CERTIFICATES"
        ) from None


def connect_as_operator() -> OperatorClient:
    """Return a client of the placement service that `alto up` runs on this machine."""
    from alto_client import OperatorClient

    local = ClientFile.load()
    if local is None:
        raise CommandError(
            "no services run on this machine", "start them with `alto up`", exit_code=exit_codes.UNREACHABLE
        )
    return OperatorClient(local.placement_address, local.service_token)
