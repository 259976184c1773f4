"""Datasets and the uploads that become datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from alto.v1 import dataset_pb2, error_pb2
from alto_common.database import Database
from alto_common.errors import DomainError, not_found
from alto_common.violations import Violation
from sqlalchemy.ext.asyncio import AsyncConnection

from alto_admission.domain.task_states import TERMINAL
from alto_admission.store.schema import datasets, tasks, uploads


@dataclass(frozen=True)
class Dataset:
    """A dataset that was checked line by line; `path` is below the artifact store's root."""

    dataset_id: str
    tenant: str
    display_name: str
    format: dataset_pb2.DatasetFormat.ValueType
    row_count: int
    size_bytes: int
    sha256: str
    duplicate_count: int
    create_us: int
    path: str


@dataclass(frozen=True)
class Upload:
    """An upload under its request_id; its dataset has its id from the start, so that a repeated end changes nothing.

    `create_us` is when a call began it, or carried it on, last; `size_bytes` is what was announced.
    """

    tenant: str
    request_id: str
    request_hash: str
    dataset_id: str
    complete: bool
    create_us: int
    size_bytes: int


class DatasetStore:
    """Keeps datasets and uploads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, dataset_id: str, tenant: str) -> Dataset:
        """Return a tenant's dataset; raise RESOURCE_NOT_FOUND."""
        query = sa.select(datasets).where(datasets.c.dataset_id == dataset_id, datasets.c.tenant == tenant)
        async with self._database.snapshot() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            raise not_found("dataset", dataset_id)
        return Dataset(**row._mapping)

    async def page(self, tenant: str, after: tuple[int, str] | None, limit: int) -> list[Dataset]:
        """Return a tenant's datasets, newest first, from behind (create_us, dataset_id) `after` on."""
        query = sa.select(datasets).where(datasets.c.tenant == tenant)
        if after is not None:
            key = sa.tuple_(datasets.c.create_us, datasets.c.dataset_id)
            query = query.where(key < sa.tuple_(*map(sa.literal, after)))
        query = query.order_by(datasets.c.create_us.desc(), datasets.c.dataset_id.desc()).limit(limit)
        async with self._database.snapshot() as connection:
            return [Dataset(**row._mapping) for row in await connection.execute(query)]

    async def delete(self, dataset_id: str, tenant: str) -> None:
        """Delete a dataset, or forget the unfinished upload that was to become it.

        Raises RESOURCE_NOT_FOUND, or DATASET_IN_USE while a task that has not ended uses it.
        """
        query = sa.select(datasets).where(datasets.c.dataset_id == dataset_id, datasets.c.tenant == tenant)
        async with self._database.transaction() as connection:
            # First, and waiting for an upload that is being finished: then it is a dataset.
            if (await connection.execute(uploads.delete().where(_unfinished(tenant, dataset_id)))).rowcount > 0:
                return
            if (await connection.execute(query.with_for_update())).first() is None:
                raise not_found("dataset", dataset_id)
            users = (
                sa.select(tasks.c.task_id)
                .where(sa.or_(tasks.c.dataset_id == dataset_id, tasks.c.validation_dataset_id == dataset_id))
                .where(tasks.c.state.not_in(TERMINAL))
                .limit(10)
            )
            names: Sequence[str] = (await connection.execute(users)).scalars().all()
            if names:
                raise DomainError(
                    error_pb2.ERROR_REASON_DATASET_IN_USE,
                    f"dataset {dataset_id} is used by {', '.join(names)}: wait for the end, or cancel",
                    metadata={"task_ids": ",".join(names)},
                )
            await connection.execute(uploads.delete().where(uploads.c.dataset_id == dataset_id))
            await connection.execute(datasets.delete().where(datasets.c.dataset_id == dataset_id))

    async def upload(self, tenant: str, request_id: str) -> Upload | None:
        """Return a tenant's upload."""
        query = sa.select(uploads).where(uploads.c.tenant == tenant, uploads.c.request_id == request_id)
        async with self._database.snapshot() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else Upload(**row._mapping)

    async def used_bytes(self, tenant: str) -> int:
        """Return the bytes of a tenant's datasets, and of those that it is uploading."""
        async with self._database.snapshot() as connection:
            return await _used_bytes(connection, tenant)

    async def begin_upload(self, upload: Upload, most_bytes: int) -> Upload:
        """Keep a new upload, or return the one that has its request_id already, carried on now.

        Raises QUOTA_EXCEEDED when it would take the tenant beyond `most_bytes`, however many uploads begin at once.
        """
        same = (uploads.c.tenant == upload.tenant, uploads.c.request_id == upload.request_id)
        carried_on = uploads.update().where(*same, uploads.c.complete.is_(False)).values(create_us=upload.create_us)
        async with self._database.transaction() as connection:
            await self._database.lock(connection, f"datasets of {upload.tenant}")
            await connection.execute(carried_on)
            known = (await connection.execute(sa.select(uploads).where(*same))).first()
            if known is not None:
                return Upload(**known._mapping)
            used_bytes = await _used_bytes(connection, upload.tenant)
            if used_bytes + upload.size_bytes > most_bytes:
                raise _quota_exceeded(upload, used_bytes, most_bytes)
            await connection.execute(uploads.insert().values(**asdict(upload)))
        return upload

    async def oldest_unfinished(self, tenant: str, limit: int) -> list[Upload]:
        """Return a tenant's unfinished uploads, those that were begun or carried on longest ago first."""
        query = sa.select(uploads).where(uploads.c.tenant == tenant, uploads.c.complete.is_(False))
        query = query.order_by(uploads.c.create_us, uploads.c.request_id).limit(limit)
        async with self._database.snapshot() as connection:
            return [Upload(**row._mapping) for row in await connection.execute(query)]

    async def unfinished_uploads(self, before_us: int) -> list[Upload]:
        """Return the uploads that no call began or carried on since a time and that are not complete."""
        query = sa.select(uploads).where(uploads.c.complete.is_(False), uploads.c.create_us < before_us)
        async with self._database.snapshot() as connection:
            return [Upload(**row._mapping) for row in await connection.execute(query)]

    async def forget_upload(self, upload: Upload, before_us: int | None = None) -> bool:
        """Forget an upload that can become no dataset, so that its request_id may be used again.

        Return False when nothing was forgotten: it is complete, or was carried on at `before_us` or later.
        """
        forgotten = uploads.delete().where(_unfinished(upload.tenant, upload.dataset_id))
        if before_us is not None:
            forgotten = forgotten.where(uploads.c.create_us < before_us)
        async with self._database.transaction() as connection:
            return (await connection.execute(forgotten)).rowcount > 0

    async def finish_upload(self, dataset: Dataset) -> bool:
        """Keep the dataset of an upload; doing so twice changes nothing. Return False when the upload was forgotten."""
        done = uploads.update().where(_unfinished(dataset.tenant, dataset.dataset_id)).values(complete=True)
        kept = sa.select(datasets.c.dataset_id).where(datasets.c.dataset_id == dataset.dataset_id)
        async with self._database.transaction() as connection:
            if (await connection.execute(done)).rowcount == 0:
                return (await connection.execute(kept)).first() is not None
            await connection.execute(datasets.insert().values(**asdict(dataset)))
            return True


