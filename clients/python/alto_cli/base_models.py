"""What the commands about base models do."""

from __future__ import annotations

from pathlib import Path

from alto_cli.connection import connect
from alto_cli.extras import needs_extra
from alto_cli.failures import CommandError
from alto_cli.options import Target
from alto_cli.output import print_json, print_table, say
from alto_cli.view.wording import count_text
from alto_cli.wire_json import as_json


def list_models(target: Target, json_output: bool) -> None:
    """List the base models that the server has."""
    with connect(target) as client:
        models = client.base_models()
    if json_output:
        print_json({"base_models": [as_json(model) for model in models]})
        return
    rows = [
        [
            model.name,
            model.architecture,
            count_text(model.parameter_count),
            f"{model.context_length:,}",
            " ".join(model.target_modules),
        ]
        for model in models
    ]
    columns = ["model", "architecture", "weights", "context", "target modules"]
    print_table(columns, rows, empty="no models are there; fetch a small one: alto models fetch")


def fetch(root: Path | None, json_output: bool) -> None:
    """Fetch the small model of the quickstart."""
    from alto_cli.models import ModelFetchError, fetch_smollm2

    folder = root or Path.home() / ".cache" / "alto" / "models"
    try:
        with needs_extra("training", "fetching a model"):
            model = fetch_smollm2(folder, say)
    except ModelFetchError as error:
        raise CommandError(str(error), exit_code=1) from None
    if json_output:
        print_json({"folder": str(model)})
    else:
        print(model)
