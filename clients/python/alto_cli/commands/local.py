"""The command that trains on this machine without services."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Device, Dtype, Json, Slots, TaskFileArgument, Threads


def train_local(
    file: TaskFileArgument,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; the same one carries on. Default: beside the output.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the best adapter, in place of the file's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another adapter in the output folder.")] = False,
    device: Device = "",
    dtype: Dtype = "float32",
    slots: Slots = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Run a search in this process, without services."""
    with failures(json_output):
        from alto_cli.local_training import LocalMachine, train_file

        train_file(file, work, output, force, LocalMachine(device, dtype, slots, threads), json_output)
