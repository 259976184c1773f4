"""API keys: making them, and finding out from one who is calling."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection

from alto_common.errors import invalid_fields
from alto_common.rpc.authentication import Caller, Scope, credential_invalid
from alto_common.violations import Violation

from alto_admission.store.keys import ApiKey, KeyStore

KEY_PREFIX = "alto_"
# A tenant's name is a folder of the artifact store.
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TENANT_SCOPES = (Scope.READ, Scope.WRITE)


def new_key(tenant: str, scopes: Collection[str], now_us: int, expire_us: int | None = None) -> tuple[str, ApiKey]:
    """Return a fresh key, to be shown once, and what is kept of it. Raises INVALID_FIELD."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    return secret, kept_key(secret, tenant, scopes, now_us, expire_us)


def kept_key(secret: str, tenant: str, scopes: Collection[str], now_us: int, expire_us: int | None = None) -> ApiKey:
    """Return what is kept of a key. Raises INVALID_FIELD."""
    violations = []
    if not _TENANT.fullmatch(tenant):
        violations.append(Violation("tenant", tenant, "give 1 to 63 lower-case letters, digits and hyphens"))
    unknown = sorted(set(scopes) - set(_TENANT_SCOPES))
    if unknown or not scopes:
        violations.append(Violation("scopes", unknown, f"give {', '.join(_TENANT_SCOPES)}, or one of them"))
    if violations:
        raise invalid_fields(violations)
    return ApiKey(f"key-{secrets.token_hex(4)}", _sha256(secret), tenant, ",".join(sorted(scopes)), now_us, expire_us)


class KeyAuthenticator:
    """Knows callers by their API keys."""

    def __init__(self, keys: KeyStore, clock_us: Callable[[], int]) -> None:
        self._keys = keys
        self._clock_us = clock_us

    async def authenticate(self, credential: str | None) -> Caller:
        """Return the tenant that holds the key; raise CREDENTIAL_INVALID for none, or one unknown, expired, revoked."""
        if not credential:
            raise credential_invalid("no API key was given: send `authorization: Bearer <api key>`")
        key = await self._keys.by_sha256(_sha256(credential))
        if key is None or key.revoked:
            raise credential_invalid("the API key is not known")
        if key.expire_us is not None and key.expire_us <= self._clock_us():
            raise credential_invalid("the API key has expired")
        return Caller(key.tenant, frozenset(Scope(scope) for scope in key.scopes.split(",")))


def _sha256(secret: str) -> str:
    # A key has 256 random bits: a plain hash cannot be reversed, and needs no salt.
    return hashlib.sha256(secret.encode()).hexdigest()
