"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

Server = Annotated[
    str,
    typer.Option(
        envvar="ALTO_SERVER",
        show_default=False,
        help="Address, host:port or https://host:port. Default: the server of `alto up`.",
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(envvar="ALTO_API_KEY", show_default=False, help="Your API key. Default: the key of `alto up`."),
]
RootCertificates = Annotated[
    Path | None,
    typer.Option(
        envvar="ALTO_ROOT_CERTIFICATES",
        show_default=False,
        help="PEM file of who signed the server's certificate. Default: the public authorities.",
    ),
]
Placement = Annotated[
    str,
    typer.Option(
        envvar="ALTO_PLACEMENT",
        show_default=False,
        help="Address of placement, host:port or https://host:port. Default: that of `alto up`.",
    ),
]
ServiceToken = Annotated[
    str,
    typer.Option(
        envvar="ALTO_SERVICE_TOKEN", show_default=False, help="The services' own token. Default: that of `alto up`."
    ),
]
ClientCertificate = Annotated[
    Path | None,
    typer.Option(
        envvar="ALTO_CLIENT_CERTIFICATE",
        show_default=False,
        help="PEM file of your certificate, for a placement that asks for one.",
    ),
]
ClientKey = Annotated[
    Path | None, typer.Option(envvar="ALTO_CLIENT_KEY", show_default=False, help="PEM file of its key.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
TaskFileArgument = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The task file.", show_default=False)]
Task = Annotated[str, typer.Argument(metavar="TASK", help="The task's id.", show_default=False)]
TaskOrNewest = Annotated[
    str, typer.Argument(metavar="[TASK]", help="The task's id; the newest task without it.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="Number format of the frozen model: float32, bfloat16 or nf4.")]
Slots = Annotated[int | None, typer.Option(min=1, help="Most trials trained together.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: what torch chooses.")]


@dataclass(frozen=True)
class Target:
    """Which server a command talks to, and as whom; what is empty comes from the file of `alto up`."""

    server: Server = ""
    api_key: ApiKey = ""
    root_certificates: RootCertificates = None


@dataclass(frozen=True)
class OperatorTarget:
    """Which placement a command for operators talks to, and as whom; likewise."""

    placement: Placement = ""
    service_token: ServiceToken = ""
    root_certificates: RootCertificates = None
    client_certificate: ClientCertificate = None
    client_key: ClientKey = None


def with_target(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of its parameter `target` as options, where typer sees them."""
    parameters = signature(command, eval_str=True).parameters
    kind = parameters["target"].annotation
    options = signature(kind, eval_str=True).parameters
    taken = [
        one.replace(kind=Parameter.KEYWORD_ONLY)
        for parameter in parameters.values()
        for one in (options.values() if parameter.name == "target" else [parameter])
    ]

    @wraps(command)
    def flat(**values: Any) -> None:
        target = kind(**{name: values.pop(name) for name in options})
        command(**values, target=target)

    flat.__signature__ = Signature(taken)  # type: ignore[attr-defined]  # functions have one, the stubs do not know
    flat.__annotations__ = {one.name: one.annotation for one in taken}
    return flat
