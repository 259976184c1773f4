"""Asking a service whether it serves (grpc.health.v1)."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROBE_TIMEOUT_S = 1.0


class HealthProbe:
    """One service's health check over a channel that is kept."""

    def __init__(self, address: str) -> None:
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.initial_reconnect_backoff_ms", 100)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub: Any = health_pb2_grpc.HealthStub(self._channel)

    def is_serving(self) -> bool:
        """Return whether the service answers and says that it serves."""
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()
