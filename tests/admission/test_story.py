"""Reports tell the same story however often a node dies and however often they are repeated."""

from dataclasses import asdict

import pytest
from alto.v1 import error_pb2, tuning_pb2
from alto_admission.domain import fence
from alto_admission.domain.story import DeliveryKind, Story
from alto_admission.domain.task import Task, Trial
from alto_admission.domain.task_states import CANCELLED, PAUSED, QUEUED, RUNNING, Request
from alto_common.errors import DomainError
from hypothesis import given
from hypothesis import strategies as st

from .reporting import (
    adapter_ready,
    decided,
    evaluated,
    progressed,
    started,
    task_state,
    trained,
    trial_state,
)

FOLDER = "tenants/acme/tasks/task-1"
NOW_US = 1_700_000_000_000_000
STOPPED = tuning_pb2.TRIAL_STATE_STOPPED
SUCCEEDED = tuning_pb2.TRIAL_STATE_SUCCEEDED
FAILED = tuning_pb2.TRIAL_STATE_FAILED


def a_task(trials=3):
    task = Task(
        task_id="task-1",
        tenant="acme",
        request_id="r",
        request_hash="",
        spec=b"",
        base_model="m",
        dataset_id="d",
        validation_dataset_id=None,
        trial_count=trials,
        samples_planned=100,
        create_us=NOW_US,
    )
    return task, [Trial("task-1", f"t{number}", number, b"", 4) for number in range(trials)]


class Kept:
    """What admission keeps of a task between transactions."""

    def __init__(self, trials=3):
        self.task, self.trials = a_task(trials)
        self.events = []
        self.metrics = {}

    def open(self):
        return Story(self.task, self.trials, NOW_US)

    def keep(self, story):
        story.close()
        self.events += story.events
        for metric in story.metrics:
            key = metric.trial_id, metric.step
            known = self.metrics.get(key, {})
            self.metrics[key] = known | {name: value for name, value in asdict(metric).items() if value is not None}

    def report(self, epoch, events, first=1):
        story = self.open()
        for sequence, event in enumerate(events, start=first):
            if fence.admit(self.task, epoch, sequence):
                story.reported(epoch, event)
        self.keep(story)

    def final_state(self):
        """All that a tenant sees in the end, but for the count of events."""
        hidden = {"epoch", "reported_sequence", "last_event_sequence", "state_epoch", "state_step"}
        rows = [self.task, *self.trials]
        return [{k: v for k, v in asdict(row).items() if k not in hidden} for row in rows], self.metrics


def execution():
    """The steps of an undisturbed execution, at each of which it might have written a checkpoint."""
    yield [trial_state("t0", tuning_pb2.TRIAL_STATE_RUNNING), trial_state("t1", tuning_pb2.TRIAL_STATE_RUNNING)]
    for step in (1, 2):
        yield [trained("t0", step), trained("t1", step), evaluated("t0", step, 1 / step), evaluated("t1", step, 2.0)]
        yield [progressed(step / 10)]
    yield [decided("t1", 2), adapter_ready("t1", FOLDER, 2.0, step=1), trial_state("t1", STOPPED, 2)]
    yield [trial_state("t2", tuning_pb2.TRIAL_STATE_RUNNING)]
    for step in (3, 4):
        yield [trained("t0", step), evaluated("t0", step, 1 / step)]
        yield [trained("t2", step - 2, float("nan"))]
    yield [adapter_ready("t0", FOLDER, 0.25), trial_state("t0", SUCCEEDED, 4)]
    yield [trial_state("t2", FAILED, 2), progressed(1.0)]


STEPS = list(execution())
END = task_state(tuning_pb2.TASK_STATE_SUCCEEDED)


def undisturbed():
    kept = Kept()
    kept.report(1, [started(), *(event for step in STEPS for event in step), END])
    return kept


@st.composite
def interruptions(draw):
    """Attempts of a task: each begins at a checkpoint of the one before, and dies somewhere; the last does not."""
    attempts = []
    checkpoint = 0
    for _ in range(draw(st.integers(0, 4))):
        died = draw(st.integers(checkpoint, len(STEPS)))
        attempts.append((checkpoint, died))
        checkpoint = draw(st.integers(checkpoint, died))
    return [*attempts, (checkpoint, len(STEPS))]


@given(interruptions(), st.data())
def test_interruptions_and_repetitions_change_nothing(attempts, data):
    kept = Kept()
    for epoch, (begin, end) in enumerate(attempts, start=1):
        events = [started(resumed=epoch > 1), *(event for step in STEPS[begin:end] for event in step)]
        if epoch == len(attempts):
            events.append(END)
        cut = data.draw(st.integers(0, len(events)), label="what was acknowledged before the stream broke")
        kept.report(epoch, events[:cut])
        repeated = data.draw(st.integers(0, cut), label="where the node carries on")
        kept.report(epoch, events[repeated:], first=repeated + 1)
        if epoch > 1:
            with pytest.raises(DomainError) as caught:
                kept.report(epoch - 1, [END], first=99)
            assert caught.value.reason == error_pb2.ERROR_REASON_EPOCH_STALE
    assert kept.final_state() == undisturbed().final_state()
    assert [event.sequence for event in kept.events] == list(range(1, len(kept.events) + 1))
    changes = [
        (event.trial_id, event.trial_state_changed.state)
        for event in kept.events
        if event.HasField("trial_state_changed")
    ]
    assert len(changes) == len(set(changes)), "a change of state was told twice"
    measured = [
        (event.trial_id, event.trial_measured.metric.step, event.trial_measured.metric.HasField("validation_loss"))
        for event in kept.events
        if event.HasField("trial_measured")
    ]
    assert len(measured) == len(set(measured)), "a measurement was told twice"


