"""The commands about tasks and trials that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, Target, Task, TaskOrNewest, with_target


@with_target
def list_tasks(
    state: Annotated[list[str] | None, typer.Option(help="Only tasks in this state; may be given repeatedly.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only tasks with this label, KEY=VALUE.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most tasks to list.")] = 50,
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """List the tasks, newest first."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.list_tasks(state or [], label or [], limit, target, json_output)


@with_target
def show(task: TaskOrNewest = "", *, target: Target, json_output: Json = False) -> None:
    """Show one task."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.show(task, target, json_output)


@with_target
def trials(task: TaskOrNewest = "", *, target: Target, json_output: Json = False) -> None:
    """List a task's trials, best first."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.trials(task, target, json_output)


@with_target
def cancel(task: Task, target: Target, json_output: Json = False) -> None:
    """End a task. Adapters that it has found stay."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("cancel", task, target, json_output)


@with_target
def pause(task: Task, target: Target, json_output: Json = False) -> None:
    """Free a task's resources at its next checkpoint."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("pause", task, target, json_output)


@with_target
def resume(task: Task, target: Target, json_output: Json = False) -> None:
    """Carry on with a paused task."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("resume", task, target, json_output)


@with_target
def stop_trial(
    task: Task,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="The trial, such as trial-003.", show_default=False)],
    target: Target,
    json_output: Json = False,
) -> None:
    """Stop one trial. Its best adapter stays."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.stop_trial(task, trial, target, json_output)


@with_target
def download(
    task: TaskOrNewest = "",
    trial: Annotated[str, typer.Option(help="The trial. Default: the best one.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("alto-output"),
    force: Annotated[bool, typer.Option("--force", help="Replace another adapter that lies there.")] = False,
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Download an adapter (PEFT), each file checked."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.download(task, trial, output, force, target, json_output)
