"""What placement must still hear, kept with the change that caused it and delivered later, in order for each task."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sqlalchemy as sa
from alto_common.database import Database

from alto_admission.domain.story import DeliveryKind
from alto_admission.store.schema import outbox


@dataclass(frozen=True)
class PendingDelivery:
    """A delivery that is due."""

    outbox_id: int
    task_id: str
    kind: DeliveryKind
    content: bytes
    attempts: int
    due_us: int


class Outbox:
    """Keeps deliveries until they are made. Several dispatchers may share it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def due(self, now_us: int, limit: int) -> list[PendingDelivery]:
        """Return the first delivery of each task, where it is due: a later one waits for those before it."""
        first = sa.select(sa.func.min(outbox.c.outbox_id)).group_by(outbox.c.task_id)
        query = (
            sa.select(outbox)
            .where(outbox.c.outbox_id.in_(first), outbox.c.due_us <= now_us)
            .order_by(outbox.c.outbox_id)
            .limit(limit)
        )
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(query)).all()
        return [
            PendingDelivery(row.outbox_id, row.task_id, DeliveryKind(row.kind), row.content, row.attempts, row.due_us)
            for row in rows
        ]

    async def next_due_us(self) -> int | None:
        """Return when the next delivery is due; None when there is none."""
        first = sa.select(sa.func.min(outbox.c.outbox_id)).group_by(outbox.c.task_id)
        query = sa.select(sa.func.min(outbox.c.due_us)).where(outbox.c.outbox_id.in_(first))
        async with self._database.snapshot() as connection:
            due_us: int | None = (await connection.execute(query)).scalar_one_or_none()
        return due_us

    async def claim(self, delivery: PendingDelivery, again_us: int) -> PendingDelivery | None:
        """Put the next attempt off to `again_us`, and return the delivery as it is claimed until then.

        None when another dispatcher was quicker: an older message that arrives after a newer one (held, let go, held)
        would undo it.
        """
        claimed = replace(delivery, due_us=again_us, attempts=delivery.attempts + 1)
        update = outbox.update().where(_as_seen(delivery)).values(due_us=again_us, attempts=claimed.attempts)
        async with self._database.transaction() as connection:
            return claimed if (await connection.execute(update)).rowcount == 1 else None

    async def retry_at(self, claimed: PendingDelivery, due_us: int) -> None:
        """Bring the next attempt of a claimed delivery to `due_us`, unless another has claimed it since."""
        async with self._database.transaction() as connection:
            await connection.execute(outbox.update().where(_as_seen(claimed)).values(due_us=due_us))

    async def delivered(self, claimed: PendingDelivery) -> None:
        """Forget a delivery that was made, unless another has claimed it since and makes it once more."""
        async with self._database.transaction() as connection:
            await connection.execute(outbox.delete().where(_as_seen(claimed)))

    async def size(self) -> int:
        """Return how many deliveries have not been made."""
        async with self._database.snapshot() as connection:
            return int((await connection.execute(sa.select(sa.func.count()).select_from(outbox))).scalar_one())

    async def holds(self, task_id: str) -> bool:
        """Return whether placement has still to hear something of a task."""
        query = sa.select(outbox.c.outbox_id).where(outbox.c.task_id == task_id).limit(1)
        async with self._database.snapshot() as connection:
            return (await connection.execute(query)).first() is not None


def _as_seen(delivery: PendingDelivery) -> sa.ColumnElement[bool]:
    """Return the condition that nobody has claimed a delivery since it was read, or claimed."""
    return sa.and_(outbox.c.outbox_id == delivery.outbox_id, outbox.c.due_us == delivery.due_us)
