"""What the commands about existing tasks and trials do."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from pathlib import Path

from alto.v1 import tuning_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from alto_cli.connection import connect
from alto_cli.failures import CommandError
from alto_cli.newest import task_or_newest
from alto_cli.options import Target
from alto_cli.output import print_facts, print_json, print_message, print_table, say
from alto_cli.transfers import transfer
from alto_cli.view.leaderboard import leaderboard_columns, leaderboard_rows
from alto_cli.view.story import best_loss
from alto_cli.view.trial_words import task_state_word
from alto_cli.view.wording import bytes_text, duration_text, loss_text, percent_text, plural
from alto_cli.wire_json import as_json, enum_word


def list_tasks(states: list[str], labels: list[str], limit: int, target: Target, json_output: bool) -> None:
    """List tasks, newest first."""
    wanted = [_state(word) for word in states]
    with connect(target) as client:
        tasks = list(itertools.islice(client.tasks(states=wanted, labels=_labels(labels)), limit))
    if json_output:
        print_json({"tasks": [as_json(task) for task in tasks]})
        return
    rows = [
        [
            task.task_id,
            task.spec.display_name,
            task_state_word(task),
            str(task.trial_count),
            percent_text(task.fraction_done),
            loss_text(task.best_validation_loss if task.HasField("best_validation_loss") else None),
            _ago(task.create_time),
        ]
        for task in tasks
    ]
    columns = ["task", "name", "state", "trials", "done", "best val loss", "created"]
    print_table(columns, rows, empty="no tasks; submit one: alto tune FILE.yaml")


def show(task_id: str, target: Target, json_output: bool) -> None:
    """Show one task."""
    with connect(target) as client:
        task = client.get_task(task_or_newest(client, task_id))
    if json_output:
        print_message(task)
    else:
        print_facts(_facts(task))


def trials(task_id: str, target: Target, json_output: bool) -> None:
    """List a task's trials, best first."""
    with connect(target) as client:
        found = sorted(client.trials(task_or_newest(client, task_id)), key=best_loss)
    if json_output:
        print_json({"trials": [as_json(trial) for trial in found]})
    else:
        print_table(leaderboard_columns(found), leaderboard_rows(found, most=len(found)), empty="no trials")


def change(verb: str, task_id: str, target: Target, json_output: bool) -> None:
    """Cancel, pause or resume a task."""
    with connect(target) as client:
        calls = {"cancel": client.cancel_task, "pause": client.pause_task, "resume": client.resume_task}
        task = calls[verb](task_id)
    if json_output:
        print_message(task)
    else:
        say(f"{task.task_id} is {task_state_word(task)}")


def stop_trial(task_id: str, trial_id: str, target: Target, json_output: bool) -> None:
    """Stop one trial."""
    with connect(target) as client:
        trial = client.stop_trial(task_id, trial_id)
    if json_output:
        print_message(trial)
    else:
        stays = "; its best adapter stays" if trial.HasField("adapter") else ""
        if trial.state in (tuning_pb2.TRIAL_STATE_PENDING, tuning_pb2.TRIAL_STATE_PAUSED):
            say(f"{trial_id} will not be trained{stays}")
        elif trial.state == tuning_pb2.TRIAL_STATE_RUNNING:
            say(f"{trial_id} ends at the executor's next tick{stays}")
        else:
            say(f"{trial_id} has ended already{stays}")


def download(task_id: str, trial_id: str, output: Path, force: bool, target: Target, json_output: bool) -> None:
    """Download an adapter."""
    with connect(target) as client:
        task_id = task_or_newest(client, task_id)
        with transfer("downloading") as progress:
            downloaded = client.download_adapter(
                task_id, output.resolve(), trial_id, replace=force, on_progress=progress
            )
    if json_output:
        adapter = as_json(downloaded.adapter)
        print_json({"folder": str(downloaded.folder), "trial_id": downloaded.trial_id, "adapter": adapter})
        return
    size = bytes_text(sum(file.size_bytes for file in downloaded.adapter.files))
    loss = loss_text(downloaded.adapter.validation_loss)
    print(downloaded.folder)
    say(f"adapter of {downloaded.trial_id}, step {downloaded.adapter.step}, validation loss {loss}, {size}")


def _facts(task: tuning_pb2.TuningTask) -> list[tuple[str, str]]:
    savings = task.savings
    best = f"{loss_text(task.best_validation_loss)} ({task.best_trial_id})" if task.best_trial_id else ""
    left = duration_text(task.time_remaining.ToTimedelta().total_seconds()) if task.HasField("time_remaining") else ""
    saved = ""
    if savings.samples_planned:
        saved = f"{savings.samples_trained:,} of {savings.samples_planned:,} samples trained"
        saved += f", {plural(savings.trials_stopped, 'trial')} stopped early"
    return [
        ("task", task.task_id),
        ("name", task.spec.display_name),
        ("state", task_state_word(task)),
        ("why", task.queue.explanation if task.state == tuning_pb2.TASK_STATE_QUEUED else task.failure.message),
        ("base model", task.spec.base_model),
        ("trials", str(task.trial_count)),
        ("done", percent_text(task.fraction_done)),
        ("time left", left),
        ("node", task.node_id),
        ("best val loss", best),
        ("base model's", loss_text(task.base_validation_loss) if task.HasField("base_validation_loss") else ""),
        ("savings", saved),
        ("created", _time(task.create_time)),
        ("started", _time(task.start_time) if task.HasField("start_time") else ""),
        ("ended", _time(task.end_time) if task.HasField("end_time") else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(task.spec.labels.items()))),
    ]


def _state(word: str) -> tuning_pb2.TaskState.ValueType:
    name = f"TASK_STATE_{word.upper()}"
    try:
        return tuning_pb2.TaskState.Value(name)
    except ValueError:
        enum = tuning_pb2.TaskState.DESCRIPTOR
        known = ", ".join(enum_word(enum, value.number).lower() for value in enum.values[1:])
        raise CommandError(f"--state {word}: there is no such state", f"known are {known}") from None


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise CommandError(f"--label {pair}: write KEY=VALUE")
        labels[key] = value
    return labels


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _ago(stamp: Timestamp) -> str:
    return f"{duration_text((datetime.now(UTC) - stamp.ToDatetime(tzinfo=UTC)).total_seconds())} ago"
