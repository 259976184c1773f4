"""Following a search to its end: a live table on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from alto_cli.output import print_json, print_message, print_table, say
from alto_cli.view.leaderboard import closing_sentences, leaderboard_columns, leaderboard_rows
from alto_cli.view.plain_lines import PlainLines
from alto_cli.view.story import Story
from alto_cli.view.wording import printable
from alto_cli.wire_json import as_json

if TYPE_CHECKING:
    from alto.v1 import admission_service_pb2 as messages
    from alto_client import AltoClient, AltoError

    from alto_cli.view.live_table import LiveTable


class Follower(Protocol):
    """Shows a story while it unfolds."""

    def message(self, message: messages.WatchTuningTaskResponse) -> None:
        """Take in and show one message."""
        ...

    def notice(self, text: str) -> None:
        """Show a sentence that does not come from the task, such as a lost connection; empty takes it away."""
        ...


class JsonFollower:
    """One JSON object a message."""

    def __init__(self, story: Story) -> None:
        self._story = story

    def message(self, message: messages.WatchTuningTaskResponse) -> None:
        """Print the message."""
        self._story.apply(message)
        print_message(message)

    def notice(self, text: str) -> None:
        """Say it on stderr."""
        if text:
            say(text)


class PlainFollower:
    """One line a noteworthy event."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._lines = PlainLines(story)

    def message(self, message: messages.WatchTuningTaskResponse) -> None:
        """Print the lines of the message."""
        self._story.apply(message)
        for line in self._lines.lines(message):
            print(printable(line), flush=True)

    def notice(self, text: str) -> None:
        """Say it on stderr."""
        if text:
            say(text)


class LiveFollower:
    """Keeps the story of a `LiveTable`, which a thread of rich's redraws four times a second."""

    def __init__(self, story: Story, table: LiveTable) -> None:
        self._story = story
        self._table = table

    def message(self, message: messages.WatchTuningTaskResponse) -> None:
        """Take the message in; the table shows it when it is drawn next."""
        with self._table.lock:
            self._story.apply(message)
            self._table.notice = ""
            if message.HasField("snapshot") or message.event.WhichOneof("payload") == "task_progressed":
                self._table.reported()

    def notice(self, text: str) -> None:
        """Show it under the table until the next message."""
        with self._table.lock:
            self._table.notice = text


@contextmanager
def follower(story: Story, json_output: bool) -> Iterator[Follower]:
    """Give the follower that fits where stdout goes."""
    if json_output:
        yield JsonFollower(story)
    elif sys.stdout.isatty():
        with live_table(story) as table:
            yield LiveFollower(story, table)
    else:
        yield PlainFollower(story)


@contextmanager
def live_table(story: Story) -> Iterator[LiveTable]:
    """Draw the story on the terminal. A table that came to its end goes away: the leaderboard takes its place."""
    from rich.console import Console
    from rich.live import Live

    from alto_cli.view.live_table import LiveTable

    table = LiveTable(story)
    with Live(table, console=Console(), refresh_per_second=4) as live:
        yield table
        live.transient = True


def follow(client: AltoClient, task_id: str, resume_token: str, json_output: bool) -> Story:
    """Show a task until it ends and return its story as the server tells it then."""
    story = Story()
    with follower(story, json_output) as shown:

        def lost(error: AltoError, delay_s: float) -> None:
            shown.notice(f"connection lost ({error.message}); trying again in {delay_s:.1f} s")

        for message in client.watch(task_id, resume_token, on_disconnect=lost):
            shown.message(message)
    story.replace(client.get_task(task_id), list(client.trials(task_id)))
    return story


def show_result(story: Story, adapter_folder: str, json_output: bool) -> None:
    """Show how a search ended: the leaderboard and what it means, or one last JSON object."""
    trials = list(story.trials.values())
    if json_output:
        result = {
            "task": as_json(story.task),
            "trials": [as_json(trial) for trial in trials],
            "adapter_folder": adapter_folder or None,
        }
        print_json({"result": result})
        return
    print()
    print_table(leaderboard_columns(trials), leaderboard_rows(trials), empty="no trial was made")
    print()
    for sentence in closing_sentences(story, adapter_folder):
        print(sentence)
