"""Starting and stopping a gRPC server: the options all services share, health, reflection, and a graceful end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import Authenticator, Scope
from alto_common.rpc.interceptor import MAX_MESSAGE_BYTES, CallInterceptor, Check, validate
from alto_common.rpc.tls import TlsFiles, server_credentials

SERVER_OPTIONS: list[tuple[str, int]] = [
    # What gRPC itself refuses carries no ErrorInfo, so a request that is not much too large gets as far as a handler.
    ("grpc.max_receive_message_length", 2 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Two servers on one port would share calls unseen: refuse instead.
    ("grpc.so_reuseport", 0),
]

log = structlog.get_logger("alto.server")


class Server:
    """One listening port with its services, over TLS with `tls`, its calls counted by `monitoring`.

    `check` judges each request; whoever gives another one has it call `validate`, which holds the contract's rules.
    Constructing it may raise TlsError. `stop` says NOT_SERVING first, then gives calls `grace_s` seconds.
    """

    def __init__(
        self,
        listen: str,
        authenticator: Authenticator,
        scopes: Mapping[str, Scope],
        service_names: Sequence[str],
        tls: TlsFiles | None = None,
        monitoring: Monitoring | None = None,
        check: Check = validate,
    ) -> None:
        self.listen = listen
        self.port = 0
        interceptor = CallInterceptor(authenticator, scopes, monitoring or Monitoring(), check)
        self.grpc = grpc.aio.server(interceptors=[interceptor], options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        self._service_names = tuple(service_names)
        self._credentials = None if tls is None else server_credentials(tls)

    async def start(self) -> None:
        """Bind the port and serve, NOT_SERVING until `set_serving`. Raises RuntimeError when the port is taken."""
        await self.set_serving(False)
        try:
            if self._credentials is None:
                self.port = self.grpc.add_insecure_port(self.listen)
            else:
                self.port = self.grpc.add_secure_port(self.listen, self._credentials)
        except RuntimeError as error:
            await self.grpc.stop(None)
            raise RuntimeError(f"cannot listen on {self.listen!r}") from error
        if self._credentials is None and not is_loopback(self.listen):
            log.warning(
                "listening without TLS where other machines may come: who is on the way can read and change all that "
                "is sent, API keys, the service token, datasets and adapters included",
                listen=self.listen,
                cure="give the service a certificate (ALTO_..._TLS_CERTIFICATE and _TLS_KEY, see docs/tls.md), or "
                "listen on 127.0.0.1 behind a proxy that speaks TLS",
            )
        await self.grpc.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks whether the service can do its work."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Stop serving."""
        await self.set_serving(False)
        await self.grpc.stop(grace_s)


def is_loopback(listen: str) -> bool:
    """Return whether only this machine can connect to an address that a server listens on."""
    if listen.startswith(("unix:", "unix-abstract:")):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def run_until_signal(
    start: Callable[[], Awaitable[None]],
    stop: Callable[[], Awaitable[None]],
    name: str,
    facts: Callable[[], Mapping[str, object]] = dict,
) -> None:
    """Start a service, log what serves and its `facts`, wait for SIGTERM or SIGINT, and stop it.

    One that cannot start is stopped, with what it has begun, and says why by what it raises.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        await start()
    except BaseException:
        await stop()
        raise
    log.info("serving", service=name, **facts())
    await stopping.wait()
    log.info("stopping", service=name)
    await stop()
