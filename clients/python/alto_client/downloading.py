"""Downloading an adapter: each file checked by its SHA-256, written aside, renamed; carried on after a break."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import grpc
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import error_pb2, tuning_pb2
from alto.v1.admission_service_pb2_grpc import AdmissionServiceStub

from alto_client.backoff import Backoff, OnRetry
from alto_client.connection import Connection
from alto_client.errors import AltoError

OnProgress = Callable[[int, int], None]
STREAM_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class DownloadedAdapter:
    """An adapter that lies complete in `folder`."""

    folder: Path
    trial_id: str
    adapter: tuning_pb2.Adapter


class Download:
    """One adapter on its way into `folder`; `trial_id` empty means the best of the task.

    Another adapter that lies there is replaced only with `replace`.

    Files appear under their names only when all of them are complete and have the right SHA-256. What a broken
    download left behind (".part" files) is used by the next one, also of another process.
    """

    def __init__(
        self,
        connection: Connection,
        stub: AdmissionServiceStub,
        task_id: str,
        folder: Path,
        trial_id: str = "",
        *,
        replace: bool = False,
        patience_s: float = 120.0,
        on_progress: OnProgress | None = None,
        on_disconnect: OnRetry | None = None,
    ) -> None:
        self._connection = connection
        self._stub = stub
        self._request = messages.DownloadAdapterRequest(task_id=task_id, trial_id=trial_id)
        self._folder = folder
        self._replace = replace
        self._on_progress = on_progress
        self._backoff = Backoff(patience_s, on_disconnect)
        self._mistrusted = False

    def run(self) -> DownloadedAdapter:
        """Fetch the adapter.

        Raises `AltoError` (STATE_CONFLICT when another adapter lies in the folder), and OSError when the folder cannot
        be written.
        """
        while True:
            try:
                if done := self._attempt():
                    return done
            except AltoError as error:
                if not error.is_connection_loss:
                    raise
                self._backoff.wait(error)

    def _attempt(self) -> DownloadedAdapter | None:
        """Fetch what is missing; None when another attempt is due: the adapter changed, or a file was damaged."""
        header = self._header()
        # From here on the same trial, even if another one becomes the best meanwhile.
        self._request.trial_id = header.trial_id
        parts = _parts(self._folder, header.adapter)
        if not self._replace:
            self._refuse_to_replace(header.trial_id, parts)
        self._folder.mkdir(parents=True, exist_ok=True)
        total = sum(part.size_bytes for part in parts)
        while (offset := _kept_bytes(parts)) < total:
            if not self._receive(header, parts, offset, total):
                return None
        if damaged := [part for part in parts if not part.is_sound()]:
            self._discard(damaged)
            return None
        for part in parts:
            part.keep()
        return DownloadedAdapter(self._folder, header.trial_id, header.adapter)

    def _refuse_to_replace(self, trial_id: str, parts: list[_Part]) -> None:
        other = next((part.name for part in parts if part.holds_other_content()), None)
        if other is not None:
            raise AltoError(
                f"{self._folder} holds another adapter: its {other} is not that of {trial_id}; "
                "give another folder, or have it replaced: `--force`, in Python `replace=True`",
                reason=error_pb2.ERROR_REASON_STATE_CONFLICT,
                status_code=grpc.StatusCode.FAILED_PRECONDITION,
            )

    def _discard(self, damaged: list[_Part]) -> None:
        """Throw damaged files away, to be fetched once more; what is damaged twice is the server's fault."""
        for part in damaged:
            part.discard()
        if self._mistrusted:
            raise AltoError(
                f"{damaged[0].name} does not have the SHA-256 that the server announced",
                reason=error_pb2.ERROR_REASON_CONTENT_MISMATCH,
                status_code=grpc.StatusCode.DATA_LOSS,
            )
        self._mistrusted = True

    def _header(self) -> messages.AdapterHeader:
        self._request.offset = 0
        with closing(self._stream()) as stream:
            for message in stream:
                if message.WhichOneof("message") == "header":
                    return message.header
        raise AltoError("the server sent no list of files")

    def _receive(self, header: messages.AdapterHeader, parts: list[_Part], offset: int, total: int) -> bool:
        """Append what comes from `offset` on; return whether it was still the adapter of `header`."""
        self._request.offset = offset
        with closing(self._stream()) as stream:
            for message in stream:
                if message.WhichOneof("message") == "header":
                    if message.header != header:
                        return False
                    continue
                if message.chunk.offset != offset:
                    text = f"the server sent byte {message.chunk.offset} where {offset} was due"
                    raise AltoError(text, status_code=grpc.StatusCode.DATA_LOSS)
                _write(parts, offset, message.chunk.data)
                offset += len(message.chunk.data)
                self._backoff.succeeded()
                if self._on_progress is not None:
                    self._on_progress(offset, total)
        if offset < total:
            raise AltoError("the server ended the download early", status_code=grpc.StatusCode.UNAVAILABLE)
        return True

    def _stream(self) -> Generator[messages.DownloadAdapterResponse, None, None]:
        return self._connection.stream(self._stub.DownloadAdapter, self._request, STREAM_TIMEOUT_S)


