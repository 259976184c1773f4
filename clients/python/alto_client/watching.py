"""Watching a task: one unbroken sequence of messages over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import grpc
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import error_pb2, tuning_pb2
from alto.v1.admission_service_pb2_grpc import AdmissionServiceStub

from alto_client.backoff import Backoff, OnRetry
from alto_client.connection import Connection
from alto_client.errors import AltoError

# A watch lives for hours; a deadline all the same, so that a server that forgot us does not keep us for ever.
STREAM_TIMEOUT_S = 3600.0
ENDED_STATES = (tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED, tuning_pb2.TASK_STATE_CANCELLED)


class Watch:
    """The messages of one task, in order, none lost and none repeated; iterate over it once.

    Yields snapshots, events and compaction marks (`WatchTuningTaskResponse`), never heartbeats. `resume_token` is
    always that of the last message handed out: kept somewhere, it lets another process carry on from there.

    After a disconnect the watch reconnects with that token. Should the server no longer keep the events behind it, the
    watch goes on with a fresh snapshot, which has everything that the lost events led to; but a token given by the
    caller that is too old raises RESUME_TOKEN_TOO_OLD, so that the caller decides. Ends after the task's last event.
    Raises `AltoError` for anything but a lost connection, and for that after `patience_s` seconds without one.
    """

    def __init__(
        self,
        connection: Connection,
        stub: AdmissionServiceStub,
        task_id: str,
        resume_token: str = "",
        *,
        patience_s: float = 600.0,
        on_disconnect: OnRetry | None = None,
    ) -> None:
        self.task_id = task_id
        self.resume_token = resume_token
        self._connection = connection
        self._stub = stub
        self._backoff = Backoff(patience_s, on_disconnect)
        self._last_sequence = 0
        self._state: tuning_pb2.TaskState.ValueType | None = None
        self._own_token = False

    def __iter__(self) -> Iterator[messages.WatchTuningTaskResponse]:
        """Yield the messages."""
        while True:
            try:
                yield from self._one_stream()
            except AltoError as error:
                if not self._can_reconnect(error):
                    raise
            else:
                if self._state is None or self._state in ENDED_STATES:
                    return
                self._backoff.wait(AltoError("the server ended the watch", status_code=grpc.StatusCode.UNAVAILABLE))

    def _one_stream(self) -> Iterator[messages.WatchTuningTaskResponse]:
        request = messages.WatchTuningTaskRequest(task_id=self.task_id, resume_token=self.resume_token)
        with closing(self._connection.stream(self._stub.WatchTuningTask, request, STREAM_TIMEOUT_S)) as stream:
            for message in stream:
                self._backoff.succeeded()
                is_news = self._is_news(message)
                self._note(message)
                if is_news:
                    yield message

    def _can_reconnect(self, error: AltoError) -> bool:
        """Wait for another attempt, or say that there is no point in one."""
        if error.reason == error_pb2.ERROR_REASON_RESUME_TOKEN_TOO_OLD and self._own_token:
            self.resume_token = ""
            self._last_sequence = 0
            return True
        if error.status_code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return True
        if error.is_connection_loss:
            self._backoff.wait(error)
            return True
        return False

    def _is_news(self, message: messages.WatchTuningTaskResponse) -> bool:
        kind = message.WhichOneof("message")
        return kind in ("snapshot", "compacted") or (kind == "event" and message.event.sequence > self._last_sequence)

    def _note(self, message: messages.WatchTuningTaskResponse) -> None:
        if message.resume_token:
            self.resume_token = message.resume_token
            self._own_token = True
        kind = message.WhichOneof("message")
        if kind == "snapshot":
            self._last_sequence = message.snapshot.task.last_event_sequence
            self._state = message.snapshot.task.state
        elif kind == "event":
            self._last_sequence = max(self._last_sequence, message.event.sequence)
            if message.event.WhichOneof("payload") == "task_state_changed":
                self._state = message.event.task_state_changed.state
