"""The journal: what was appended whole is read, what was torn is not, and nothing is lost between attempts."""

import pytest
from alto.v1 import event_pb2, tuning_pb2
from alto_training.journal import (
    JOURNAL_FILE,
    JournalWriter,
    read_acknowledged,
    read_journal,
    write_acknowledged,
)
from alto_training.supervisor import carry_over


def measured(step):
    metric = tuning_pb2.TrialMetric(step=step, train_loss=1.0 / step)
    return event_pb2.TaskEvent(trial_id="trial", trial_measured=event_pb2.TrialMeasured(metric=metric))


def state(value):
    return event_pb2.TaskEvent(task_state_changed=event_pb2.TaskStateChanged(state=value))


def write(folder, *events):
    folder.mkdir(exist_ok=True)
    with JournalWriter(folder / JOURNAL_FILE) as journal:
        for event in events:
            journal.append(event, durable=False)
    return folder / JOURNAL_FILE


def test_records_come_back_in_order_from_any_of_them(tmp_path):
    events = [measured(step) for step in range(1, 400)]
    path = write(tmp_path, *events)
    records = list(read_journal(path))
    assert [record.event for record in records] == events
    assert [record.sequence for record in records] == list(range(1, 400))
    later = list(read_journal(path, records[99].end_offset, 100))
    assert later == records[100:]
    assert list(read_journal(tmp_path / "nothing")) == []


@pytest.mark.parametrize("rest", [b"", b"\x00" * 64], ids=["cut", "zeros"])
def test_a_torn_end_is_as_if_never_written_wherever_it_tears(tmp_path, rest):
    path = write(tmp_path, measured(1), measured(2), measured(3))
    whole = path.read_bytes()
    ends = [record.end_offset for record in read_journal(path)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut] + (rest if cut in (0, *ends) else b""))
        kept = sum(end <= cut for end in ends)
        assert [record.event for record in read_journal(path)] == [measured(step) for step in range(1, kept + 1)]
        write(tmp_path, measured(9))
        assert [record.event for record in read_journal(path)][kept:] == [measured(9)]


def test_acknowledgements_are_kept_and_may_be_lost(tmp_path):
    assert read_acknowledged(tmp_path) == 0
    write_acknowledged(tmp_path, 41)
    assert read_acknowledged(tmp_path) == 41
    (tmp_path / "acknowledged").write_text("")
    assert read_acknowledged(tmp_path) == 0


def events_of(folder):
    return [record.event for record in read_journal(folder / JOURNAL_FILE)]


def test_the_next_attempt_tells_what_admission_may_not_have(tmp_path):
    earlier, folder = tmp_path / "1", tmp_path / "2"
    folder.mkdir()
    paused = state(tuning_pb2.TASK_STATE_PAUSED)
    write(earlier, state(tuning_pb2.TASK_STATE_RUNNING), measured(1), measured(2), paused)
    write_acknowledged(earlier, 2)
    assert not carry_over(earlier, folder)
    assert events_of(folder) == [measured(2)]


def test_an_attempt_that_succeeded_is_not_repeated(tmp_path):
    earlier, folder = tmp_path / "1", tmp_path / "2"
    folder.mkdir()
    succeeded = state(tuning_pb2.TASK_STATE_SUCCEEDED)
    write(earlier, measured(1), measured(2), succeeded)
    write_acknowledged(earlier, 3)
    assert carry_over(earlier, folder)
    assert events_of(folder) == [succeeded]


def test_a_first_attempt_has_nothing_to_tell(tmp_path):
    assert not carry_over(None, tmp_path)
    assert events_of(tmp_path) == []