def test_what_an_undisturbed_execution_leaves():
    kept = undisturbed()
    task, trials = kept.task, {trial.trial_id: trial for trial in kept.trials}
    assert task.state == tuning_pb2.TASK_STATE_SUCCEEDED
    assert (task.best_trial_id, task.best_validation_loss) == ("t0", 0.25)
    assert (task.base_validation_loss, task.node_id, task.trials_stopped) == (3.0, "n1", 1)
    assert (trials["t0"].best_validation_loss, trials["t0"].best_step, trials["t0"].step) == (0.25, 4, 4)
    assert trials["t2"].train_loss_smoothed is None
    assert kept.metrics["t0", 2] == {
        "trial_id": "t0",
        "step": 2,
        "time_us": NOW_US,
        "train_loss": 1.0,
        "train_loss_smoothed": 1.0,
        "learning_rate": 1e-4,
        "validation_loss": 0.5,
    }


def test_an_older_epoch_is_refused_and_a_gap_is_refused():
    kept = Kept()
    kept.report(2, [started()])
    with pytest.raises(DomainError) as caught:
        kept.report(1, [started()])
    assert caught.value.reason == error_pb2.ERROR_REASON_EPOCH_STALE
    with pytest.raises(DomainError) as caught:
        kept.report(2, [started()], first=3)
    assert (caught.value.reason, caught.value.violations[0].field) == (error_pb2.ERROR_REASON_INVALID_FIELD, "sequence")


def test_a_node_that_lets_go_unasked_queues_the_task_again():
    kept = Kept()
    kept.report(1, [started(), trial_state("t0", tuning_pb2.TRIAL_STATE_RUNNING), task_state(PAUSED)])
    assert kept.task.state == QUEUED
    assert kept.task.queue_reason == "PLACED_AGAIN"
    assert kept.trials[0].state == tuning_pb2.TRIAL_STATE_PENDING
    kept.report(2, [started(resumed=True), trial_state("t0", tuning_pb2.TRIAL_STATE_RUNNING)])
    assert kept.task.state == RUNNING
    assert kept.trials[0].state == tuning_pb2.TRIAL_STATE_RUNNING


def test_a_parked_trial_is_pending_until_the_next_node_tells_that_it_is_parked():
    kept = Kept()
    parked = trial_state("t0", tuning_pb2.TRIAL_STATE_PAUSED, 3)
    kept.report(1, [started(), trial_state("t0", tuning_pb2.TRIAL_STATE_RUNNING), parked, task_state(PAUSED)])
    assert kept.trials[0].state == tuning_pb2.TRIAL_STATE_PENDING
    kept.report(2, [started(resumed=True), parked])
    assert kept.trials[0].state == tuning_pb2.TRIAL_STATE_PAUSED
    assert kept.events[-1].trial_state_changed.state == tuning_pb2.TRIAL_STATE_PAUSED


def test_a_queued_task_is_cancelled_at_once_with_its_trials():
    kept = Kept()
    story = kept.open()
    assert story.request(Request.CANCEL)
    kept.keep(story)
    assert kept.task.state == CANCELLED
    assert {trial.state for trial in kept.trials} == {tuning_pb2.TRIAL_STATE_CANCELLED}
    assert kept.events[-1].task_state_changed.state == CANCELLED, "the last event is the task's own"
    assert [one.kind for one in story.deliveries] == [DeliveryKind.DEQUEUE]
    before = kept.final_state()
    kept.report(1, [started(), trained("t0", 1), END])
    assert kept.final_state() == before, "a node that had not heard of it yet changes nothing"


def test_success_without_an_adapter_is_a_failure():
    kept = Kept(trials=1)
    kept.report(1, [started(), trial_state("t0", FAILED, 1), END])
    assert kept.task.state == tuning_pb2.TASK_STATE_FAILED
    assert kept.task.failure_reason == "EXECUTION_FAILED"


def test_a_trial_is_stopped_once():
    kept = Kept()
    story = kept.open()
    assert story.stop_trial(kept.trials[0])
    assert not story.stop_trial(kept.trials[0])
    assert [one.kind for one in story.deliveries] == [DeliveryKind.UPDATE]


def test_predictions_that_hardly_move_make_no_event():
    kept = Kept()
    status = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="busy")
    status.predicted_start_time.FromMicroseconds(NOW_US)
    for shift_s in (0, 5, 60):
        story = kept.open()
        status.predicted_start_time.FromMicroseconds(NOW_US + shift_s * 1_000_000)
        story.queued(status)
        kept.keep(story)
    assert len(kept.events) == 2
