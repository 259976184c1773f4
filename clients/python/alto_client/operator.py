"""The client of PlacementService, for who runs ALTO: the nodes, the plan, and why a task waits."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Self

from alto.v1 import placement_pb2
from alto.v1 import placement_service_pb2 as messages
from alto.v1.placement_service_pb2_grpc import PlacementServiceStub

from alto_client.connection import Connection
from alto_client.errors import AltoError

WATCH_TIMEOUT_S = 24 * 3600.0
ENDED = (placement_pb2.PLACEMENT_STATE_FINISHED, placement_pb2.PLACEMENT_STATE_GIVEN_UP)


def without_ended(plan: placement_pb2.Plan) -> placement_pb2.Plan:
    """Return a plan with the tasks alone that have not ended."""
    going_on = [task for task in plan.tasks if task.state not in ENDED]
    del plan.tasks[:]
    plan.tasks.extend(going_on)
    return plan


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
        # A stream has it in as many messages as it takes; what ended lately is in its first plan, too.
        with closing(self._plans(self._connection.timeout_s)) as plans:
            plan = next(plans, None)
        if plan is None:
            raise AltoError("placement ended the stream before the plan was whole")
        return without_ended(plan)

    def watch_plan(self) -> Iterator[placement_pb2.Plan]:
        """Yield the plan, then each new one. A task that ends is in one plan with that state. Raises `AltoError`."""
        return self._plans(WATCH_TIMEOUT_S)

    def _plans(self, timeout_s: float) -> Generator[placement_pb2.Plan, None, None]:
        parts = []
        for response in self._connection.stream(self._stub.WatchPlan, messages.WatchPlanRequest(), timeout_s):
            parts.append(response.plan)
            if not response.continues:
                plan, *rest = parts
                for part in rest:
                    plan.MergeFrom(part)
                yield plan
                parts = []

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
