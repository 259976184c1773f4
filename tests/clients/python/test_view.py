import json

import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import event_pb2, tuning_pb2
from alto_cli.view import wording
from alto_cli.view.leaderboard import closing_sentences, leaderboard_columns, leaderboard_rows
from alto_cli.view.live_table import LiveTable
from alto_cli.view.plain_lines import PlainLines
from alto_cli.view.story import Story
from alto_cli.view.trial_words import varying_fields
from alto_cli.wire_json import as_json
from rich.console import Console


@pytest.fixture
def watched(search):
    """The messages of a whole watch."""
    events, trials = search
    task = tuning_pb2.TuningTask(task_id="task-1", spec={"display_name": "maths", "base_model": "tiny"}, trial_count=2)
    task.state = tuning_pb2.TASK_STATE_QUEUED
    snapshot = messages.TuningTaskSnapshot(task=task, trials=trials)
    return [
        messages.WatchTuningTaskResponse(snapshot=snapshot),
        *(messages.WatchTuningTaskResponse(event=event) for event in events),
    ]


@pytest.fixture
def ended(watched):
    story = Story()
    for message in watched:
        story.apply(message)
    return story


def rendered(story, width=120, height=30):
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as capture:
        console.print(LiveTable(story, clock=lambda: 0.0))
    return capture.get()


def test_a_story_follows_its_events(ended):
    assert ended.has_ended
    assert ended.task.best_trial_id == "trial-002"
    assert ended.task.best_validation_loss == 1.25
    assert ended.trials["trial-001"].decision.rule == "underperformance"
    assert ended.trials["trial-001"].state == tuning_pb2.TRIAL_STATE_STOPPED
    assert ended.trials["trial-002"].step == 10
    assert ended.trials["trial-002"].samples_trained == 40


def test_a_later_snapshot_takes_the_place_of_everything(ended):
    ended.apply(
        messages.WatchTuningTaskResponse(snapshot={"task": {"task_id": "task-1"}, "trials": [{"trial_id": "t"}]})
    )
    assert list(ended.trials) == ["t"]


def test_plain_lines_tell_what_matters_and_nothing_twice(watched):
    story = Story()
    plain = PlainLines(story)
    lines = []
    for message in watched:
        story.apply(message)
        lines.extend(plain.lines(message))
    assert lines == [
        "task task-1 (maths) queued, 2 trials",
        "waiting: Every place is in use.",
        "task running",
        "training begins on n1 (cpu,  kernels, 0 slots); base model's validation loss 2.5000",
        "trial-001 running: learning_rate 1e-4",
        "trial-002 running: learning_rate 5e-4",
        "trial-001 step 5/10: validation loss 1.9000, train loss 2.0000 (best so far)",
        "trial-002 step 5/10: validation loss 1.5000, train loss 1.8000 (best so far)",
        "50 % done, 1234 tokens/s",
        "trial-001 stopped by paper (underperformance): 1.9 is number 2 of 2",
        "trial-002 step 10/10: validation loss 1.2500, train loss 1.2000 (best so far)",
        "trial-002 finished, best validation loss 1.2500 at step 10",
        "task succeeded",
    ]


def test_plain_lines_tell_a_reason_that_several_failed_for_once(watched):
    story = Story()
    plain = PlainLines(story)
    cause = {"message": "no room"}
    failed = event_pb2.TrialStateChanged(state=tuning_pb2.TRIAL_STATE_FAILED, failure=cause)
    ended = event_pb2.TaskStateChanged(state=tuning_pb2.TASK_STATE_FAILED, failure=cause)
    events = [
        *(event_pb2.TaskEvent(trial_id=f"trial-00{number}", trial_state_changed=failed) for number in (1, 2)),
        event_pb2.TaskEvent(task_state_changed=ended),
    ]
    lines = []
    for message in [watched[0], *(messages.WatchTuningTaskResponse(event=event) for event in events)]:
        story.apply(message)
        lines.extend(plain.lines(message))
    assert lines[1:] == [
        "trial-001 failed at step 0: no room",
        "trial-002 failed at step 0 as trial-001 did",
        "task failed",
    ]
    assert closing_sentences(story)[-1] == "The task failed: no room"


def test_control_characters_of_others_never_reach_the_terminal(watched):
    story = Story()
    story.apply(watched[0])
    plain = PlainLines(story)
    decision = tuning_pb2.StoppingDecision(verdict=tuning_pb2.VERDICT_STOP, reason="\x1b[2J\nevil\r")
    event = event_pb2.TaskEvent(trial_id="trial-001", trial_decided=event_pb2.TrialDecided(decision=decision))
    message = messages.WatchTuningTaskResponse(event=event)
    story.apply(message)
    (line,) = plain.lines(message)
    assert line.isprintable()
    assert "\x1b" not in rendered(story)


