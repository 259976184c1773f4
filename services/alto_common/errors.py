"""Failures as the domain sees them. `alto_common.rpc.status` turns each into its gRPC status; nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from alto.v1 import error_pb2

from alto_common.violations import Violation

Reason: TypeAlias = error_pb2.ErrorReason.ValueType


def reason_name(reason: Reason) -> str:
    """Return the stable word of a reason, as callers see it: the enum value without its prefix."""
    return error_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


class DomainError(Exception):
    """A call that cannot be carried out, with the reason, what is wrong with which field, and when to try again.

    `violations` become BadRequest field violations, `metadata` goes into ErrorInfo, `retry_after_s` (seconds) into
    RetryInfo, `quota` (subject, description) into QuotaFailure.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        quota: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.quota = quota


def invalid_fields(
    violations: Sequence[Violation], reason: Reason = error_pb2.ERROR_REASON_INVALID_FIELD
) -> DomainError:
    """Return the error for a request with these violations; its message is the first of them."""
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return DomainError(reason, f"{violations[0]}{more}", violations=violations)


def not_found(kind: str, identifier: str) -> DomainError:
    """Return the error for something that this caller does not have."""
    return DomainError(
        error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND,
        f"no {kind} {identifier!r}",
        metadata={"kind": kind, "id": identifier},
    )


def unavailable(message: str, retry_after_s: float = 1.0) -> DomainError:
    """Return the error for something that may work in a moment."""
    return DomainError(error_pb2.ERROR_REASON_UNAVAILABLE, message, retry_after_s=retry_after_s)
