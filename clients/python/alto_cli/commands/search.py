"""The commands that take a task file or follow a search: tune, submit, watch, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import CommandError, failures
from alto_cli.options import (
    Device,
    Dtype,
    Json,
    Slots,
    Target,
    TaskFileArgument,
    TaskOrNewest,
    Threads,
    with_target,
)


@with_target
def tune(
    file: TaskFileArgument,
    output: Annotated[Path | None, typer.Option(help="Folder for the best adapter, in place of the file's.")] = None,
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Search, and fetch the best adapter: submit, watch, download."""
    with failures(json_output):
        from alto_cli.searching import tune_file

        tune_file(file, output, target, json_output)


@with_target
def submit(
    file: TaskFileArgument,
    request_id: Annotated[str, typer.Option(help="The same id gives the same task. Default: a new one.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Have everything checked, and admit nothing.")] = False,
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Submit a search and print its task id."""
    with failures(json_output):
        from alto_cli.searching import submit_file

        submit_file(file, request_id, check, target, json_output)


@with_target
def watch(
    task: TaskOrNewest = "",
    resume_token: Annotated[str, typer.Option(help="Carry on after the message that had this token.")] = "",
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Follow a search until it ends. Ctrl-C leaves it running."""
    with failures(json_output):
        from alto_cli.searching import watch_task

        watch_task(task, resume_token, target, json_output)


@with_target
def estimate(
    file: TaskFileArgument,
    local: Annotated[bool, typer.Option("--local", help="For `alto train-local` on this machine, no service.")] = False,
    device: Device = "",
    dtype: Dtype = "float32",
    slots: Slots = None,
    threads: Threads = None,
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Tell what a search would take; nothing is spent."""
    with failures(json_output):
        if local:
            from alto_cli.local_estimate import estimate_file_locally
            from alto_cli.local_training import LocalMachine

            estimate_file_locally(file, LocalMachine(device, dtype, slots, threads), json_output)
            return
        if device or dtype != "float32" or slots is not None or threads is not None:
            raise CommandError(
                "--device, --dtype, --slots, --threads: for a machine of yours; the service has its own",
                "add --local, or leave them out",
            )
        from alto_cli.searching import estimate_file

        estimate_file(file, target, json_output)
