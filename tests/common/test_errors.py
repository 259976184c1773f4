"""Each reason of the contract has one status code, and each error carries exactly one ErrorInfo."""

import pytest
from alto.v1 import error_pb2
from alto_common.errors import DomainError, invalid_fields, reason_name
from alto_common.rpc.status import CODES, DOMAIN, status_of
from alto_common.violations import Violation
from google.rpc import error_details_pb2

REASONS = [value for value in error_pb2.ErrorReason.values() if value != error_pb2.ERROR_REASON_UNSPECIFIED]


def unpacked(status, kind):
    found = []
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


def test_every_reason_has_a_code():
    assert set(CODES) == set(REASONS)


@pytest.mark.parametrize("reason", REASONS, ids=reason_name)
def test_every_error_carries_one_error_info(reason):
    status = status_of(DomainError(reason, "why"))
    (info,) = unpacked(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason_name(reason), DOMAIN)
    assert status.code == CODES[reason].value[0]


def test_details_follow_what_is_known():
    error = invalid_fields(
        [Violation("spec.rank", 0, "give 1 or more"), Violation("spec.lr", -1.0, "give more than 0")]
    )
    status = status_of(error)
    (bad_request,) = unpacked(status, error_details_pb2.BadRequest)
    assert [found.field for found in bad_request.field_violations] == ["spec.rank", "spec.lr"]
    assert "give more than 0" in bad_request.field_violations[1].description
    assert "and 1 more" in status.message


def test_retry_and_quota_travel():
    error = DomainError(
        error_pb2.ERROR_REASON_QUOTA_EXCEEDED, "too many", retry_after_s=1.5, quota=("tenant:a", "8 tasks at once")
    )
    status = status_of(error)
    (retry,) = unpacked(status, error_details_pb2.RetryInfo)
    (quota,) = unpacked(status, error_details_pb2.QuotaFailure)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert quota.violations[0].subject == "tenant:a"


def test_a_status_stays_within_what_a_client_accepts():
    long = "ü" * 5000
    violations = [Violation(f"field[{number}]{long}", long, "cure") for number in range(500)]
    error = invalid_fields(violations)
    error.metadata["long"] = long
    status = status_of(error)
    assert status.ByteSize() * 4 / 3 + 3 * len(status.message.encode()) < 8192
    (bad_request,) = unpacked(status, error_details_pb2.BadRequest)
    assert bad_request.field_violations[0].description.endswith("cure")


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a" * 5000, "'" + "a" * 1000 + "'"), ([0] * 2_000_000, "2,000,000 values"), ([1, 2], "[1, 2]")],
)
def test_a_value_is_shown_as_far_as_a_person_reads(value: object, shown: str) -> None:
    assert str(Violation("field", value, "give less")) == f"field = {shown}: give less"
