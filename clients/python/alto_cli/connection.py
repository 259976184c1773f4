"""Which server a command talks to, and under which credential."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alto_cli import exit_codes
from alto_cli.client_file import ClientFile
from alto_cli.failures import CommandError
from alto_cli.options import OperatorTarget, Target

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
    with certificates_named(target.root_certificates):
        return AltoClient(server, api_key, root_certificates=target.root_certificates.read_bytes())


def connect_as_operator(target: OperatorTarget) -> OperatorClient:
    """Return a client of placement; what is not given comes from the file of `alto up`, as for `connect`."""
    from alto_client import OperatorClient

    local = ClientFile.load()
    placement, token = target.placement, target.service_token
    if not placement:
        if local is None:
            raise CommandError(
                "no placement is known",
                "start the services on this machine: alto up",
                "or name one: --placement HOST:PORT --service-token TOKEN (or ALTO_PLACEMENT and ALTO_SERVICE_TOKEN)",
                exit_code=exit_codes.UNREACHABLE,
            )
        placement = local.placement_address
    is_local = local is not None and placement == local.placement_address
    if not token:
        if local is None or not is_local:
            raise CommandError(
                f"no service token for {placement}",
                "give one with ALTO_SERVICE_TOKEN or --service-token",
                exit_code=exit_codes.PERMISSION,
            )
        token = local.service_token
    if is_local:
        return OperatorClient(placement, token)
    if (target.client_certificate is None) != (target.client_key is None):
        raise CommandError(
            "a certificate and its key go together",
            "give both: --client-certificate and --client-key, or ALTO_CLIENT_CERTIFICATE and ALTO_CLIENT_KEY",
        )
    pair = None
    if target.client_certificate is not None and target.client_key is not None:
        pair = target.client_certificate.read_bytes(), target.client_key.read_bytes()
    with certificates_named(target.root_certificates or placement):
        roots = None if target.root_certificates is None else target.root_certificates.read_bytes()
        return OperatorClient(placement, token, root_certificates=roots, client_certificate=pair)


@contextmanager
def certificates_named(source: Path | str) -> Iterator[None]:
    """Say which file, or which address, a client could not be made with."""
    try:
        yield
    except ValueError as error:
        cure = "name another file: --root-certificates, ALTO_ROOT_CERTIFICATES"
        raise CommandError(f"{source}: {error}", *([cure] if isinstance(source, Path) else [])) from None
