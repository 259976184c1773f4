"""The states of a task as one table: what each input does in each state (AIP-216). Nothing else changes a state.

Three kinds of input reach a task: what its tenant asks for, what the node that trains it reports, and what placement
says. They race, so the table is total for the last two: a late report never fails, it is passed over.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

from alto.v1 import error_pb2, tuning_pb2
from alto_common.errors import DomainError

State: TypeAlias = tuning_pb2.TaskState.ValueType

QUEUED = tuning_pb2.TASK_STATE_QUEUED
RUNNING = tuning_pb2.TASK_STATE_RUNNING
PAUSING = tuning_pb2.TASK_STATE_PAUSING
PAUSED = tuning_pb2.TASK_STATE_PAUSED
CANCELLING = tuning_pb2.TASK_STATE_CANCELLING
SUCCEEDED = tuning_pb2.TASK_STATE_SUCCEEDED
FAILED = tuning_pb2.TASK_STATE_FAILED
CANCELLED = tuning_pb2.TASK_STATE_CANCELLED

STATES: tuple[State, ...] = (QUEUED, RUNNING, PAUSING, PAUSED, CANCELLING, SUCCEEDED, FAILED, CANCELLED)
TERMINAL: frozenset[State] = frozenset({SUCCEEDED, FAILED, CANCELLED})
UNFINISHED: tuple[State, ...] = tuple(state for state in STATES if state not in TERMINAL)


class Request(enum.StrEnum):
    """What a tenant may ask of a task."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"


class Report(enum.StrEnum):
    """What a node or placement may say of a task. RELEASED: no node holds it any more, and it has not ended."""

    STARTED = "started"
    RELEASED = "released"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


# A request that is missing for a state conflicts with it. A request that leads to the same state changes nothing, so
# that a repeated call succeeds. Nobody trains a queued or paused task: it is cancelled at once.
REQUESTS: dict[Request, dict[State, State]] = {
    Request.CANCEL: {
        QUEUED: CANCELLED,
        RUNNING: CANCELLING,
        PAUSING: CANCELLING,
        PAUSED: CANCELLED,
        CANCELLING: CANCELLING,
        SUCCEEDED: SUCCEEDED,
        FAILED: FAILED,
        CANCELLED: CANCELLED,
    },
    Request.PAUSE: {QUEUED: PAUSED, RUNNING: PAUSING, PAUSING: PAUSING, PAUSED: PAUSED},
    Request.RESUME: {PAUSED: QUEUED, QUEUED: QUEUED, RUNNING: RUNNING},
}

# A report that is missing for a state changes nothing. A node that starts a task which was paused meanwhile has not
# heard of it yet: it will stop. A node that lets go of a task without being asked was drained or preempted, or died.
REPORTS: dict[Report, dict[State, State]] = {
    Report.STARTED: {QUEUED: RUNNING, PAUSED: PAUSING},
    Report.RELEASED: {RUNNING: QUEUED, PAUSING: PAUSED, CANCELLING: CANCELLED},
    Report.SUCCEEDED: {state: SUCCEEDED for state in UNFINISHED},
    Report.FAILED: {state: FAILED for state in UNFINISHED},
    Report.CANCELLED: {state: CANCELLED for state in UNFINISHED},
}

# The state that a node reports, as an input. A node's PAUSED says that it let go; whether the task is then paused,
# queued again or cancelled depends on what was asked for.
REPORTED_STATES: dict[State, Report] = {
    RUNNING: Report.STARTED,
    QUEUED: Report.RELEASED,
    PAUSED: Report.RELEASED,
    SUCCEEDED: Report.SUCCEEDED,
    FAILED: Report.FAILED,
    CANCELLED: Report.CANCELLED,
}


def state_name(state: State) -> str:
    """Return the word of a state, such as "RUNNING"."""
    return tuning_pb2.TaskState.Name(state).removeprefix("TASK_STATE_")


def after_request(state: State, request: Request) -> State:
    """Return the state after a tenant's request. Raises STATE_CONFLICT when the state does not allow it."""
    following = REQUESTS[request].get(state)
    if following is None:
        allowed = ", ".join(state_name(one) for one in REQUESTS[request])
        raise DomainError(
            error_pb2.ERROR_REASON_STATE_CONFLICT,
            f"cannot {request} a task that is {state_name(state)}; it must be one of {allowed}",
            metadata={"state": state_name(state)},
        )
    return following


def after_report(state: State, report: Report) -> State:
    """Return the state after a report; the same state when the report comes too late to matter."""
    return REPORTS[report].get(state, state)
