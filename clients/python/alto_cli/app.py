"""The commands of `alto`, in the order that --help shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from alto_cli.commands import base_models, cluster, datasets, local, search, services, tasks

# Plain help and no rich tracebacks: importing rich alone would take half the time that `alto --help` may.
app = typer.Typer(
    name="alto",
    help="Tune LoRA adapters: search their hyperparameters together over one frozen model.",
    epilog="Begin with `alto up` and `alto tune FILE.yaml`. Every command takes --help, and --json.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from alto_common.version import package_version

        print(f"alto {package_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("tune", search.tune),
    ("submit", search.submit),
    ("watch", search.watch),
    ("estimate", search.estimate),
    ("list", tasks.list_tasks),
    ("show", tasks.show),
    ("trials", tasks.trials),
    ("cancel", tasks.cancel),
    ("pause", tasks.pause),
    ("resume", tasks.resume),
    ("stop-trial", tasks.stop_trial),
    ("download", tasks.download),
    ("train-local", local.train_local),
    ("up", services.up),
    ("down", services.down),
    ("status", services.status),
    ("plan", cluster.plan),
    ("why", cluster.why),
    ("nodes", cluster.nodes),
    ("drain", cluster.drain),
    ("cordon", cluster.cordon),
    ("uncordon", cluster.uncordon),
)
for name, command in COMMANDS:
    app.command(name)(command)
app.add_typer(datasets.app, name="dataset")
app.add_typer(base_models.app, name="models")
