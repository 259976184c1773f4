"""What a tenant is told of a task, and how a plan is drawn: the same input gives the same words."""

from datetime import UTC, datetime, timedelta

from alto.v1 import placement_pb2, tuning_pb2
from alto_cli.view.gantt import gantt_lines, task_letters
from alto_cli.view.why import why_facts
from google.protobuf.timestamp_pb2 import Timestamp

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


def at(seconds):
    stamp = Timestamp()
    stamp.FromDatetime(NOW + timedelta(seconds=seconds))
    return stamp


def told(task):
    return {name: value for name, value in why_facts(task, NOW) if value}


def waiting(reason, explanation, **forecast):
    return tuning_pb2.TuningTask(
        task_id="task-1",
        state=tuning_pb2.TASK_STATE_QUEUED,
        queue={"reason": reason, "explanation": explanation},
        forecast=forecast,
    )


def test_a_task_behind_others_hears_what_it_waits_for_and_until_when():
    found = told(
        waiting(
            "GPUS_BUSY",
            "Every place that could hold it is in use. 2 tasks are ahead of it.",
            start_time=at(120),
            end_time=at(600),
            earliest_end_time=at(400),
            latest_end_time=at(900),
            longest_end_time=at(1800),
            waits_for=["task-0"],
            waits_for_others=2,
            first_in_line_time=at(3600),
            changes=[
                {"kind": tuning_pb2.FORECAST_CHANGE_KIND_TASKS_END},
                {"kind": tuning_pb2.FORECAST_CHANGE_KIND_FEWER_GPUS, "amount": 2},
                {"kind": tuning_pb2.FORECAST_CHANGE_KIND_HIGHER_PRIORITY, "amount": 1},
            ],
        )
    )
    assert found["task"] == "task-1 is waiting"
    assert found["why"].startswith("Every place")
    assert found["waits for"] == "your task-0, and 2 tasks of others"
    assert found["starts"].startswith("in about 2 min 00 s (")
    assert "between 6 min 40 s and 15 min 00 s from now" in found["ends"]
    assert found["at the latest"].endswith("if no trial stops early")
    assert found["first in line"].startswith("in about 1 h 00 min")
    assert found["sooner if"] == (
        "a task that it waits for ends early; or it asks for 2 GPUs at most; or its priority is 1 or more"
    )


def test_a_task_over_its_quota_hears_what_would_help():
    change = {"kind": tuning_pb2.FORECAST_CHANGE_KIND_MORE_QUOTA, "amount": 1}
    found = told(waiting("QUOTA", "Its tenant already holds all the GPUs that it may hold.", changes=[change]))
    assert found["sooner if"] == "a task of yours ends, or your quota grows by 1 GPU"


def test_a_task_without_a_node_is_told_that_nothing_is_foreseen():
    found = told(waiting("NO_NODE_READY", "No node that could hold it takes work now: node-a is being drained."))
    assert found["starts"].startswith("not foreseen")
    assert "ends" not in found


def test_a_running_task_hears_when_it_ends():
    found = told(
        tuning_pb2.TuningTask(
            task_id="task-1",
            state=tuning_pb2.TASK_STATE_RUNNING,
            node_id="node-a",
            start_time=at(-60),
            fraction_done=0.5,
            trial_count=8,
            savings={"trials_stopped": 1},
            forecast={"end_time": at(60), "earliest_end_time": at(59), "latest_end_time": at(61)},
        )
    )
    assert found["task"] == "task-1 is running"
    assert found["done"] == "50 %; 1 trial of 8 stopped early"
    assert found["ends"].startswith("in about 1 min 00 s")
    assert "nine of ten" not in found["ends"]


def test_a_task_that_ended_says_how_and_what_is_left_of_it():
    task = tuning_pb2.TuningTask(task_id="task-1", start_time=at(-300), end_time=at(-60), best_trial_id="trial-3")
    task.state, task.best_validation_loss = tuning_pb2.TASK_STATE_SUCCEEDED, 1.25
    found = told(task)
    assert found["task"] == "task-1 has succeeded"
    assert found["took"] == "4 min 00 s from its first start"
    assert found["best"] == "trial-3, validation loss 1.2500"
    task.state, task.best_trial_id = tuning_pb2.TASK_STATE_FAILED, ""
    task.failure.message, task.failure.reason = "the worker process was killed", "EXECUTION_FAILED"
    found = told(task)
    assert found["why"] == "the worker process was killed"
    assert "fetch it" not in found
    assert told(tuning_pb2.TuningTask(task_id="task-1", state=tuning_pb2.TASK_STATE_PAUSED))["next"] == (
        "let it go on: alto resume task-1"
    )


def planned(task_id, state, node_id, gpus, start, end):
    return placement_pb2.PlannedTask(
        task_id=task_id, state=state, node_id=node_id, gpu_indices=gpus, start_time=at(start), end_time=at(end)
    )


def test_the_chart_has_a_lane_for_each_gpu_and_a_letter_for_each_task():
    plan = placement_pb2.Plan(
        nodes=[placement_pb2.Node(node_id="n1", gpus=2), placement_pb2.Node(node_id="n2", gpus=1)],
        tasks=[
            planned("later", placement_pb2.PLACEMENT_STATE_WAITING, "n1", [0], 50, 100),
            planned("wide", placement_pb2.PLACEMENT_STATE_ASSIGNED, "n1", [0, 1], -10, 50),
            placement_pb2.PlannedTask(task_id="nowhere", state=placement_pb2.PLACEMENT_STATE_WAITING),
        ],
    )
    letters = task_letters(plan)
    assert letters == {"wide": "a", "later": "b"}
    lines = gantt_lines(plan, letters, NOW, 4 + 3 + 20, is_unicode=False)
    assert lines[0] == "n1/0 |a=========b.........|"
    assert lines[1] == "n1/1 |a=========          |"
    assert lines[2] == "n2/0 |                    |"
    assert lines[3].endswith("1 min 40 s")
    assert gantt_lines(placement_pb2.Plan(), {}, NOW, 80) == []
