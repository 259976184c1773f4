"""Bringing an assignment's journal to admission: in order, at least once, for as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path

import grpc
import structlog
from alto.v1 import report_service_pb2, report_service_pb2_grpc
from alto_common.rpc.status import reason_in

from alto_training.contact import Contact, in_words
from alto_training.journal import JOURNAL_FILE, Record, read_journal, write_acknowledged

BATCH_EVENTS = 500
POLL_S = 0.1
MAX_BACKOFF_S = 15.0
CALL_TIMEOUT_S = 30.0
# How a call fails when admission is not there, or does not know this node: nothing is wrong with the report.
_OUT_OF_CONTACT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED,
)

log = structlog.get_logger("alto.node")


class StaleEpochError(Exception):
    """Another assignment of the task has a higher epoch: this one must end at once and say nothing more."""


class UnknownTaskError(Exception):
    """Admission does not know the task: nobody waits for these events."""


class RefusedError(Exception):
    """Admission does not accept an event as it is, however often it is sent; the message says why."""


class Reporter:
    """Follows the journal in `folder` and reports it; `acknowledged` counts the events that admission has."""

    def __init__(
        self,
        reports: report_service_pb2_grpc.ReportServiceAsyncStub,
        contact: Contact,
        metadata: tuple[tuple[str, str], ...],
        folder: Path,
        task_id: str,
        epoch: int,
    ) -> None:
        self.acknowledged = 0
        self._reports = reports
        self._contact = contact
        self._metadata = metadata
        self._folder = folder
        self._task_id = task_id
        self._epoch = epoch
        self._offset = 0
        self._is_complete = False

    def complete(self) -> None:
        """Say that nothing will be added to the journal: `run` returns once all of it is acknowledged."""
        self._is_complete = True

    async def run(self) -> None:
        """Report until complete. Raises StaleEpochError, UnknownTaskError, RefusedError."""
        backoff_s = POLL_S
        while True:
            # Read before the batch: what is appended after this is in the next one.
            complete = self._is_complete
            batch = list(
                islice(read_journal(self._folder / JOURNAL_FILE, self._offset, self.acknowledged), BATCH_EVENTS)
            )
            if not batch:
                if complete:
                    return
                await asyncio.sleep(POLL_S)
                continue
            try:
                await self._send(batch)
                self._contact.answered()
                backoff_s = POLL_S
            except grpc.aio.AioRpcError as error:
                reason = reason_in(error)
                if reason == "EPOCH_STALE":
                    raise StaleEpochError from error
                if reason == "RESOURCE_NOT_FOUND":
                    raise UnknownTaskError from error
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise RefusedError(in_words(error)) from error
                if error.code() in _OUT_OF_CONTACT:
                    self._contact.failed(error)
                else:
                    log.warning(
                        "admission did not take a report; trying again", task_id=self._task_id, error=in_words(error)
                    )
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _send(self, batch: list[Record]) -> None:
        response = await self._reports.ReportEvents(
            self._requests(batch), metadata=self._metadata, timeout=CALL_TIMEOUT_S
        )
        for record in batch:
            if record.sequence <= response.acknowledged_sequence:
                self._offset, self.acknowledged = record.end_offset, record.sequence
        write_acknowledged(self._folder, self.acknowledged)

    async def _requests(self, batch: list[Record]) -> AsyncIterator[report_service_pb2.ReportEventsRequest]:
        for record in batch:
            yield report_service_pb2.ReportEventsRequest(
                task_id=self._task_id, epoch=self._epoch, sequence=record.sequence, event=record.event
            )
