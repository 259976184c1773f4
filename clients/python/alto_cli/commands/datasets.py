"""The commands about datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, Target, with_target

app = typer.Typer(help="Check, upload, list and delete datasets.", no_args_is_help=True)
DatasetFile = Annotated[Path, typer.Argument(metavar="FILE", help="A JSONL or Parquet file.", show_default=False)]


@app.command()
def check(
    file: DatasetFile,
    model: Annotated[str, typer.Option(help="Base model: a name or a folder. Without it only lines are checked.")] = "",
    objective: Annotated[str, typer.Option(help="sft or dpo.")] = "sft",
    loss_scope: Annotated[str, typer.Option(help="completion or all.")] = "completion",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens that a sequence is cut to. Else 1024, or the model's context.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Check a file on this machine: lines, tokens, what is cut off, and where the loss is taken."""
    with failures(json_output):
        from alto_cli.dataset_check import check_dataset

        check_dataset(file, model, objective, loss_scope, max_length, json_output)


@app.command("list")
@with_target
def list_datasets(target: Target, json_output: Json = False) -> None:
    """List the uploaded datasets, newest first, and uploads that are not complete."""
    with failures(json_output):
        from alto_cli import datasets

        datasets.list_datasets(target, json_output)


@app.command()
@with_target
def upload(
    file: DatasetFile,
    name: Annotated[str, typer.Option(help="A name for people. Default: the file's.")] = "",
    *,
    target: Target,
    json_output: Json = False,
) -> None:
    """Upload a file; the same file again is the same dataset."""
    with failures(json_output):
        from alto_cli import datasets

        datasets.upload(file, name, target, json_output)


@app.command()
@with_target
def delete(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The dataset's id.", show_default=False)],
    target: Target,
    json_output: Json = False,
) -> None:
    """Delete a dataset that no unfinished task uses, or what was uploaded of it."""
    with failures(json_output):
        from alto_cli import datasets

        datasets.delete(dataset, target, json_output)
