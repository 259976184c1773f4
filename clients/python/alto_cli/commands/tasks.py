"""The commands about tasks and trials that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import ApiKey, Json, RootCertificates, Server, Target, Task, TaskOrNewest


def list_tasks(
    state: Annotated[list[str] | None, typer.Option(help="Only tasks in this state; may be given repeatedly.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only tasks with this label, KEY=VALUE.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most tasks to list.")] = 50,
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """List the tasks, newest first."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.list_tasks(state or [], label or [], limit, Target(server, api_key, root_certificates), json_output)


def show(
    task: TaskOrNewest = "",
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Show one task."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.show(task, Target(server, api_key, root_certificates), json_output)


def trials(
    task: TaskOrNewest = "",
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """List a task's trials, best first."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.trials(task, Target(server, api_key, root_certificates), json_output)


def cancel(
    task: Task,
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """End a task. Adapters that it has found stay."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("cancel", task, Target(server, api_key, root_certificates), json_output)


def pause(
    task: Task,
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Free a task's resources at its next checkpoint."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("pause", task, Target(server, api_key, root_certificates), json_output)


def resume(
    task: Task,
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Carry on with a paused task."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.change("resume", task, Target(server, api_key, root_certificates), json_output)


def stop_trial(
    task: Task,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="The trial, such as trial-003.", show_default=False)],
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Stop one trial. Its best adapter stays."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.stop_trial(task, trial, Target(server, api_key, root_certificates), json_output)


def download(
    task: TaskOrNewest = "",
    trial: Annotated[str, typer.Option(help="The trial. Default: the best one.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("alto-output"),
    force: Annotated[bool, typer.Option("--force", help="Replace another adapter that lies there.")] = False,
    server: Server = "",
    api_key: ApiKey = "",
    root_certificates: RootCertificates = None,
    json_output: Json = False,
) -> None:
    """Download an adapter (PEFT), each file checked."""
    with failures(json_output):
        from alto_cli import tasks

        tasks.download(task, trial, output, force, Target(server, api_key, root_certificates), json_output)
