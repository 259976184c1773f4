"""Who is calling, from the credential alone, and what they may call. Deny by default."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from alto.v1 import error_pb2

from alto_common.errors import DomainError


class Scope(enum.StrEnum):
    """What a credential allows."""

    READ = "read"
    WRITE = "write"
    SERVICE = "service"
    ANYONE = "anyone"


@dataclass(frozen=True)
class Caller:
    """Who is calling. `tenant` owns what the call makes and sees; services call as themselves."""

    tenant: str
    scopes: frozenset[Scope]


class Authenticator(Protocol):
    """Finds out who holds a credential."""

    async def authenticate(self, credential: str | None) -> Caller:
        """Return the caller that holds this bearer credential, or raise CREDENTIAL_INVALID."""
        ...


ANONYMOUS = Caller(tenant="", scopes=frozenset({Scope.ANYONE}))

# Methods that need no credential: health checks and reflection, which tell nothing of any tenant.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)


def credential_invalid(message: str) -> DomainError:
    """Return the error for a call without a usable credential."""
    return DomainError(error_pb2.ERROR_REASON_CREDENTIAL_INVALID, message)


def bearer_credential(metadata: Mapping[str, str | bytes]) -> str | None:
    """Return the bearer credential among a call's metadata, if there is one."""
    value = metadata.get("authorization")
    if not isinstance(value, str) or not value.lower().startswith("bearer "):
        return None
    return value[len("bearer ") :].strip()


def require_scope(method: str, caller: Caller, scopes: Mapping[str, Scope]) -> None:
    """Raise PERMISSION_DENIED unless `caller` may call `method` ("/package.Service/Method")."""
    needed = scopes.get(method)
    if needed is None or needed not in caller.scopes:
        raise DomainError(
            error_pb2.ERROR_REASON_PERMISSION_DENIED,
            f"this credential does not allow {method.rpartition('/')[2]}",
            metadata={"method": method, "scope": needed.value if needed else "none"},
        )


class ServiceTokenAuthenticator:
    """Knows one shared token, that of ALTO's own services."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def authenticate(self, credential: str | None) -> Caller:
        """Return the service caller when the token is right; compares in constant time."""
        if credential is None or not hmac.compare_digest(credential.encode(), self._token.encode()):
            raise credential_invalid("the service token is missing or wrong")
        return Caller(tenant="", scopes=frozenset({Scope.SERVICE}))
