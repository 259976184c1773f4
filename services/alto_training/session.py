"""The conversation with placement: register, then heartbeats and outcomes up, leases and assignments down; for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import cast

import grpc
import structlog
from alto.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc, tuning_pb2
from alto_common.rpc.channel import bearer_metadata
from alto_common.rpc.status import reason_in

from alto_training.assignments import EndedNotice, EndKind, Held, Turn
from alto_training.contact import Contact, in_words
from alto_training.node import TrainingNode

MIN_BACKOFF_S = 0.2
MAX_BACKOFF_S = 2.0
REGISTER_TIMEOUT_S = 5.0
# Heartbeats that may go unanswered, and the time that a connection may take, before it is given up.
MISSED_ANSWERS = 2
CONNECT_S = 1.0

_OUTCOMES = {
    EndKind.COMPLETED: placement_pb2.ASSIGNMENT_OUTCOME_COMPLETED,
    EndKind.STOPPED: placement_pb2.ASSIGNMENT_OUTCOME_STOPPED,
    EndKind.FAILED_RETRIABLE: placement_pb2.ASSIGNMENT_OUTCOME_FAILED_RETRIABLE,
    EndKind.FAILED: placement_pb2.ASSIGNMENT_OUTCOME_FAILED,
    EndKind.UNSHARED: placement_pb2.ASSIGNMENT_OUTCOME_UNSHARED,
}

log = structlog.get_logger("alto.node")


class SupersededError(Exception):
    """Another process has registered under this node's id."""


class PlacementSession:
    """Keeps a session with placement open. `is_connected` tells whether placement answers."""

    def __init__(
        self,
        node: TrainingNode,
        described: placement_pb2.Node,
        incarnation: str,
        channel: grpc.aio.Channel,
        service_token: str,
    ) -> None:
        self.is_connected = False
        self._node = node
        self._described = described
        self._incarnation = incarnation
        self._placement = placement_service_pb2_grpc.PlacementServiceStub(channel)
        self._metadata = bearer_metadata(service_token)
        self._heartbeat_s = 1.0
        self._contact = Contact("placement")

    async def run(self) -> None:
        """Stay in touch until cancelled. Raises SupersededError."""
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                await self._register()
                await self._talk()
            except grpc.RpcError as error:
                if reason_in(error) == "STATE_CONFLICT":
                    raise SupersededError(in_words(error)) from error
                if self.is_connected:
                    backoff_s = MIN_BACKOFF_S
                self._contact.failed(error)
            except Exception:
                # A message that this node cannot make sense of must not cost it everything else that it trains.
                log.exception("the session with placement broke; trying again")
            finally:
                self.is_connected = False
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _register(self) -> None:
        response = await self._placement.RegisterNode(
            placement_service_pb2.RegisterNodeRequest(node=self._described, incarnation=self._incarnation),
            metadata=self._metadata,
            timeout=REGISTER_TIMEOUT_S,
        )
        interval = response.heartbeat_interval
        self._heartbeat_s = max(0.05, interval.seconds + interval.nanos / 1e9)

    async def _talk(self) -> None:
        """One stream, until it breaks."""
        self._node.assignments.begin_session()
        call = self._placement.NodeSession(self._requests(), metadata=self._metadata)
        try:
            while True:
                # A connection that died without a word would otherwise cost the lease. Not wait_for: in Python 3.11 it
                # loses a cancellation that comes together with what it waits for, such as placement's own end.
                async with asyncio.timeout(self._heartbeat_s * MISSED_ANSWERS + CONNECT_S):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                self.is_connected = True
                self._contact.answered()
                self._node.obey(cast("placement_service_pb2.NodeSessionResponse", message))
        except TimeoutError:
            log.warning("placement has not answered for too long; connecting again")
        finally:
            call.cancel()

    async def _requests(self) -> AsyncIterator[placement_service_pb2.NodeSessionRequest]:
        first = True
        while True:
            self._node.changed.clear()
            turn = self._node.assignments.next_turn(self._node.clock(), first)
            first = False
            for request in self._messages(turn):
                yield request
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._node.changed.wait()

    def _messages(self, turn: Turn) -> list[placement_service_pb2.NodeSessionRequest]:
        heartbeat = placement_service_pb2.NodeHeartbeat(
            assignments=[_status(held) for held in turn.listed], leaving=turn.leaving
        )
        wire = placement_service_pb2.NodeSessionRequest
        node_id, incarnation = self._described.node_id, self._incarnation
        held = {one.assignment_id: one for one in turn.listed}
        ends = [
            wire(
                node_id=node_id,
                incarnation=incarnation,
                assignment_ended=_ended(notice, held[notice.assignment_id]),
            )
            for notice in turn.notices
        ]
        return [*ends, wire(node_id=node_id, incarnation=incarnation, heartbeat=heartbeat)]


def _status(held: Held) -> placement_service_pb2.AssignmentStatus:
    status = placement_service_pb2.AssignmentStatus(
        assignment_id=held.assignment_id,
        task_id=held.task_id,
        epoch=held.epoch,
        fraction_done=held.progress.fraction_done,
        tokens_per_second=held.progress.tokens_per_second,
        guest_memory_bytes=held.progress.guest_memory_bytes,
    )
    if held.progress.seconds_remaining is not None:
        status.time_remaining.FromMilliseconds(int(held.progress.seconds_remaining * 1000))
    if held.progress.measured:
        status.measured.ParseFromString(held.progress.measured)
    return status


def _ended(notice: EndedNotice, held: Held) -> placement_service_pb2.AssignmentEnded:
    ending = notice.ending
    cause = tuning_pb2.Failure(reason=ending.reason, message=ending.message) if ending.reason else None
    return placement_service_pb2.AssignmentEnded(
        assignment_id=notice.assignment_id,
        epoch=notice.epoch,
        outcome=_OUTCOMES[ending.kind],
        failure=cause,
        status=_status(held),
    )
