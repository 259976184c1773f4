"""Uploads: bytes are kept aside as they come, and become a dataset once they are complete and every line is sound."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from alto.v1 import admission_service_pb2, dataset_pb2, error_pb2
from alto_common.artifacts import CHUNK_BYTES, ArtifactStore
from alto_common.dataset_rows import DatasetFacts, DatasetLimits, RowFormat
from alto_common.errors import DomainError, Reason, invalid_fields, not_found, unavailable
from alto_common.violations import Violation

from alto_admission.heavy_work import DamagedFile, check_file
from alto_admission.store.datasets import Dataset, DatasetStore, Upload
from alto_admission.worker import Worker

ENDINGS = (".jsonl", ".parquet")
ABANDONED_S = 7 * 24 * 3600
CLEAN_EVERY_S = 3600.0
UNFINISHED_SHOWN = 100
FORMATS: dict[RowFormat, dataset_pb2.DatasetFormat.ValueType] = {
    RowFormat.TEXT: dataset_pb2.DATASET_FORMAT_TEXT,
    RowFormat.PROMPT_COMPLETION: dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION,
    RowFormat.MESSAGES: dataset_pb2.DATASET_FORMAT_MESSAGES,
    RowFormat.ALPACA: dataset_pb2.DATASET_FORMAT_ALPACA,
    RowFormat.PREFERENCE: dataset_pb2.DATASET_FORMAT_PREFERENCE,
}

Header = admission_service_pb2.DatasetUploadHeader
Chunk = admission_service_pb2.DatasetChunk

log = structlog.get_logger("alto.admission.uploads")


@dataclass(frozen=True)
class Usage:
    """What a tenant's datasets and unfinished uploads take together, and of what; of `unfinished` the oldest."""

    used_bytes: int
    quota_bytes: int
    unfinished: Sequence[Upload]


