"""The one table from domain errors to google.rpc.Status (AIP-193)."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from alto.v1 import error_pb2
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from alto_common.errors import DomainError, Reason, reason_name
from alto_common.violations import Violation

DOMAIN = "alto.v1"

# A client accepts 8 KiB of metadata for a call unless it says otherwise; a status beyond that reaches it as
# RESOURCE_EXHAUSTED and hides what it tells. Texts may come from the request, so each is cut, and so is their number.
MAX_TEXT_BYTES = 400
MAX_VIOLATIONS_BYTES = 3500

CODES: dict[Reason, grpc.StatusCode] = {
    error_pb2.ERROR_REASON_CREDENTIAL_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    error_pb2.ERROR_REASON_PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    error_pb2.ERROR_REASON_INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_DATASET_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_DATASET_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_SEARCH_SPACE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_CONFIGURATION_UNFIT: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    error_pb2.ERROR_REASON_REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    error_pb2.ERROR_REASON_STATE_CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    error_pb2.ERROR_REASON_ETAG_MISMATCH: grpc.StatusCode.ABORTED,
    error_pb2.ERROR_REASON_PAGE_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_RESUME_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_RESUME_TOKEN_TOO_OLD: grpc.StatusCode.OUT_OF_RANGE,
    error_pb2.ERROR_REASON_CONTENT_MISMATCH: grpc.StatusCode.DATA_LOSS,
    error_pb2.ERROR_REASON_OFFSET_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    error_pb2.ERROR_REASON_DATASET_IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    error_pb2.ERROR_REASON_QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    error_pb2.ERROR_REASON_EPOCH_STALE: grpc.StatusCode.FAILED_PRECONDITION,
    error_pb2.ERROR_REASON_TASK_UNPLACEABLE: grpc.StatusCode.INVALID_ARGUMENT,
    error_pb2.ERROR_REASON_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    error_pb2.ERROR_REASON_EXECUTION_FAILED: grpc.StatusCode.INTERNAL,
    error_pb2.ERROR_REASON_NON_FINITE: grpc.StatusCode.INTERNAL,
    error_pb2.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
}


def packed(message: Message) -> any_pb2.Any:
    """Return a detail as it travels."""
    box = any_pb2.Any()
    box.Pack(message)
    return box


def shortened(text: str) -> str:
    """Return the text, its middle left out when it is long: both ends tell most."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MAX_TEXT_BYTES:
        return text
    half = MAX_TEXT_BYTES // 2 - 3
    return f"{raw[:half].decode('utf-8', 'ignore')} ... {raw[-half:].decode('utf-8', 'ignore')}"


def bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """Return the detail that names the fields at fault: the first ones, as many as fit."""
    message = error_details_pb2.BadRequest()
    for found in violations:
        message.field_violations.add(field=shortened(found.field), description=shortened(str(found)))
        if message.ByteSize() > MAX_VIOLATIONS_BYTES:
            del message.field_violations[-1]
            break
    return message


def status_of(error: DomainError) -> status_pb2.Status:
    """Return the status of a domain error: exactly one ErrorInfo, and the details that fit."""
    code = CODES[error.reason]
    metadata = {name: shortened(value) for name, value in error.metadata.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason_name(error.reason), domain=DOMAIN, metadata=metadata)
    ]
    if error.violations:
        details.append(bad_request(error.violations))
    if error.quota is not None:
        subject, description = error.quota
        violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(retry)
    return status_pb2.Status(
        code=code_pb2.Code.Value(code.name),
        message=shortened(error.message),
        details=[packed(detail) for detail in details],
    )


def reason_in(error: grpc.RpcError) -> str | None:
    """Return the reason that a failed call carries, without its prefix; None when it carries none."""
    info = info_in(error)
    return str(info.reason) if info is not None else None


def info_in(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    """Return the ErrorInfo that a failed call of ours carries, with its metadata; None when it carries none."""
    from grpc_status import rpc_status

    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # every RpcError of a call is a Call too
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None
