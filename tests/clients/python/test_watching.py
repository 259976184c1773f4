import pytest
from alto.v1 import error_pb2, tuning_pb2
from alto_client import AltoError
from alto_common.errors import DomainError, unavailable


def sequences(messages):
    return [message.event.sequence for message in messages if message.WhichOneof("message") == "event"]


def test_a_watch_gives_a_snapshot_then_every_event_and_ends_with_the_task(client, admission):
    received = list(client.watch("task-1"))
    assert received[0].WhichOneof("message") == "snapshot"
    assert sequences(received) == list(range(1, 14))
    assert {message.WhichOneof("message") for message in received} == {"snapshot", "event"}


@pytest.mark.parametrize("breaks", [[1], [2], [7], [0, 0, 0], [3, 1, 4, 1, 5]])
def test_whatever_breaks_nothing_is_lost_or_repeated(client, admission, breaks):
    admission.break_watches = [(count, unavailable("going down", retry_after_s=0.01)) for count in breaks]
    received = list(client.watch("task-1"))
    assert sequences(received) == list(range(1, 14))
    assert sum(message.WhichOneof("message") == "snapshot" for message in received) == 1


def test_an_event_that_a_server_repeats_is_passed_over(client, admission):
    admission.repeat_last_event = True
    admission.break_watches = [(5, unavailable("going down"))] * 3
    assert sequences(client.watch("task-1")) == list(range(1, 14))


def test_a_kept_token_carries_on_in_another_watch(client, admission):
    watch = client.watch("task-1")
    first = []
    for message in watch:
        first.append(message)
        if len(first) == 5:
            break
    rest = list(client.watch("task-1", watch.resume_token))
    assert sequences([*first, *rest]) == list(range(1, 14))
    assert all(message.WhichOneof("message") == "event" for message in rest)


def test_when_the_server_forgot_the_events_a_snapshot_takes_their_place(client, admission):
    admission.break_watches = [(5, unavailable("going down"))]
    watch = iter(client.watch("task-1"))
    received = [next(watch) for _ in range(3)]
    admission.first_kept_sequence = 9
    admission.snapshot.task.last_event_sequence = 10
    received.extend(watch)
    kinds = [message.WhichOneof("message") for message in received]
    assert kinds.count("snapshot") == 2
    assert sequences(received) == [1, 2, 11, 12, 13]


def test_a_token_of_the_callers_that_is_too_old_is_the_callers_to_decide(client, admission):
    admission.first_kept_sequence = 9
    with pytest.raises(AltoError) as caught:
        list(client.watch("task-1", "after-2"))
    assert caught.value.reason == error_pb2.ERROR_REASON_RESUME_TOKEN_TOO_OLD
    assert caught.value.metadata["earliest_resume_token"] == "after-8"


def test_the_caller_hears_of_a_lost_connection_and_how_long_the_wait_is(client, admission):
    admission.break_watches = [(2, unavailable("going down", retry_after_s=3))]
    heard = []
    list(client.watch("task-1", on_disconnect=lambda error, delay_s: heard.append((error.message, delay_s))))
    assert heard == [("going down", 3.0)]


def test_patience_ends(client, admission):
    admission.break_watches = [(1, unavailable("gone"))] * 50
    with pytest.raises(AltoError, match="gone"):
        list(client.watch("task-1", patience_s=0))


def test_a_refusal_is_raised_at_once(client, admission):
    admission.break_watches = [(0, DomainError(error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND, "no task"))]
    with pytest.raises(AltoError, match="no task"):
        list(client.watch("task-1"))
    assert len(admission.requests) == 1


def test_a_stream_that_ends_before_the_task_is_taken_up_again(client, admission):
    missing = admission.events[8:]
    admission.events = admission.events[:8]
    watch = iter(client.watch("task-1"))
    received = [next(watch) for _ in range(9)]
    admission.events = [*admission.events, *missing]
    received.extend(watch)
    assert sequences(received) == list(range(1, 14))


def test_watching_a_task_that_has_ended_ends(client, admission):
    admission.snapshot.task.state = tuning_pb2.TASK_STATE_CANCELLED
    admission.events = []
    assert [message.WhichOneof("message") for message in client.watch("task-1")] == ["snapshot"]
