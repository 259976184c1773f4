"""What a node reports: texts that admission takes, and what becomes of reports that it refuses, or cannot be told."""

import pytest
from alto.v1 import placement_service_pb2, tuning_pb2
from alto_training.wire import LONGEST_TEXT, carried

wire = placement_service_pb2

# A worker's interpreter runs this first: its data are such that their reader says what no database can keep.
UNREADABLE = """
from alto.v1 import error_pb2
from alto_common.errors import DomainError
from alto_training import datasets

def fetch(*_):
    raise DomainError(error_pb2.ERROR_REASON_DATASET_MALFORMED, "line 3 has '\\0' and '\\ud800'")

datasets.fetch = fetch
"""
AS_IT_IS = """
from alto_training import wire

wire.carried = lambda text: text.replace("\\ud800", "?")
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a plain one: \u00e9\n", "a plain one: \u00e9\n"),
        ("a\0b", "a\ufffdb"),
        ("half of a pair: \ud800", "half of a pair: ?"),
    ],
)
def test_a_text_is_told_as_messages_can_carry_it(text, said):
    assert carried(text) == tuning_pb2.Failure(message=carried(text)).message == said


def test_of_an_endless_text_both_ends_are_told():
    said = carried("a" * LONGEST_TEXT + "b" * LONGEST_TEXT)
    assert len(said) < LONGEST_TEXT + 10
    assert (said[0], said[-1]) == ("a", "b")


def has_first(house, monkeypatch, code):
    (house.folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(house.folder))


async def test_a_failure_that_speaks_of_a_nul_is_told(house, wait_until, monkeypatch):
    has_first(house, monkeypatch, UNREADABLE)
    await house.start_node()
    await house.enqueue(house.work())
    await wait_until(house.ended)
    last = house.admission.events("task_state_changed")[-1].task_state_changed
    assert (last.state, last.failure.reason) == (tuning_pb2.TASK_STATE_FAILED, "DATASET_MALFORMED")
    assert last.failure.message == "line 3 has '\ufffd' and '?'"
    assert house.admission.attempts() == 1


async def test_a_report_that_admission_refuses_is_not_sent_for_ever(house, wait_until, monkeypatch, metadata):
    has_first(house, monkeypatch, UNREADABLE + AS_IT_IS)
    await house.start_node()
    async with house.given_up() as given_up:
        await house.enqueue(house.work())
        await wait_until(lambda: given_up, what="the end")
    assert given_up[0].attempts == 3
    assert given_up[0].failure.message.endswith("admission refused a report of node node-a; that node's log says more")
    refusals = house.logged("node-a", "admission refuses a report")
    assert len(refusals) == 3
    assert "leave out the NUL character" in refusals[0]["error"]


async def test_a_cancelled_task_gives_its_place_back_though_admission_cannot_be_told(house, wait_until, metadata):
    await house.start_node(stop_grace_s=2)
    await house.enqueue(house.work(steps=100_000))
    await wait_until(lambda: house.admission.events("checkpoint_written"), what="a checkpoint")
    house.admission.refuse = True
    await house.stub.DequeueTask(wire.DequeueTaskRequest(task_id="task"), metadata=metadata, timeout=20)
    await wait_until(house.ended)
    assert house.admission.states() == [tuning_pb2.TASK_STATE_RUNNING]
    (unreported,) = house.logged("node-a", "giving a place back with events unreported")
    assert unreported["acknowledged"] < unreported["events"]
    house.admission.refuse = False
    await house.enqueue(house.work("next", steps=4))
    await wait_until(lambda: house.ended("next"))
    assert house.admission.states("next")[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
