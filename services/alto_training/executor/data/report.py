"""What a dataset looks like to a model: token counts, what a length cuts off, and rows with their loss mask marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from alto_common.dataset_rows import DatasetLimits, scan
from alto_common.tuning import Objective

from alto_training.executor.data.dataset import Example, TokenisedDataset, open_dataset
from alto_training.executor.data.segments import Tokenizer

SHOWN_ROWS = 3
TARGET_MARKS = ("⟦", "⟧")
BAR_WIDTH = 40


@dataclass(frozen=True)
class RenderedExample:
    """A row as the model reads it: pieces of text, true where the loss is taken. `part` names an answer of a pair."""

    line: int
    part: str
    tokens: int
    pieces: tuple[tuple[str, bool], ...]

    @property
    def marked_text(self) -> str:
        """The text with ⟦ and ⟧ around what the loss is taken over."""
        opening, closing = TARGET_MARKS
        return "".join(f"{opening}{text}{closing}" if is_target else text for text, is_target in self.pieces)


@dataclass(frozen=True)
class DatasetReport:
    """All of it. `histogram` holds (from, below, rows) by tokens a row; `percentiles` tokens a row at 50, 90, 99, 100;
    `truncated_share` the share of rows that lose tokens at `max_length`; `target_share` tokens that the loss counts.
    """

    rows: int
    format: str
    bytes: int
    sha256: str
    duplicates: int
    tokens: int
    percentiles: dict[int, int]
    histogram: tuple[tuple[int, int, int], ...]
    max_length: int
    truncated_share: float
    target_share: float
    examples: tuple[RenderedExample, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report in types that JSON knows."""
        return asdict(self)

    def as_text(self) -> str:
        """Return the report as a person reads it in a terminal."""
        at = self.percentiles
        lines = [
            f"{self.rows:,} rows of {self.format}, {self.bytes:,} bytes, duplicates: {self.duplicates:,}",
            f"{self.tokens:,} tokens; a row has {at[50]:,} (median), {at[90]:,} (90 %), {at[99]:,} (99 %), {at[100]:,} "
            "(longest)",
            f"cut to {self.max_length:,} tokens: {self.truncated_share:.1%} of the rows lose some; the loss counts "
            f"{self.target_share:.1%} of the tokens that stay",
            "",
        ]
        most = max(count for _, _, count in self.histogram)
        for low, high, count in self.histogram:
            bar = "█" * round(BAR_WIDTH * count / most)
            lines.append(f"{low:>7,} to {high - 1:>7,} tokens {count:>8,} {bar}")
        for example in self.examples:
            opening, closing = TARGET_MARKS
            title = f"line {example.line}{', ' + example.part if example.part else ''}: {example.tokens} tokens"
            lines += ["", f"{title}, the loss is taken over {opening}this{closing}", example.marked_text]
        return "\n".join(lines)


def describe(
    path: Path,
    tokenizer: Tokenizer,
    objective: Objective,
    cache_dir: Path,
    max_length: int = 1024,
    limits: DatasetLimits | None = None,
) -> DatasetReport:
    """Check and tokenise the file and return its report; raises what `scan` and `open_dataset` raise."""
    facts = scan(path, limits)
    data = open_dataset(path, tokenizer, objective, cache_dir, limits=limits)
    lengths = data.lengths()
    percentiles = {at: int(np.percentile(lengths, at, method="higher")) for at in (50, 90, 99, 100)}
    chosen = sorted({0, len(data) // 2, len(data) - 1})[:SHOWN_ROWS]
    kept = targets = 0
    for index in range(len(data)):
        for _, sequence in _parts(data, index, max_length):
            kept += len(sequence.input_ids)
            targets += int(sequence.target_mask.sum())
    return DatasetReport(
        rows=facts.rows,
        format=str(facts.format),
        bytes=facts.bytes,
        sha256=facts.sha256,
        duplicates=facts.duplicates,
        tokens=int(lengths.sum()),
        percentiles=percentiles,
        histogram=_histogram(lengths.tolist()),
        max_length=max_length,
        truncated_share=data.truncated_share(max_length),
        target_share=targets / kept,
        examples=tuple(
            RenderedExample(data.line(index), part, len(sequence.input_ids), _pieces(tokenizer, sequence))
            for index in chosen
            for part, sequence in _parts(data, index, max_length)
        ),
    )


def _parts(data: TokenisedDataset, index: int, max_length: int) -> list[tuple[str, Example]]:
    if data.has_preferences:
        return list(zip(("chosen", "rejected"), data.preference(index, max_length), strict=True))
    return [("", data.example(index, max_length))]


def _pieces(tokenizer: Tokenizer, sequence: Example) -> tuple[tuple[str, bool], ...]:
    """Return the text of each run of tokens that are, or are not, targets."""
    mask = sequence.target_mask
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    return tuple(
        (tokenizer.decode(sequence.input_ids[begin:end].tolist()), bool(mask[begin]))
        for begin, end in itertools.pairwise(edges)
    )


def _histogram(lengths: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Count rows in classes that double: 1 to 15 tokens, 16 to 31, 32 to 63, ..."""

    def classes() -> Iterator[tuple[int, int]]:
        low, high = 1, 16
        while low <= max(lengths):
            yield low, high
            low, high = high, 2 * high

    counted = [(low, high, sum(low <= length < high for length in lengths)) for low, high in classes()]
    while len(counted) > 1 and counted[0][2] == 0:
        counted.pop(0)
    return tuple(counted)