def _unfinished(tenant: str, dataset_id: str) -> sa.ColumnElement[bool]:
    """Return what holds for the upload of a dataset while it is not complete."""
    ids = (uploads.c.tenant == tenant, uploads.c.dataset_id == dataset_id)
    return sa.and_(*ids, uploads.c.complete.is_(False))


async def _used_bytes(connection: AsyncConnection, tenant: str) -> int:
    kept = sa.select(sa.func.coalesce(sa.func.sum(datasets.c.size_bytes), 0)).where(datasets.c.tenant == tenant)
    coming = sa.select(sa.func.coalesce(sa.func.sum(uploads.c.size_bytes), 0)).where(
        uploads.c.tenant == tenant, uploads.c.complete.is_(False)
    )
    return int((await connection.execute(sa.select(kept.scalar_subquery() + coming.scalar_subquery()))).scalar_one())


def _quota_exceeded(upload: Upload, used_bytes: int, most_bytes: int) -> DomainError:
    used = f"{used_bytes:,} of {most_bytes:,} bytes for datasets are used"
    cure = "delete datasets that no task needs, or unfinished uploads: the list of datasets has the ids of both"
    violation = Violation("header.size_bytes", upload.size_bytes, cure)
    return DomainError(
        error_pb2.ERROR_REASON_QUOTA_EXCEEDED,
        f"{used}, unfinished uploads included: {violation}",
        violations=[violation],
        quota=(f"tenant:{upload.tenant}", f"{most_bytes:,} bytes of datasets"),
    )