class _Stream:
    """The stream that an upload is being received from; a later one takes its place, none once its end was judged."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.owner: object = None


class Uploads:
    """Receives uploads. Unfinished ones lie in `folder` on this host, under the id of the dataset they will be."""

    def __init__(
        self,
        store: DatasetStore,
        artifacts: ArtifactStore,
        worker: Worker,
        folder: Path,
        limits: DatasetLimits,
        quota_bytes: int,
        clock_us: Callable[[], int],
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._worker = worker
        self._folder = folder
        self._limits = limits
        self._quota_bytes = quota_bytes
        self._clock_us = clock_us
        self._streams: dict[str, _Stream] = {}

    async def receive(self, tenant: str, header: Header, chunks: AsyncIterator[Chunk]) -> Dataset:
        """Return the dataset that the upload becomes. What came before a break is kept for the next call.

        Raises REQUEST_ID_REUSED, DATASET_TOO_LARGE, QUOTA_EXCEEDED, OFFSET_MISMATCH, CONTENT_MISMATCH,
        DATASET_MALFORMED.
        """
        self._check_header(header)
        upload = await self._begin(tenant, header)
        if upload.complete:
            return await self._store.get(upload.dataset_id, tenant)
        path = self._path(upload.dataset_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        stream = self._streams.setdefault(upload.dataset_id, _Stream())
        owner = stream.owner = object()
        try:
            async for chunk in chunks:
                async with stream.lock:
                    if stream.owner is not owner:
                        raise unavailable("another call has taken this upload over, or ended it")
                    await asyncio.to_thread(_append, path, chunk, header.size_bytes)
            async with stream.lock:
                try:
                    return await self._finish(upload, header, path)
                finally:
                    # What a later stream still sends would be bytes that no quota counts.
                    stream.owner = None
        finally:
            if stream.owner in (owner, None) and self._streams.get(upload.dataset_id) is stream:
                del self._streams[upload.dataset_id]

    async def kept(self, tenant: str, request_id: str) -> tuple[Upload, int, Dataset | None]:
        """Return an upload, how many bytes of it are kept, and its dataset when it is complete.

        Raises RESOURCE_NOT_FOUND.
        """
        upload = await self._store.upload(tenant, request_id)
        if upload is None:
            raise not_found("upload", request_id)
        if upload.complete:
            dataset = await self._store.get(upload.dataset_id, tenant)
            return upload, dataset.size_bytes, dataset
        return upload, _size(self._path(upload.dataset_id)), None

    async def delete(self, tenant: str, dataset_id: str) -> None:
        """Delete a dataset, or give up the unfinished upload of it, which a stream may still be sending.

        Raises RESOURCE_NOT_FOUND, DATASET_IN_USE.
        """
        await self._store.delete(dataset_id, tenant)
        stream = self._streams.get(dataset_id, _Stream())
        stream.owner = None
        # A chunk that is being written, or an end that is being judged, finds its file until it is done.
        async with stream.lock:
            await asyncio.to_thread(self._path(dataset_id).unlink, True)
        await asyncio.to_thread(self._artifacts.delete, _folder(tenant, dataset_id))

    async def usage(self, tenant: str) -> Usage:
        """Return what a tenant's datasets and unfinished uploads take of its quota."""
        unfinished = await self._store.oldest_unfinished(tenant, UNFINISHED_SHOWN)
        return Usage(await self._store.used_bytes(tenant), self._quota_bytes, unfinished)

    async def keep_clean(self) -> None:
        """Remove what was abandoned, now and every hour."""
        while True:
            try:
                await self.remove_abandoned()
            except Exception:
                log.exception("abandoned uploads could not be removed; trying again")
            await asyncio.sleep(CLEAN_EVERY_S)

    async def remove_abandoned(self) -> None:
        """Delete uploads that nobody has carried on for a week: their bytes, and what they take of a quota."""
        await asyncio.to_thread(self._remove_abandoned_bytes)
        before_us = self._clock_us() - ABANDONED_S * 1_000_000
        for upload in await self._store.unfinished_uploads(before_us):
            path = self._path(upload.dataset_id)
            if not path.exists() and await self._store.forget_upload(upload, before_us):
                # A process that was killed may have left the file of a dataset that was never kept.
                await asyncio.to_thread(self._artifacts.delete, _folder(upload.tenant, upload.dataset_id))

    def _remove_abandoned_bytes(self) -> None:
        for path in self._folder.glob("*.part"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    def _check_header(self, header: Header) -> None:
        if not header.file_name.lower().endswith(ENDINGS):
            cure = f"give a file whose name ends in {' or '.join(ENDINGS)}"
            raise invalid_fields([Violation("header.file_name", header.file_name, cure)])
        if header.size_bytes > self._limits.max_bytes:
            cure = f"give at most {self._limits.max_bytes:,} bytes, or split the file"
            violation = Violation("header.size_bytes", header.size_bytes, cure)
            raise _about_file(header, [violation], error_pb2.ERROR_REASON_DATASET_TOO_LARGE)

    async def _begin(self, tenant: str, header: Header) -> Upload:
        fingerprint = hashlib.sha256(header.SerializeToString(deterministic=True)).hexdigest()
        dataset_id = f"dataset-{secrets.token_hex(8)}"
        fresh = Upload(tenant, header.request_id, fingerprint, dataset_id, False, self._clock_us(), header.size_bytes)
        upload = await self._store.begin_upload(fresh, self._quota_bytes)
        if upload.request_hash != fingerprint:
            raise DomainError(
                error_pb2.ERROR_REASON_REQUEST_ID_REUSED,
                "this request_id began an upload with another header: choose a new one",
                metadata={"request_id": header.request_id},
            )
        return upload

    async def _finish(self, upload: Upload, header: Header, path: Path) -> Dataset:
        now = await self._store.upload(upload.tenant, upload.request_id)
        if now is None or now.dataset_id != upload.dataset_id:
            raise _removed()
        if now.complete:
            # Another call finished it while this one waited.
            return await self._store.get(now.dataset_id, upload.tenant)
        committed = await asyncio.to_thread(_size, path)
        if committed < header.size_bytes:
            raise DomainError(
                error_pb2.ERROR_REASON_CONTENT_MISMATCH,
                f"{committed:,} of {header.size_bytes:,} bytes have come: send the rest",
                metadata={"committed_bytes": str(committed)},
            )
        await asyncio.to_thread(path.touch)
        checked = await self._worker.call(check_file, path, header.sha256, self._limits, header.file_name)
        if isinstance(checked, DamagedFile):
            # The same bytes will never do; another attempt may use the same request_id for better ones.
            await self._store.forget_upload(upload)
            await asyncio.to_thread(path.unlink, True)
            raise _damaged(checked, header)
        return await self._keep(upload, header, path, checked)

    async def _keep(self, upload: Upload, header: Header, path: Path, facts: DatasetFacts) -> Dataset:
        ending = next(ending for ending in ENDINGS if header.file_name.lower().endswith(ending))
        target = f"{_folder(upload.tenant, upload.dataset_id)}/rows{ending}"
        await asyncio.to_thread(lambda: self._artifacts.write(target, _pieces(path)))
        dataset = Dataset(
            dataset_id=upload.dataset_id,
            tenant=upload.tenant,
            display_name=header.display_name or header.file_name,
            format=FORMATS[facts.format],
            row_count=facts.rows,
            size_bytes=facts.bytes,
            sha256=facts.sha256,
            duplicate_count=facts.duplicates,
            create_us=self._clock_us(),
            path=target,
        )
        kept = await self._store.finish_upload(dataset)
        await asyncio.to_thread(path.unlink, True)
        if not kept:
            await asyncio.to_thread(self._artifacts.delete, _folder(upload.tenant, upload.dataset_id))
            raise _removed()
        log.info("dataset kept", dataset_id=dataset.dataset_id, rows=dataset.row_count, bytes=dataset.size_bytes)
        return dataset

    def _path(self, dataset_id: str) -> Path:
        return self._folder / f"{dataset_id}.part"


def _folder(tenant: str, dataset_id: str) -> str:
    return f"tenants/{tenant}/datasets/{dataset_id}"


def _removed() -> DomainError:
    return unavailable("this upload was removed in the meantime: send it again")


def _append(path: Path, chunk: Chunk, size_bytes: int) -> None:
    committed = _size(path)
    if chunk.offset != committed:
        raise DomainError(
            error_pb2.ERROR_REASON_OFFSET_MISMATCH,
            f"this chunk begins at {chunk.offset:,}, but {committed:,} bytes are kept: carry on there",
            metadata={"committed_bytes": str(committed)},
        )
    if committed + len(chunk.data) > size_bytes:
        raise DomainError(
            error_pb2.ERROR_REASON_CONTENT_MISMATCH,
            f"more than the announced {size_bytes:,} bytes came",
            metadata={"committed_bytes": str(committed)},
        )
    with path.open("ab") as file:
        file.write(chunk.data)
        file.flush()
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            yield piece


def _damaged(found: DamagedFile, header: Header) -> DomainError:
    if found.sha256:
        return DomainError(
            error_pb2.ERROR_REASON_CONTENT_MISMATCH,
            f"the bytes have SHA-256 {found.sha256}, but {header.sha256} was announced: upload again",
            metadata={"committed_bytes": "0"},
        )
    too_large, malformed = error_pb2.ERROR_REASON_DATASET_TOO_LARGE, error_pb2.ERROR_REASON_DATASET_MALFORMED
    return _about_file(header, found.violations, too_large if found.too_large else malformed)


def _about_file(header: Header, violations: Sequence[Violation], reason: Reason) -> DomainError:
    """Return the error of a file's content: a search has several, and its caller hears which one it is."""
    sentence = f"{header.file_name}: {invalid_fields(violations).message}"
    return DomainError(reason, sentence, violations=violations, metadata={"file_name": header.file_name})
