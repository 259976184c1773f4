"""The connection to a server: keep-alive, safe retries, a deadline and a credential on each call."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import grpc

from alto_client.errors import error_from_call

Response = TypeVar("Response")

CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# Only UNAVAILABLE is tried again: every call that changes something is idempotent, most by a request_id.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", SERVICE_CONFIG),
]


class Connection:
    """One channel and its credential. Failed calls raise `AltoError`.

    `address` is "host:port", or "https://host:port" for TLS with the certificates of public authorities, or with
    `root_certificates` (PEM), which imply it. `client_certificate` is a chain and its key (PEM), for a server that asks
    for one, and implies it too. `timeout_s` (seconds) is the deadline of calls that name none. Raises ValueError for
    roots that are none.
    """

    def __init__(
        self,
        address: str,
        bearer_token: str,
        *,
        timeout_s: float = 30.0,
        root_certificates: bytes | None = None,
        client_certificate: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        scheme, separator, rest = address.partition("://")
        scheme = scheme.lower() if separator else ""
        self.target = (rest if scheme in ("http", "https") else address).rstrip("/")
        if root_certificates is not None:
            _check_roots(root_certificates)
        if client_certificate is not None and scheme == "http":
            raise ValueError("client_certificate: is for TLS, which http:// is not")
        has_certificates = root_certificates is not None or client_certificate is not None
        self._over_tls = scheme == "https" or (has_certificates and scheme != "http")
        if self._over_tls:
            chain, key = client_certificate or (None, None)
            credentials = grpc.ssl_channel_credentials(root_certificates, key, chain)
            self.channel = grpc.secure_channel(self.target, credentials, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        self._metadata = (("authorization", f"Bearer {bearer_token}"),)

    def call(self, method: Callable[..., Response], request: Any, timeout_s: float | None = None) -> Response:
        """Make a call with one response; `request` is a message, or an iterator of messages."""
        try:
            return method(request, timeout=self.timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_call(error, self.target, over_tls=self._over_tls) from None

    def stream(
        self, method: Callable[..., Iterable[Response]], request: Any, timeout_s: float
    ) -> Generator[Response, None, None]:
        """Make a call with a stream of responses; closing the iterator cancels the call."""
        call: Any = method(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_from_call(error, self.target, over_tls=self._over_tls) from None
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self.channel.close()


def _check_roots(root_certificates: bytes) -> None:
    """Raise ValueError unless there is a certificate: gRPC would only say that it cannot connect."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Beside certificates a file may hold comments, in any encoding.
        context.load_verify_locations(cadata=root_certificates.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise ValueError("no certificate in PEM") from None
