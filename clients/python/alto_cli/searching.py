"""What tune, submit, watch and estimate do."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer
from alto.v1 import tuning_pb2
from alto_client import AltoClient, AltoError, load_task_file
from alto_client.task_file import TaskFile
from alto_client.task_spec import task_spec

from alto_cli import exit_codes
from alto_cli.connection import connect
from alto_cli.following import follow, show_result
from alto_cli.local_folders import check_writable
from alto_cli.newest import task_or_newest
from alto_cli.options import Target
from alto_cli.output import print_facts, print_message, say
from alto_cli.transfers import transfer
from alto_cli.view.story import Story
from alto_cli.view.trial_words import task_state_word
from alto_cli.view.wording import bytes_text, count_text, duration_text, plural

END_CODES = {
    tuning_pb2.TASK_STATE_SUCCEEDED: exit_codes.SUCCESS,
    tuning_pb2.TASK_STATE_CANCELLED: exit_codes.CANCELLED,
}


def tune_file(path: Path, output: Path | None, target: Target, json_output: bool) -> None:
    """Go the whole way: upload, submit, watch, download, and exit with what the task's end means."""
    task_file = load_task_file(path)
    folder = output.resolve() if output else task_file.output
    check_writable(folder)
    with connect(target) as client:
        task = client.create_task(uploaded_spec(client, task_file))
        if not json_output:
            say(f"submitted {task.task_id}: {plural(task.trial_count, 'trial')} over {task_file.base_model}")
        story = _follow(client, task.task_id, "", json_output)
        downloaded = _download_best(client, task.task_id, folder) if story.task.best_trial_id else ""
        _finish(story, downloaded, json_output)


def submit_file(path: Path, request_id: str, check: bool, target: Target, json_output: bool) -> None:
    """Submit a search, or only have it checked."""
    task_file = load_task_file(path)
    with connect(target) as client:
        spec = uploaded_spec(client, task_file)
        task = client.create_task(spec, request_id=request_id, validate_only=check)
        if json_output:
            print_message(task)
        elif check:
            say(f"sound: {plural(task.trial_count, 'trial')}; nothing was submitted")
        else:
            print(task.task_id)
            say(f"{plural(task.trial_count, 'trial')}, {task_state_word(task)}; follow it: alto watch {task.task_id}")


def watch_task(task_id: str, resume_token: str, target: Target, json_output: bool) -> None:
    """Follow a task to its end, and exit with what that means."""
    with connect(target) as client:
        story = _follow(client, task_or_newest(client, task_id), resume_token, json_output)
        _finish(story, "", json_output)


def estimate_file(path: Path, target: Target, json_output: bool) -> None:
    """Print what a search would take."""
    task_file = load_task_file(path)
    with connect(target) as client:
        estimate = client.estimate(uploaded_spec(client, task_file))
        if json_output:
            print_message(estimate)
            return
        hours = estimate.gpu_hours_expected
        print_facts(
            [
                ("trials", f"{estimate.trial_count:,}"),
                ("samples", f"{estimate.samples_planned:,} if no trial stops early"),
                ("tokens", count_text(estimate.tokens_planned)),
                ("expected", duration_text(estimate.duration_expected.ToTimedelta().total_seconds())),
                ("at most", duration_text(estimate.duration_upper.ToTimedelta().total_seconds())),
                ("GPU-hours", f"{hours:.2f}" if hours >= 0.005 else "less than 0.01"),
                ("memory", bytes_text(estimate.peak_memory_bytes) if estimate.peak_memory_bytes else ""),
                ("basis", estimate.basis),
            ]
        )


def uploaded_spec(client: AltoClient, task_file: TaskFile) -> tuning_pb2.TuningTaskSpec:
    """Upload a task file's datasets, what is there already not again, and return what it asks for."""
    with transfer(f"uploading {task_file.dataset.name}") as progress:
        dataset = client.upload_dataset(task_file.dataset, on_progress=progress)
    validation_id = ""
    if task_file.validation is not None:
        with transfer(f"uploading {task_file.validation.name}") as progress:
            validation_id = client.upload_dataset(task_file.validation, on_progress=progress).dataset_id
    return task_spec(task_file, dataset.dataset_id, validation_id)


def _download_best(client: AltoClient, task_id: str, folder: Path) -> str:
    """Fetch the best adapter and return its folder; where that fails, say how to fetch it later."""
    try:
        with transfer("downloading the best adapter") as progress:
            return str(client.download_adapter(task_id, folder, replace=True, on_progress=progress).folder)
    except (AltoError, OSError):
        say(f"the adapter stays with ALTO; fetch it: alto download {task_id} --output FOLDER")
        raise


def _follow(client: AltoClient, task_id: str, resume_token: str, json_output: bool) -> Story:
    """Follow a task; on Ctrl-C, or when the server stays away, say that the task goes on and how to come back."""
    try:
        return follow(client, task_id, resume_token, json_output)
    except KeyboardInterrupt:
        _say_how_to_come_back(task_id)
        raise
    except AltoError as error:
        if error.is_connection_loss:
            _say_how_to_come_back(task_id)
        raise


def _say_how_to_come_back(task_id: str) -> None:
    say("the task goes on without this terminal")
    say(f"come back: alto watch {task_id}")
    say(f"end it:    alto cancel {task_id}")


def _finish(story: Story, adapter_folder: str, json_output: bool) -> NoReturn:
    show_result(story, adapter_folder, json_output)
    raise typer.Exit(END_CODES.get(story.task.state, exit_codes.FAILURE))
