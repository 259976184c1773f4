"""The client of PlacementService, for who runs ALTO: the nodes, the plan, and why a task waits."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Self

from alto.v1 import placement_pb2
from alto.v1 import placement_service_pb2 as messages
from alto.v1.placement_service_pb2_grpc import PlacementServiceStub

from alto_client.connection import Connection

WATCH_TIMEOUT_S = 24 * 3600.0


class OperatorClient:
    """A connection to placement under the services' own token, to be used as a context manager.

    Over TLS as `Connection` says: a placement that has root certificates asks for a `client_certificate`.
    """

    def __init__(
        self,
        address: str,
        service_token: str,
        *,
        timeout_s: float = 30.0,
        root_certificates: bytes | None = None,
        client_certificate: tuple[bytes, bytes] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._connection = Connection(
            address,
            service_token,
            timeout_s=timeout_s,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
        )
        self._stub = PlacementServiceStub(self._connection.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def plan(self) -> placement_pb2.Plan:
        """Return the plan. Raises `AltoError`."""
        # However long it is: a stream has it in as many messages as it takes.
        with closing(self._plans(self._timeout_s)) as plans:
            return next(plans)

    def watch_plan(self) -> Iterator[placement_pb2.Plan]:
        """Yield the plan, then each new one. A task that ends is in one plan with that state. Raises `AltoError`."""
        return self._plans(WATCH_TIMEOUT_S)

    def _plans(self, timeout_s: float) -> Generator[placement_pb2.Plan, None, None]:
        plan = placement_pb2.Plan()
        for response in self._connection.stream(self._stub.WatchPlan, messages.WatchPlanRequest(), timeout_s):
            plan.MergeFrom(response.plan)
            if not response.continues:
                yield plan
                plan = placement_pb2.Plan()

    def nodes(self) -> list[placement_pb2.Node]:
        """Return the nodes."""
        return list(self._connection.call(self._stub.ListNodes, messages.ListNodesRequest()).nodes)

    def cordon(self, node_id: str, *, cordoned: bool) -> placement_pb2.Node:
        """Stop a node from taking more work, or let it again."""
        request = messages.CordonNodeRequest(node_id=node_id, cordoned=cordoned)
        return self._connection.call(self._stub.CordonNode, request).node

    def drain(self, node_id: str) -> placement_pb2.Node:
        """Empty a node: its tasks stop at a checkpoint and are placed elsewhere."""
        return self._connection.call(self._stub.DrainNode, messages.DrainNodeRequest(node_id=node_id)).node
