"""Channels from one service to another: the credential on every call, keep-alive, and retries that are safe."""

from __future__ import annotations

import json

import grpc

from alto_common.rpc.interceptor import MAX_MESSAGE_BYTES
from alto_common.rpc.renewed_channel import RenewedChannel
from alto_common.rpc.tls import CurrentTls, TlsFiles

# Only UNAVAILABLE is tried again: every call that changes something is idempotent by an id.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
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
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", SERVICE_CONFIG),
]


def service_channel(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """Return a channel to another service at `address` (host:port), over TLS with `tls`. Raises TlsError."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return RenewedChannel(address, CurrentTls(tls), CHANNEL_OPTIONS)


def bearer_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a bearer credential."""
    return (("authorization", f"Bearer {token}"),)
