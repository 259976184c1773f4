"""Where a command's words go: results to stdout, messages to stderr, JSON alone on stdout when it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from alto_cli.view.wording import printable

if TYPE_CHECKING:
    from google.protobuf.message import Message


ID_COLUMNS = ("task", "trial", "dataset", "node")


def say(text: str) -> None:
    """Print a message for a person."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON value on a line of its own."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_message(message: Message) -> None:
    """Print a message of the contract as one JSON object."""
    from alto_cli.wire_json import as_json

    print_json(as_json(message))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """Print rows under their columns: a drawn table on a terminal, plain aligned text elsewhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        say(empty)
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, column in enumerate(columns):
            # What is copied from the screen stays in one piece; the rest is folded where the terminal is narrow.
            table.add_column(column, no_wrap=index == 0 or column in ID_COLUMNS, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    for row in [[column.upper() for column in columns], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values below each other; what has no value is left out."""
    shown = [(name, printable(value)) for name, value in facts if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}")
