"""API keys: only their SHA-256 is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from alto_common.database import Database

from alto_admission.store.schema import api_keys


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept. `scopes` are joined by commas; it holds until `expire_us`, or until it is revoked."""

    key_id: str
    key_sha256: str
    tenant: str
    scopes: str
    create_us: int
    expire_us: int | None = None
    revoked: bool = False


class KeyStore:
    """Keeps API keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, key: ApiKey) -> None:
        """Keep a new key."""
        async with self._database.transaction() as connection:
            await connection.execute(api_keys.insert().values(**asdict(key)))

    async def by_sha256(self, key_sha256: str) -> ApiKey | None:
        """Return the key with this hash."""
        async with self._database.snapshot() as connection:
            row = (await connection.execute(sa.select(api_keys).where(api_keys.c.key_sha256 == key_sha256))).first()
        return None if row is None else ApiKey(**row._mapping)

    async def all(self, tenant: str | None = None) -> Sequence[ApiKey]:
        """Return every key, or a tenant's."""
        query = sa.select(api_keys).order_by(api_keys.c.create_us)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        async with self._database.snapshot() as connection:
            return [ApiKey(**row._mapping) for row in await connection.execute(query)]

    async def revoke(self, tenant: str, key_id: str | None = None) -> int:
        """Revoke one key of a tenant, or all of them; return how many."""
        update = api_keys.update().where(api_keys.c.tenant == tenant, api_keys.c.revoked.is_(False))
        if key_id is not None:
            update = update.where(api_keys.c.key_id == key_id)
        async with self._database.transaction() as connection:
            return (await connection.execute(update.values(revoked=True))).rowcount