class _Part:
    """One file of an adapter, whose content begins at `start` of them all.

    It is complete under its name, or grows aside under a name that holds its hash.
    """

    def __init__(self, folder: Path, file: tuning_pb2.AdapterFile, start: int) -> None:
        if not file.name or file.name != os.path.basename(file.name) or file.name.startswith("."):
            raise AltoError(f"the server named a file {file.name!r}: it would leave the folder")
        self.name = file.name
        self.size_bytes = file.size_bytes
        self.start = start
        self._sha256 = file.sha256
        self._path = folder / file.name
        self._aside = folder / f".{file.name}.{file.sha256[:16]}.part"
        self._complete = self._path.is_file() and _sha256(self._path) == self._sha256

    def kept_bytes(self) -> int:
        """Return how many bytes are there already."""
        if self._complete:
            return self.size_bytes
        return min(self._aside.stat().st_size, self.size_bytes) if self._aside.exists() else 0

    def holds_other_content(self) -> bool:
        """Return whether a file of this name is there that is not this one."""
        return not self._complete and self._path.exists()

    def write(self, position: int, data: bytes) -> None:
        """Put bytes at `position` of the content."""
        if not self._complete:
            with self._aside.open("r+b" if self._aside.exists() else "wb") as stream:
                stream.seek(position)
                stream.write(data)

    def is_sound(self) -> bool:
        """Return whether the content is what was announced."""
        if not self._complete and self.size_bytes == 0:
            self._aside.touch()
        return self._complete or _sha256(self._aside) == self._sha256

    def keep(self) -> None:
        """Give the file its name, once it is safe on the disk."""
        if self._complete:
            return
        with self._aside.open("rb") as stream:
            os.fsync(stream.fileno())
        self._aside.replace(self._path)

    def discard(self) -> None:
        """Forget the bytes that are there."""
        self._aside.unlink(missing_ok=True)


def _parts(folder: Path, adapter: tuning_pb2.Adapter) -> list[_Part]:
    parts: list[_Part] = []
    start = 0
    for file in adapter.files:
        parts.append(_Part(folder, file, start))
        start += file.size_bytes
    return parts


def _kept_bytes(parts: list[_Part]) -> int:
    """Return the length of the unbroken beginning of the files' contents, one after another."""
    for part in parts:
        if part.kept_bytes() < part.size_bytes:
            return part.start + part.kept_bytes()
    return sum(part.size_bytes for part in parts)


def _write(parts: list[_Part], offset: int, data: bytes) -> None:
    """Deal out bytes that begin at `offset` of all contents to the files they belong to."""
    for part in parts:
        position = max(offset - part.start, 0)
        piece = data[max(part.start - offset, 0) : max(part.start + part.size_bytes - offset, 0)]
        if piece:
            part.write(position, piece)
    if parts and offset + len(data) > parts[-1].start + parts[-1].size_bytes:
        raise AltoError("the server sent more bytes than it announced", status_code=grpc.StatusCode.DATA_LOSS)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
