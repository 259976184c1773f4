"""The command that trains on this machine without services."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, TaskFileArgument


def train_local(
    file: TaskFileArgument,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; the same one carries on. Default: beside the output.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the best adapter, in place of the file's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="Number format of the frozen model: float32 or bfloat16.")] = "float32",
    slots: Annotated[int | None, typer.Option(min=1, help="Most trials trained together.")] = None,
    json_output: Json = False,
) -> None:
    """Run a search in this process, without services."""
    with failures(json_output):
        from alto_cli.local_training import train_file

        train_file(file, work, output, device, dtype, slots, json_output)
