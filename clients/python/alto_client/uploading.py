"""Uploading a dataset: in chunks, hashed, and carried on after a break from where the server's bytes end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import dataset_pb2, error_pb2
from alto.v1.admission_service_pb2_grpc import AdmissionServiceStub

from alto_client.backoff import Backoff, OnRetry
from alto_client.connection import CHUNK_BYTES, Connection
from alto_client.errors import AltoError

# Called with (bytes sent, bytes in all).
OnProgress = Callable[[int, int], None]
# Deadline of one stream: a minute, and the time that 64 KiB/s takes.
SLOWEST_BYTES_PER_S = 64 * 1024


def upload_header(path: Path, display_name: str = "") -> messages.DatasetUploadHeader:
    """Return the header of an upload. Its request_id follows from content and names: the same file is the same dataset.

    Raises OSError when the file cannot be read.
    """
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size_bytes = stream.tell()
    name = display_name or path.name
    identity = hashlib.sha256("\0".join((sha256, path.name, name)).encode()).hexdigest()
    return messages.DatasetUploadHeader(
        request_id=f"upload-{identity[:40]}",
        display_name=name,
        file_name=path.name,
        size_bytes=size_bytes,
        sha256=sha256,
    )


class Upload:
    """One file on its way. `run` returns its dataset, however often the connection breaks within `patience_s`."""

    def __init__(
        self,
        connection: Connection,
        stub: AdmissionServiceStub,
        path: Path,
        header: messages.DatasetUploadHeader,
        *,
        patience_s: float = 120.0,
        on_progress: OnProgress | None = None,
        on_disconnect: OnRetry | None = None,
    ) -> None:
        self._connection = connection
        self._stub = stub
        self._path = path
        self._header = header
        self._on_progress = on_progress
        self._backoff = Backoff(patience_s, on_disconnect)

    def run(self) -> dataset_pb2.Dataset:
        """Send what the server does not have yet and return the dataset; raises `AltoError`."""
        furthest = 0
        while True:
            committed = 0
            try:
                kept = self._kept()
                if kept.HasField("dataset"):
                    self._progress(self._header.size_bytes)
                    return kept.dataset
                committed = kept.committed_bytes
                return self._send(committed)
            except AltoError as error:
                moved = error.reason == error_pb2.ERROR_REASON_OFFSET_MISMATCH
                if not moved and not error.is_connection_loss:
                    raise
                if committed > furthest:
                    furthest = committed
                    self._backoff.succeeded()
                self._backoff.wait(error)

    def _kept(self) -> messages.GetDatasetUploadResponse:
        """Return what the server has of this upload."""
        request = messages.GetDatasetUploadRequest(request_id=self._header.request_id)
        try:
            return self._connection.call(self._stub.GetDatasetUpload, request)
        except AltoError as error:
            if error.reason != error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND:
                raise
            return messages.GetDatasetUploadResponse()

    def _send(self, offset: int) -> dataset_pb2.Dataset:
        timeout_s = 60.0 + (self._header.size_bytes - offset) / SLOWEST_BYTES_PER_S
        return self._connection.call(self._stub.UploadDataset, self._messages(offset), timeout_s).dataset

    def _messages(self, offset: int) -> Iterator[messages.UploadDatasetRequest]:
        yield messages.UploadDatasetRequest(header=self._header)
        with self._path.open("rb") as stream:
            stream.seek(offset)
            while data := stream.read(CHUNK_BYTES):
                yield messages.UploadDatasetRequest(chunk=messages.DatasetChunk(offset=offset, data=data))
                offset += len(data)
                self._progress(offset)

    def _progress(self, sent_bytes: int) -> None:
        if self._on_progress is not None:
            self._on_progress(sent_bytes, self._header.size_bytes)
