"""TrainingNodeService on the wire: a window for operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from alto.v1 import placement_pb2, training_node_service_pb2_grpc
from alto.v1 import training_node_service_pb2 as wire
from alto_common.errors import not_found
from alto_common.rpc.authentication import Scope

from alto_training.journal import JOURNAL_FILE, read_journal
from alto_training.node import TrainingNode

SERVICE = "alto.v1.TrainingNodeService"
SCOPES = {f"/{SERVICE}/{method}": Scope.SERVICE for method in ("GetNode", "GetExecutorState", "WatchAssignment")}
WATCH_POLL_S = 0.2


class TrainingNodeServicer(training_node_service_pb2_grpc.TrainingNodeServiceServicer):
    """Answers TrainingNodeService."""

    def __init__(self, node: TrainingNode, described: placement_pb2.Node) -> None:
        self._node = node
        self._described = described

    async def GetNode(self, request: wire.GetNodeRequest, context: Any) -> wire.GetNodeResponse:
        """Return the node."""
        described = placement_pb2.Node()
        described.CopyFrom(self._described)
        described.gpus_in_use = sum(len(running.held.gpu_indices) for running in self._node.supervisors.values())
        return wire.GetNodeResponse(node=described)

    async def GetExecutorState(
        self, request: wire.GetExecutorStateRequest, context: Any
    ) -> wire.GetExecutorStateResponse:
        """List what is being trained."""
        return wire.GetExecutorStateResponse(
            executors=[
                wire.ExecutorState(
                    assignment_id=running.held.assignment_id,
                    task_id=running.held.task_id,
                    epoch=running.held.epoch,
                    process_id=running.worker_process_id,
                    events_written=running.events_written,
                    events_acknowledged=running.reporter.acknowledged,
                    fraction_done=running.held.progress.fraction_done,
                    tokens_per_second=running.held.progress.tokens_per_second,
                )
                for running in self._node.supervisors.values()
            ]
        )

    async def WatchAssignment(
        self, request: wire.WatchAssignmentRequest, context: Any
    ) -> AsyncIterator[wire.WatchAssignmentResponse]:
        """Stream a running assignment's events from the first; the stream ends with the assignment."""
        running = self._node.supervisors.get(request.assignment_id)
        if running is None:
            raise not_found("assignment", request.assignment_id)
        path: Path = running.folder / JOURNAL_FILE
        offset = sequence = 0
        while True:
            is_running = request.assignment_id in self._node.supervisors
            for record in read_journal(path, offset, sequence):
                offset, sequence = record.end_offset, record.sequence
                yield wire.WatchAssignmentResponse(event=record.event)
            if not is_running:
                return
            await asyncio.sleep(WATCH_POLL_S)
