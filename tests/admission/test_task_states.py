"""The table of states: what may never happen, whatever comes in whatever order."""

import pytest
from alto.v1 import error_pb2, tuning_pb2
from alto_admission.domain.task_states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    PAUSED,
    PAUSING,
    QUEUED,
    REPORTED_STATES,
    REPORTS,
    REQUESTS,
    RUNNING,
    STATES,
    SUCCEEDED,
    TERMINAL,
    UNFINISHED,
    Report,
    Request,
    after_report,
    after_request,
)
from alto_common.errors import DomainError
from hypothesis import given
from hypothesis import strategies as st

inputs = st.lists(st.sampled_from([*Request, *Report]), max_size=30)


def apply(state, one):
    if isinstance(one, Report):
        return after_report(state, one)
    if state not in REQUESTS[one]:
        with pytest.raises(DomainError) as caught:
            after_request(state, one)
        assert caught.value.reason == error_pb2.ERROR_REASON_STATE_CONFLICT
        return state
    return after_request(state, one)


def test_the_states_are_those_of_the_contract():
    assert set(STATES) == set(tuning_pb2.TaskState.values()) - {tuning_pb2.TASK_STATE_UNSPECIFIED}
    assert set(REQUESTS) == set(Request)
    assert set(REPORTS) == set(Report)
    assert set(REPORTED_STATES) < set(STATES)


@given(inputs)
def test_a_task_that_has_ended_stays_as_it_is(sequence):
    state = QUEUED
    ended = None
    for one in sequence:
        state = apply(state, one)
        assert state in STATES
        assert ended is None or state == ended
        if state in TERMINAL:
            ended = state


@given(inputs)
def test_every_request_and_report_may_be_repeated(sequence):
    """A call that was answered into the void is made again; a report comes twice."""
    state = QUEUED
    for one in sequence:
        state = apply(state, one)
        if one is not Report.RELEASED:
            assert apply(state, one) == state


@given(inputs)
def test_a_cancelled_task_is_never_trained_again(sequence):
    state = QUEUED
    asked = False
    for one in sequence:
        state = apply(state, one)
        asked = asked or one is Request.CANCEL
        if asked:
            assert state in (CANCELLING, *TERMINAL)


@given(inputs)
def test_every_unfinished_task_can_still_end(sequence):
    state = QUEUED
    for one in sequence:
        state = apply(state, one)
    if state in UNFINISHED:
        cancelling = after_request(state, Request.CANCEL)
        assert after_report(cancelling, Report.CANCELLED) == CANCELLED


@pytest.mark.parametrize(
    ("before", "report", "after"),
    [
        (QUEUED, Report.STARTED, RUNNING),
        (PAUSED, Report.STARTED, PAUSING),
        (RUNNING, Report.RELEASED, QUEUED),
        (PAUSING, Report.RELEASED, PAUSED),
        (CANCELLING, Report.RELEASED, CANCELLED),
        (CANCELLING, Report.SUCCEEDED, SUCCEEDED),
        (QUEUED, Report.FAILED, FAILED),
        (CANCELLED, Report.SUCCEEDED, CANCELLED),
        (SUCCEEDED, Report.STARTED, SUCCEEDED),
    ],
)
def test_reports_that_race_with_requests(before, report, after):
    assert after_report(before, report) == after


@pytest.mark.parametrize(
    ("before", "request_", "after"),
    [
        (QUEUED, Request.CANCEL, CANCELLED),
        (RUNNING, Request.CANCEL, CANCELLING),
        (SUCCEEDED, Request.CANCEL, SUCCEEDED),
        (QUEUED, Request.PAUSE, PAUSED),
        (RUNNING, Request.PAUSE, PAUSING),
        (PAUSED, Request.RESUME, QUEUED),
        (PAUSING, Request.RESUME, None),
        (CANCELLING, Request.PAUSE, None),
        (SUCCEEDED, Request.PAUSE, None),
        (FAILED, Request.RESUME, None),
    ],
)
def test_requests(before, request_, after):
    if after is None:
        with pytest.raises(DomainError, match="cannot"):
            after_request(before, request_)
    else:
        assert after_request(before, request_) == after
