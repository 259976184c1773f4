"""What `alto up` shows: a table that stays correct on a terminal, a line a change elsewhere, or JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alto_cli.output import print_json, say
from alto_cli.up.lock import ServiceStatus
from alto_cli.view.wording import printable

STYLES = {
    "serving": "green",
    "starting": "cyan",
    "not serving": "yellow",
    "restarting": "red",
    "ended": "red",
    "stopped": "dim",
}


class Screen(Protocol):
    """Where the services' states and sentences about them go."""

    def update(self, services: Sequence[ServiceStatus]) -> None:
        """Show how the services are."""
        ...

    def tell(self, text: str) -> None:
        """Show a sentence."""
        ...


class LineScreen:
    """A line on stderr for each change; with `json_output` an object on stdout besides."""

    def __init__(self, json_output: bool) -> None:
        self._json = json_output
        self._shown: dict[str, ServiceStatus] = {}

    def update(self, services: Sequence[ServiceStatus]) -> None:
        """Tell what changed."""
        for service in services:
            before = self._shown.get(service.name)
            if before is None or (before.state, before.pid) != (service.state, service.pid):
                self._shown[service.name] = service
                if self._json:
                    print_json({"service": asdict(service)})
                else:
                    say(f"{service.name:10} {service.state:12} {service.address}")

    def tell(self, text: str) -> None:
        """Print the sentence."""
        for line in text.splitlines():
            say(line)


class TableScreen:
    """A table that is drawn anew with each update; sentences scroll above it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._since: dict[str, tuple[str, float]] = {}

    def update(self, services: Sequence[ServiceStatus]) -> None:
        """Draw the table."""
        self._live.update(self._table(services), refresh=True)

    def tell(self, text: str) -> None:
        """Print the sentence above the table."""
        for line in text.splitlines():
            self._live.console.print(Text(printable(line)))

    def _table(self, services: Sequence[ServiceStatus]) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("service", "state", "address", "pid", "restarts", "for", ""):
            table.add_column(column, no_wrap=True)
        now = time.monotonic()
        for service in services:
            state, since = self._since.get(service.name, ("", now))
            if state != service.state:
                since = now
                self._since[service.name] = (service.state, now)
            table.add_row(
                service.name,
                Text(service.state, style=STYLES.get(service.state, "")),
                service.address,
                str(service.pid or "-"),
                str(service.restarts),
                f"{now - since:.0f} s",
                Text(service.detail, style="dim"),
            )
        return table


@contextmanager
def screen(json_output: bool) -> Iterator[Screen]:
    """Give the screen that fits where the output goes."""
    if json_output or not sys.stderr.isatty():
        yield LineScreen(json_output)
        return
    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield TableScreen(live)
