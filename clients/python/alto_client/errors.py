"""The one error that the SDK raises for a failed call, decoded from google.rpc.Status and its details (AIP-193)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from alto.v1 import error_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from alto_client.handshake import closed_at_once, handshake_fault

_ASKS_FOR_A_CERTIFICATE = (
    "if it asks callers for a certificate, give one: client_certificate, or with the command --client-certificate and "
    "--client-key"
)
ERROR_DOMAIN = "alto.v1"
REASON_PREFIX = "ERROR_REASON_"

ErrorReason: TypeAlias = error_pb2.ErrorReason.ValueType


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that was refused: its path, and a sentence with its value and the cure."""

    field: str
    description: str


class AltoError(Exception):
    """A call that failed. `reason` is stable for ever; `message` is for people and may change.

    `violations` name the fields at fault, `retry_after_s` (seconds) says when another attempt makes sense, `metadata`
    carries what a program can act on, such as "committed_bytes".
    """

    def __init__(
        self,
        message: str,
        *,
        reason: ErrorReason = error_pb2.ERROR_REASON_UNSPECIFIED,
        status_code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.status_code = status_code
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    @property
    def reason_name(self) -> str:
        """The reason as a word, such as "INVALID_FIELD"; "UNSPECIFIED" when the failure did not come from ALTO."""
        return error_pb2.ErrorReason.Name(self.reason).removeprefix(REASON_PREFIX)

    @property
    def is_connection_loss(self) -> bool:
        """Whether the same call may work in a moment: the server is not there, or went away in the middle."""
        if self.status_code is grpc.StatusCode.UNAVAILABLE:
            return True
        # A connection cut in the middle of a stream surfaces under these codes, without any detail from ALTO.
        cut = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
        return self.status_code in cut and self.reason == error_pb2.ERROR_REASON_UNSPECIFIED


class HandshakeError(AltoError):
    """There is a server, and no TLS connection with it: another attempt fails as this one did."""

    @property
    def is_connection_loss(self) -> bool:
        """False: a person has to do something."""
        return False


def error_from_call(error: grpc.RpcError, address: str = "", *, over_tls: bool = False) -> AltoError:
    """Return the error of a failed call; `address` is named when the server could not be reached."""
    code, text = _code(error), _text(error)
    status = _status(error)
    if status is None:
        if code is grpc.StatusCode.UNAVAILABLE:
            return _unreachable(text, address or "the server", over_tls)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"no answer from {address or 'the server'} in time"
        return AltoError(text, status_code=code)
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    quota = error_details_pb2.QuotaFailure()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        for box in (info, bad_request, quota):
            if detail.Is(box.DESCRIPTOR):
                detail.Unpack(box)
    return AltoError(
        status.message or text,
        reason=_reason(info),
        status_code=code,
        violations=[
            *(FieldViolation(found.field, found.description) for found in bad_request.field_violations),
            *(FieldViolation(found.subject, found.description) for found in quota.violations),
        ],
        retry_after_s=retry_after_s,
        metadata=dict(info.metadata),
    )


def _unreachable(details: str, address: str, over_tls: bool) -> AltoError:
    reason, code = error_pb2.ERROR_REASON_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE
    if over_tls and (fault := handshake_fault(details, address)):
        return HandshakeError(fault, reason=reason, status_code=code)
    text = f"cannot reach {address} ({details})"
    if closed_at_once(details):
        text += f"; {_ASKS_FOR_A_CERTIFICATE}" if over_tls else f"; if it speaks TLS, name it https://{address}"
    return AltoError(text, reason=reason, status_code=code)


def _reason(info: Any) -> ErrorReason:
    if info.domain != ERROR_DOMAIN:
        return error_pb2.ERROR_REASON_UNSPECIFIED
    # A reason that this SDK is too old to know is not an error of its own.
    try:
        return error_pb2.ErrorReason.Value(REASON_PREFIX + info.reason)
    except ValueError:
        return error_pb2.ERROR_REASON_UNSPECIFIED


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN


def _text(error: grpc.RpcError) -> str:
    details = error.details() if isinstance(error, grpc.Call) else None
    return details or str(error)


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    if not isinstance(error, grpc.Call):
        return None
    try:
        return rpc_status.from_call(error)
    except ValueError:  # details that contradict the code: a proxy rewrote one of them
        return None
