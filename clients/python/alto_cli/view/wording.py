"""Numbers, times and states in words. Pure functions, imported by everything that is shown."""

from __future__ import annotations

import math
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Fields of a TuningTaskSpec, and what a task file calls them.
_IN_TASK_FILE = (
    (re.compile(r"\bspec\.search_space\.explicit\.configs\b"), "search.list"),
    (
        re.compile(r"\bspec\.search_space\.(grid|random)\.dimensions\[([a-z_.]+)\](?:\.values\.values(?=\[))?"),
        r"search.\1.\2",
    ),
    (re.compile(r"\bspec\.search_space\b"), "search"),
    (re.compile(r"\bspec\.(dataset|validation)(_dataset)?_id\b"), r"\1"),
    (re.compile(r"\bspec\.display_name\b"), "name"),
    (
        re.compile(r"\bspec\.(?=(base_model|validation_fraction|objective|early_exit|evaluation|resources|labels)\b)"),
        "",
    ),
)


def in_task_file(text: str) -> str:
    """Return text with the fields of a specification under the keys that its task file has."""
    for field, key in _IN_TASK_FILE:
        text = field.sub(key, text)
    return text


def printable(text: str) -> str:
    """Return text without control characters: what a server or a file says must not drive the terminal."""
    return _CONTROL.sub(" ", text)


def loss_text(loss: float | None) -> str:
    """Return a loss with four places, a dash when there is none yet."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" if math.isfinite(loss) else str(loss)


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def bytes_text(count: int) -> str:
    """Return a size in the unit that gives three digits or fewer before the point."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: float) -> str:
    """Return a large count shortly: 950, 12.3k, 4.5M, 1.2B."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if count >= least:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def percent_text(fraction: float) -> str:
    """Return a share in per cent; a small one with a place more."""
    return f"{fraction * 100:.0f} %" if fraction >= 0.1 or fraction == 0 else f"{fraction * 100:.1f} %"


def number_text(value: float) -> str:
    """Return a hyperparameter as people write it: 1e-4, 0.05, 16."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 1e-2 <= abs(value) < 1e6:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 trial, 2 trials."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
