"""A search on a terminal: the trials as a table, one progress bar, and nothing that jumps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from alto.v1 import tuning_pb2
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alto_cli.view.story import ENDED_TASKS, Story, best_loss
from alto_cli.view.trial_words import config_values, reason_text, state_word, task_state_word, varying_fields
from alto_cli.view.wording import (
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    plural,
    printable,
)

STATE_STYLES = {
    tuning_pb2.TRIAL_STATE_RUNNING: "bold cyan",
    tuning_pb2.TRIAL_STATE_PAUSED: "yellow",
    tuning_pb2.TRIAL_STATE_SUCCEEDED: "green",
    tuning_pb2.TRIAL_STATE_STOPPED: "dim",
    tuning_pb2.TRIAL_STATE_FAILED: "red",
    tuning_pb2.TRIAL_STATE_CANCELLED: "dim",
}
TASK_STYLES = {
    tuning_pb2.TASK_STATE_RUNNING: "bold cyan",
    tuning_pb2.TASK_STATE_SUCCEEDED: "bold green",
    tuning_pb2.TASK_STATE_FAILED: "bold red",
    tuning_pb2.TASK_STATE_CANCELLED: "yellow",
}
# Lines around the table: title, header, counts, bar, notice, and a margin so that the terminal never scrolls.
LINES_AROUND = 8
MOST_FIELD_COLUMNS = 3
GAP = 2
NARROWEST_NOTE = 12
WIDEST_BAR = 30
NARROWEST_BAR = 8
# When not all trials fit, these go first.
SHOWN_FIRST = (
    tuning_pb2.TRIAL_STATE_RUNNING,
    tuning_pb2.TRIAL_STATE_PAUSED,
    tuning_pb2.TRIAL_STATE_SUCCEEDED,
    tuning_pb2.TRIAL_STATE_FAILED,
    tuning_pb2.TRIAL_STATE_STOPPED,
)


class LiveTable:
    """A renderable that always shows the story as it is now; `notice` is a sentence below it.

    Remaining time is counted down between reports by `clock` (seconds). Whoever changes the story holds `lock`: the
    terminal is drawn by another thread, and a signal handler may interrupt its holder.
    """

    def __init__(self, story: Story, clock: Callable[[], float] = time.monotonic) -> None:
        self._story = story
        self._clock = clock
        self._reported_at = self._clock()
        self._began_at = self._clock()
        self.notice = ""
        self.lock = threading.RLock()

    def reported(self) -> None:
        """Note that the story has a new remaining time."""
        self._reported_at = self._clock()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the story to the size of the terminal."""
        with self.lock:
            if not self._story.task.task_id:
                yield Text(printable(self.notice or "connecting ..."), style="dim")
                return
            parts: list[RenderableType] = [self._title()]
            if trials := list(self._story.trials.values()):
                parts.append(self._table(trials, max(3, console.height - LINES_AROUND), console.width))
                parts.append(self._counts(trials))
            parts.append(self._bar(console.width))
            if self.notice:
                parts.append(Text(printable(self.notice), style="yellow"))
        yield from parts

    def _title(self) -> RenderableType:
        task = self._story.task
        title = Text()
        title.append(printable(task.spec.display_name or "task"), style="bold")
        title.append(f"  {task.task_id}  ", style="dim")
        title.append(task_state_word(task), style=TASK_STYLES.get(task.state, ""))
        if task.state == tuning_pb2.TASK_STATE_QUEUED and task.queue.explanation:
            title.append(f": {printable(task.queue.explanation)}")
        title.append(f"  {printable(task.spec.base_model)}", style="dim")
        execution = self._story.execution
        if execution.device:
            title.append(f" on {execution.node_id} ({execution.device}, {execution.kernel_backend})", style="dim")
        title.no_wrap, title.overflow = True, "ellipsis"
        return title

    def _table(self, trials: Sequence[tuning_pb2.Trial], most: int, width: int) -> RenderableType:
        """Lay the columns out here: numbers are never cut, what is left is for the note, then columns are dropped."""
        shown = _that_fit(trials, most)
        fields = varying_fields(trials)[:MOST_FIELD_COLUMNS]
        while True:
            titles = ["trial", *fields, "state", "step", "train loss", "val loss", ""]
            rows = [self._row(trial, fields) for trial in shown]
            widths = [max(len(title), *(len(row[at]) for row in rows)) for at, title in enumerate(titles[:-1])]
            note_width = width - sum(widths) - GAP * len(widths)
            if note_width >= 0 or not fields:
                break
            fields = fields[:-1]
        if note_width < NARROWEST_NOTE:
            titles, rows = titles[:-1], [row[:-1] for row in rows]
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        for title, column_width in zip(titles, [*widths, note_width], strict=False):
            justify: Literal["left", "right"] = "left" if title in ("trial", "state", "") else "right"
            table.add_column(title, width=column_width, justify=justify, no_wrap=True, overflow="ellipsis")
        for row in rows:
            table.add_row(*row)
        return table

    def _row(self, trial: tuning_pb2.Trial, fields: Sequence[str]) -> list[Text]:
        values = config_values(trial.config)
        is_best = trial.trial_id == self._story.task.best_trial_id
        style = "dim" if trial.state == tuning_pb2.TRIAL_STATE_STOPPED and not is_best else ""
        validation = trial.validation_loss if trial.HasField("validation_loss") else None
        train = trial.train_loss_smoothed if trial.HasField("train_loss_smoothed") else None
        note = reason_text(trial)
        if is_best:
            note = f"best: {loss_text(best_loss(trial))} at step {trial.best_step}" + (f"; {note}" if note else "")
        return [
            Text(trial.trial_id, style="bold green" if is_best else style),
            *(Text(values.get(field, "-"), style=style) for field in fields),
            Text(state_word(trial), style=STATE_STYLES.get(trial.state, "dim")),
            Text(f"{trial.step}/{trial.total_steps}" if trial.total_steps else "-", style=style),
            Text(loss_text(train), style=style),
            Text(loss_text(validation), style="bold green" if is_best else style),
            Text(note, style="green" if is_best else style),
        ]

    def _counts(self, trials: Sequence[tuning_pb2.Trial]) -> RenderableType:
        words: dict[str, int] = {}
        for trial in trials:
            words[state_word(trial)] = words.get(state_word(trial), 0) + 1
        line = Text(f"{plural(len(trials), 'trial')}: ", style="dim")
        line.append(", ".join(f"{count} {word}" for word, count in words.items()), style="dim")
        task = self._story.task
        if task.HasField("base_validation_loss"):
            line.append(f"   base model {loss_text(task.base_validation_loss)}", style="dim")
        line.no_wrap, line.overflow = True, "ellipsis"
        return line

    def _bar(self, width: int) -> RenderableType:
        progress = self._story.progress
        done = 1.0 if self._story.task.state == tuning_pb2.TASK_STATE_SUCCEEDED else progress.fraction_done
        parts = [f"{done * 100:3.0f} %", f"{duration_text(self._clock() - self._began_at)} passed"]
        if self._story.task.state not in ENDED_TASKS:
            if progress.HasField("time_remaining"):
                since = self._clock() - self._reported_at
                left = progress.time_remaining.ToTimedelta().total_seconds() - since
                parts.append(f"{duration_text(left)} left" if left > 0 else "nearly done")
            if progress.tokens_per_second:
                parts.append(f"{count_text(progress.tokens_per_second)} tokens/s")
        if progress.peak_memory_bytes:
            parts.append(f"{bytes_text(progress.peak_memory_bytes)} at most")
        while len(parts) > 1 and len("  ".join(parts)) + 1 + NARROWEST_BAR > width:
            parts.pop()
        text = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        bar_width = max(NARROWEST_BAR, min(WIDEST_BAR, width - len(text) - 1))
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=1.0, completed=done, width=bar_width), text)
        return row


def _that_fit(trials: Sequence[tuning_pb2.Trial], most: int) -> list[tuning_pb2.Trial]:
    """Return at most `most` trials in their own order: the running ones, then the best of the others."""
    if len(trials) <= most:
        return list(trials)

    def order(trial: tuning_pb2.Trial) -> tuple[int, float]:
        known = trial.state in SHOWN_FIRST
        return (SHOWN_FIRST.index(trial.state) if known else len(SHOWN_FIRST), best_loss(trial))

    chosen = {trial.trial_id for trial in sorted(trials, key=order)[:most]}
    return [trial for trial in trials if trial.trial_id in chosen]