def test_the_live_table_shows_trials_losses_and_reasons(ended):
    text = rendered(ended)
    assert "maths" in text
    assert "trial-001" in text
    assert "underperformance: 1.9 is number 2 of 2" in text
    assert "best: 1.2500 at step 10" in text
    assert "100 %" in text


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (200, 60)])
def test_the_live_table_never_outgrows_the_terminal(ended, width, height):
    for number in range(3, 300):
        ended.trials[f"trial-{number:03}"] = tuning_pb2.Trial(trial_id=f"trial-{number:03}")
    lines = rendered(ended, width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert "trial-002" in "\n".join(lines)


def test_the_leaderboard_ranks_and_explains(ended):
    trials = list(ended.trials.values())
    assert varying_fields(trials) == ["learning_rate"]
    assert leaderboard_columns(trials)[:3] == ["", "trial", "learning_rate"]
    first, second = leaderboard_rows(trials)
    assert first == ["1", "trial-002", "5e-4", "1.2500", "10/10", "40", "succeeded"]
    assert second[-1] == "stopped: underperformance"


def test_the_end_tells_what_was_saved_and_gained(ended):
    ended.task.savings.CopyFrom(tuning_pb2.Savings(samples_planned=80, samples_trained=60, trials_stopped=1))
    sentences = closing_sentences(ended, "/tmp/out")
    assert "Early exit stopped 1 of 2 trials: 1 underperformance." in sentences
    assert "It saved 20 of 80 samples (25 %)." in sentences
    assert "Validation loss: 2.5000 for the base model, 1.2500 with trial-002: 50 % lower." in sentences
    assert sentences[-1] == "The best adapter (trial-002, PEFT format) lies in /tmp/out"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("spec.search_space.base.max_length = 9: give less", "search.base.max_length = 9: give less"),
        ("spec.search_space.grid.dimensions[schedule.kind] = 3", "search.grid.schedule.kind = 3"),
        ("spec.search_space.grid.dimensions[lora_rank].values.values[2]", "search.grid.lora_rank[2]"),
        ("spec.search_space.random.dimensions[lora_rank].log_uniform.low", "search.random.lora_rank.log_uniform.low"),
        ("spec.search_space.random.dimensions[9].field", "search.random.dimensions[9].field"),
        ("spec.search_space.explicit.configs[3].lora_rank", "search.list[3].lora_rank"),
        ("spec.dataset_id, spec.validation_dataset_id", "dataset, validation"),
        ("spec.early_exit.policy and spec.display_name", "early_exit.policy and name"),
        ("spec.jsonl: line[2].text", "spec.jsonl: line[2].text"),
    ],
)
def test_fields_have_the_names_of_the_task_file(told, shown):
    assert wording.in_task_file(told) == shown


def test_words():
    assert [wording.duration_text(s) for s in (0.4, 59.4, 65, 3725, 90000)] == [
        "0 s",
        "59 s",
        "1 min 05 s",
        "1 h 02 min",
        "1 d 01 h",
    ]
    assert [wording.number_text(v) for v in (1e-4, 2.5e-5, 16, 0.05, 1e-3, 1.0)] == [
        "1e-4",
        "2.5e-5",
        "16",
        "0.05",
        "1e-3",
        "1",
    ]
    assert wording.loss_text(None) == "-"
    assert wording.loss_text(float("nan")) == "nan"
    assert wording.bytes_text(1536) == "1.5 KiB"
    assert wording.count_text(134_500_000) == "134.5M"


def test_json_has_numbers_words_and_nulls(ended):
    value = json.loads(json.dumps(as_json(ended.trials["trial-001"])))
    assert value["state"] == "STOPPED"
    assert value["config"]["learning_rate"] == 1e-4
    assert value["config"]["max_steps"] is None
    assert value["samples_trained"] == 20
    assert value["failure"] is None
    event = as_json(event_pb2.TaskEvent(task_progressed={"fraction_done": 0.5, "time_remaining": {"seconds": 90}}))
    assert event["task_progressed"]["time_remaining"] == 90.0
    assert "task_queued" not in event
    nan = as_json(tuning_pb2.TrialMetric(train_loss=float("nan")))
    assert nan["train_loss"] == "NaN"
