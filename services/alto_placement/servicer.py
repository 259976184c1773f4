"""PlacementService on the wire: each method turns its request into one call of the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
from alto.v1 import error_pb2, placement_pb2, placement_service_pb2_grpc
from alto.v1 import placement_service_pb2 as wire
from alto_common.errors import DomainError, invalid_fields, unavailable
from alto_common.rpc.authentication import Scope
from alto_common.rpc.interceptor import MAX_MESSAGE_BYTES
from alto_common.violations import Violation

from alto_placement.engine import PlacementEngine
from alto_placement.links import NodeLink
from alto_placement.settings import PlacementSettings
from alto_placement.state import TaskRow
from alto_placement.wire import (
    OUTCOMES,
    asked_from_wire,
    duration,
    estimate_to_wire,
    failure_from_wire,
    node_to_wire,
    order_to_wire,
    plan_parts,
    plan_to_wire,
    reported_from_wire,
    spec_from_wire,
    task_from_wire,
    task_to_wire,
)

SERVICE = "alto.v1.PlacementService"
SCOPES = {
    f"/{SERVICE}/{method}": Scope.SERVICE
    for method in (
        "EnqueueTask",
        "DequeueTask",
        "UpdateTask",
        "EstimateTask",
        "GetPlan",
        "WatchPlan",
        "RegisterNode",
        "NodeSession",
        "ListNodes",
        "CordonNode",
        "DrainNode",
    )
}
# A watcher gets at most this many plans a second, however often the plan changes.
PLANS_PER_S = 20
# However long a plan takes to make, the next is begun this long after it.
MOST_PAUSE_S = 1.0
# Of a plan in one message; the response around it takes a little, too.
PART_BYTES = MAX_MESSAGE_BYTES - 64


class PlacementServicer(placement_service_pb2_grpc.PlacementServiceServicer):
    """Answers PlacementService."""

    def __init__(self, engine: PlacementEngine, settings: PlacementSettings) -> None:
        self._engine = engine
        self._settings = settings

    async def EnqueueTask(self, request: wire.EnqueueTaskRequest, context: Any) -> wire.EnqueueTaskResponse:
        """Queue a task."""
        task = await self._engine.enqueue(task_from_wire(request, self._engine.now().wall_s))
        return wire.EnqueueTaskResponse(task=task_to_wire(task, self._engine.view()))

    async def DequeueTask(self, request: wire.DequeueTaskRequest, context: Any) -> wire.DequeueTaskResponse:
        """Take a task out."""
        await self._engine.dequeue(request.task_id)
        return wire.DequeueTaskResponse()

    async def UpdateTask(self, request: wire.UpdateTaskRequest, context: Any) -> wire.UpdateTaskResponse:
        """Hold a task, let it go, change its priority, stop trials."""
        task = await self._engine.update(
            request.task_id,
            held=request.held if request.HasField("held") else None,
            priority=request.priority if request.HasField("priority") else None,
            stop_trial_ids=tuple(request.stop_trial_ids),
        )
        return wire.UpdateTaskResponse(task=task_to_wire(task, self._engine.view()))

    async def EstimateTask(self, request: wire.EstimateTaskRequest, context: Any) -> wire.EstimateTaskResponse:
        """Predict a duration."""
        predicted, basis, gpu_kind = self._engine.estimate(asked_from_wire(request, self._engine.now().wall_s))
        return wire.EstimateTaskResponse(duration=estimate_to_wire(predicted), basis=basis, gpu_kind=gpu_kind)

    async def GetPlan(self, request: wire.GetPlanRequest, context: Any) -> wire.GetPlanResponse:
        """Return the plan, where one message holds it."""
        first, *rest = await self._plan()
        if rest:
            tasks = sum(len(part.tasks) for part in (first, *rest))
            message = f"the plan has {tasks:,} tasks, more than one message holds: WatchPlan sends it in several"
            raise DomainError(error_pb2.ERROR_REASON_STATE_CONFLICT, message)
        return wire.GetPlanResponse(plan=first)

    async def WatchPlan(self, request: wire.WatchPlanRequest, context: Any) -> AsyncIterator[wire.WatchPlanResponse]:
        """Stream the plan."""
        watch = self._engine.open_watch()
        try:
            while True:
                await watch.changed.wait()
                watch.changed.clear()
                if self._engine.is_stopping:
                    raise unavailable("placement is shutting down")
                began_s = time.monotonic()
                parts = await self._plan(watch.take_ended())
                made_s = time.monotonic() - began_s
                for number, part in enumerate(parts, start=1):
                    yield wire.WatchPlanResponse(plan=part, continues=number < len(parts))
                # A long plan takes a while to make: what else there is to do has half of the time.
                await asyncio.sleep(min(max(1 / PLANS_PER_S, made_s), MOST_PAUSE_S))
        finally:
            self._engine.close_watch(watch)

    async def _plan(self, ended: Sequence[TaskRow] = ()) -> list[placement_pb2.Plan]:
        """Make the messages of the plan in a thread: those of a long queue take longer than a heartbeat may wait."""
        view = self._engine.view(ended)
        view = dataclasses.replace(view, state=view.state.copy())
        return await asyncio.to_thread(lambda: list(plan_parts(plan_to_wire(view), PART_BYTES)))

    async def RegisterNode(self, request: wire.RegisterNodeRequest, context: Any) -> wire.RegisterNodeResponse:
        """Make a node known."""
        await self._engine.register(spec_from_wire(request.node), request.incarnation)
        return wire.RegisterNodeResponse(
            lease_duration=duration(self._settings.lease_s), heartbeat_interval=duration(self._settings.heartbeat_s)
        )

    async def NodeSession(
        self, requests: AsyncIterator[wire.NodeSessionRequest], context: Any
    ) -> AsyncIterator[wire.NodeSessionResponse]:
        """Talk with a node."""
        first = await anext(aiter(requests), None)
        if first is None:
            return
        if not first.HasField("heartbeat"):
            raise invalid_fields([Violation("message", first.WhichOneof("message"), "begin with a heartbeat")])
        link = self._engine.open_link(first.node_id, first.incarnation)
        reader = asyncio.create_task(self._read(link, first, requests))
        try:
            while (order := await link.outbox.get()) is not None:
                yield order_to_wire(order, self._settings.lease_s)
            if reader.done():
                reader.result()
            else:
                raise unavailable("this session has been replaced, or placement is shutting down")
        finally:
            reader.cancel()
            # What the reader raised has been raised above, or nobody is left to hear it.
            with suppress(asyncio.CancelledError, DomainError, grpc.RpcError):
                await reader
            self._engine.close_link(link)

    async def _read(
        self, link: NodeLink, first: wire.NodeSessionRequest, requests: AsyncIterator[wire.NodeSessionRequest]
    ) -> None:
        try:
            await self._take(link, first)
            async for request in requests:
                await self._take(link, request)
        finally:
            link.close()

    async def _take(self, link: NodeLink, request: wire.NodeSessionRequest) -> None:
        if (request.node_id, request.incarnation) != (link.node_id, link.incarnation):
            raise invalid_fields([Violation("node_id", request.node_id, "one session is for one node")])
        if request.HasField("heartbeat"):
            heard_s = self._engine.now().monotonic_s
            reported = [reported_from_wire(status, heard_s) for status in request.heartbeat.assignments]
            await self._engine.heartbeat(link, reported, request.heartbeat.leaving)
            return
        ended = request.assignment_ended
        outcome = OUTCOMES.get(ended.outcome)
        if outcome is None:
            raise invalid_fields([Violation("assignment_ended.outcome", ended.outcome, "name one of the outcomes")])
        heard_s = self._engine.now().monotonic_s
        last = reported_from_wire(ended.status, heard_s) if ended.HasField("status") else None
        failure = failure_from_wire(ended)
        await self._engine.assignment_ended(link, ended.assignment_id, ended.epoch, outcome, failure, last)

    async def ListNodes(self, request: wire.ListNodesRequest, context: Any) -> wire.ListNodesResponse:
        """List the nodes."""
        view = self._engine.view()
        return wire.ListNodesResponse(nodes=[node_to_wire(node, view) for node in view.state.nodes.values()])

    async def CordonNode(self, request: wire.CordonNodeRequest, context: Any) -> wire.CordonNodeResponse:
        """Stop a node from taking more work, or let it again."""
        node = await self._engine.cordon(request.node_id, request.cordoned)
        return wire.CordonNodeResponse(node=node_to_wire(node, self._engine.view()))

    async def DrainNode(self, request: wire.DrainNodeRequest, context: Any) -> wire.DrainNodeResponse:
        """Empty a node."""
        node = await self._engine.drain(request.node_id)
        return wire.DrainNodeResponse(node=node_to_wire(node, self._engine.view()))
