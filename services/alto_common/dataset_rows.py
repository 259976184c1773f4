"""Reading dataset files: JSONL or Parquet rows as typed values, and what is wrong with a file, line by line.

JSONL is one JSON object a line in UTF-8; Parquet is one row an example. Every row of a file has the same one of the
formats of `alto_common.dataset_formats`. Pure Python: needs no torch, and pyarrow only to read Parquet. Files come from
tenants, so everything about them is bounded by `DatasetLimits` before it is held in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alto_common.dataset_formats import (
    FORMATS_IN_WORDS,
    SHOWN_CHARACTERS,
    AlpacaRow,
    Message,
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    Row,
    RowFormat,
    TextRow,
    check_chat_template,
    check_objective,
    detect,
    row_format,
    shown,
    typed,
)
from alto_common.violations import Violation

__all__ = [
    "AlpacaRow",
    "DatasetError",
    "DatasetFacts",
    "DatasetLimits",
    "Message",
    "MessagesRow",
    "PreferenceRow",
    "PromptCompletionRow",
    "Row",
    "RowFormat",
    "TextRow",
    "check_chat_template",
    "check_objective",
    "read_rows",
    "row_format",
    "scan",
]


# Of a Parquet file: rows of a batch, bytes of it that are made Python values at once, and what a value takes at least.
_ROWS_AT_ONCE = 4096
_BYTES_AT_ONCE = 64 << 20
_VALUE_BYTES = 8
_READABLE_COLUMN = (
    "write its dates and times in UTC and within the years 1 to 9999, its text in UTF-8 and its fields once each, or "
    "leave the column out"
)


@dataclass(frozen=True)
class DatasetLimits:
    """What a file may cost. `max_bytes` also bounds what a Parquet file unpacks to; `max_row_characters` counts a row
    as it is written; `max_json_depth` counts nested brackets; at most `max_violations` are reported.
    """

    max_bytes: int = 1 << 30
    max_rows: int = 1_000_000
    max_row_characters: int = 400_000
    max_json_depth: int = 16
    max_violations: int = 20


@dataclass(frozen=True)
class DatasetFacts:
    """What a sound dataset file is: `duplicates` counts rows that repeat an earlier one."""

    rows: int
    format: RowFormat
    bytes: int
    sha256: str
    duplicates: int
    longest_row_characters: int


class DatasetError(ValueError):
    """A dataset that cannot be used; `violations` name the lines, at most `DatasetLimits.max_violations` of them.

    `file_name` is what its owner calls the file, where that is known.
    """

    def __init__(self, violations: Sequence[Violation], file_name: str = "") -> None:
        """Keep the violations, in the order of the file."""
        self.violations = tuple(violations)
        self.file_name = file_name
        sentences = "; ".join(str(violation) for violation in violations)
        super().__init__(f"{file_name}: {sentences}" if file_name else sentences)


def read_rows(path: Path, limits: DatasetLimits | None = None) -> Iterator[tuple[int, Row]]:
    """Yield each row of `path` with its line number (1-based; blank lines are skipped; row number in Parquet).

    Raises `DatasetError` at the first row that is not sound.
    """
    reader = _Reader(path, limits or DatasetLimits())
    for line, outcome, _ in reader.outcomes():
        if isinstance(outcome, list):
            raise DatasetError(outcome)
        yield line, outcome


def scan(path: Path, limits: DatasetLimits | None = None, file_name: str = "") -> DatasetFacts:
    """Read all of `path` and return its facts; raise `DatasetError` with the first violations otherwise.

    `file_name` is what its owner calls the file, where that is not the name it lies under.
    """
    limits = limits or DatasetLimits()
    reader = _Reader(path, limits, file_name)
    violations: list[Violation] = []
    digests: set[bytes] = set()
    rows = longest = 0
    for _, outcome, characters in reader.outcomes():
        if isinstance(outcome, list):
            violations.extend(outcome)
            if len(violations) >= limits.max_violations:
                break
            continue
        rows += 1
        longest = max(longest, characters)
        digests.add(hashlib.blake2b(repr(outcome).encode(), digest_size=16).digest())
    if violations:
        raise DatasetError(violations[: limits.max_violations], reader.file_name)
    if reader.format is None:
        empty = Violation("dataset", "0 rows", f"it holds no rows: give at least one {FORMATS_IN_WORDS}")
        raise DatasetError([empty], reader.file_name)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return DatasetFacts(rows, reader.format, path.stat().st_size, sha256, rows - len(digests), longest)


class _Reader:
    """One pass over one file. `format` is that of the first sound row; every later row must have it too."""

    def __init__(self, path: Path, limits: DatasetLimits, file_name: str = "") -> None:
        self.path = path
        self.limits = limits
        self.file_name = file_name or path.name
        self.format: RowFormat | None = None
        self.format_line = 0

    def outcomes(self) -> Iterator[tuple[int, Row | list[Violation], int]]:
        """Yield (line number, row or what is wrong with it, characters as written)."""
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as stream:
                is_parquet = stream.read(4) == b"PAR1"
        except OSError as error:
            yield 0, [Violation("dataset", str(self.path), f"give a readable file ({error.strerror})")], 0
            return
        if size > self.limits.max_bytes:
            cure = f"give a file of at most {self.limits.max_bytes:,} bytes, or split it"
            yield 0, [Violation("dataset", f"{size:,} bytes", cure)], 0
            return
        values = self._parquet_values() if is_parquet else self._json_values()
        for index, (line, value, characters) in enumerate(values):
            if index == self.limits.max_rows:
                cure = f"give at most {self.limits.max_rows:,} rows, or split the file"
                yield line, [Violation(f"line[{line}]", f"row {index + 1:,}", cure)], characters
                return
            yield line, value if isinstance(value, list) else self._row(line, value), characters

    def _row(self, line: int, value: dict[str, Any]) -> Row | list[Violation]:
        where = f"line[{line}]"
        found = detect(where, value)
        if isinstance(found, list):
            return found
        if self.format is None:
            self.format, self.format_line = found, line
        if found is not self.format:
            cure = f"line {self.format_line} has the {self.format} format: give every row of a file the same one"
            return [Violation(where, str(found), cure)]
        return typed(where, found, value)

    def _json_values(self) -> Iterator[tuple[int, dict[str, Any] | list[Violation], int]]:
        with self.path.open("rb") as stream:
            # A character takes at most 4 bytes of UTF-8: a longer line is too long before it is decoded.
            most_bytes = 4 * self.limits.max_row_characters + 2
            line = 0
            while raw := stream.readline(most_bytes + 1):
                line += 1
                if line == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                cut = len(raw) > most_bytes
                while cut and not raw.endswith(b"\n") and (more := stream.readline(1 << 20)):
                    raw = more
                if cut:
                    yield line, [self._too_long(line, f"over {most_bytes:,} bytes")], most_bytes
                elif raw.strip():
                    yield line, *self._parse(line, raw)

    def _too_long(self, line: int, size: str) -> Violation:
        cure = f"give rows of at most {self.limits.max_row_characters:,} characters: shorten or split this one"
        return Violation(f"line[{line}]", size, cure)

    def _parse(self, line: int, raw: bytes) -> tuple[dict[str, Any] | list[Violation], int]:
        """Return the object that one line holds, or why it holds none, with the line's length in characters."""
        where = f"line[{line}]"
        try:
            text = raw.decode().rstrip()
        except UnicodeDecodeError as error:
            cure = f"save the file as UTF-8 (byte {error.start + 1} of this line is not)"
            return [Violation(where, shown(raw[max(0, error.start - 8) : error.start + 8]), cure)], len(raw)
        if len(text) > self.limits.max_row_characters:
            return [self._too_long(line, f"{len(text):,} characters")], len(text)
        if _depth(text, self.limits.max_json_depth) > self.limits.max_json_depth:
            cure = f"nest brackets at most {self.limits.max_json_depth} deep"
            return [Violation(where, shown(text), cure)], len(text)
        try:
            value = json.loads(text, object_pairs_hook=_object_without_repeats)
        except ValueError as error:
            cure = f"write one whole JSON object a line ({str(error).split(': line 1')[0]})"
            return [Violation(where, shown(text), cure)], len(text)
        if not isinstance(value, dict):
            cure = "write one JSON object a line, neither an array around the rows nor a bare value"
            return [Violation(where, shown(text), cure)], len(text)
        return _present(value), len(text)

    def _unpacks_too_far(self) -> Violation:
        cure = f"the rows unpack to over {self.limits.max_bytes:,} bytes: split the file"
        return Violation("dataset", self.file_name, cure)

    def _parquet_values(self) -> Iterator[tuple[int, dict[str, Any] | list[Violation], int]]:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        line = unpacked = 0
        try:
            metadata = pyarrow.parquet.read_metadata(self.path)
            if _least_unpacked_bytes(metadata) > self.limits.max_bytes:
                yield 1, [self._unpacks_too_far()], 0
                return
            # Text stays what it is in the file, one value for all rows that repeat it: weighed before it is copied.
            texts = _text_columns(metadata.schema)
            with pyarrow.parquet.ParquetFile(self.path, metadata=metadata, read_dictionary=texts) as file:
                names = file.schema_arrow.names
                if len(set(names)) < len(names):
                    yield 1, [Violation("dataset", shown(names), "give each column a name of its own")], 0
                    return
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                    batch_bytes = sum(map(_unpacked_bytes, batch.columns))
                    unpacked += batch_bytes
                    if unpacked > self.limits.max_bytes:
                        yield line + 1, [self._unpacks_too_far()], 0
                        return
                    for value in _rows_of(batch, batch_bytes, 4 * self.limits.max_row_characters):
                        line += 1
                        if isinstance(value, int):
                            yield line, [self._too_long(line, f"{value:,} bytes")], value
                            continue
                        present = _present(value)
                        characters = len(str(present))
                        if characters > self.limits.max_row_characters:
                            yield line, [self._too_long(line, f"{characters:,} characters")], characters
                        else:
                            yield line, present, characters
        except _UnreadableColumnError as error:
            kind = metadata.schema.to_arrow_schema().field(error.name).type
            yield line + 1, [Violation(f"column[{shown(error.name)}]", shown(str(kind)), _READABLE_COLUMN)], 0
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            cure = f"write the Parquet file again ({str(error)[:SHOWN_CHARACTERS]})"
            yield line + 1, [Violation(f"line[{line + 1}]", self.file_name, cure)], 0


def _least_unpacked_bytes(metadata: Any) -> int:
    """Return what a Parquet file takes at least once it is decompressed, and its lists unrolled."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    values = sum(group.column(column).num_values for group in groups for column in range(group.num_columns))
    return int(max(_VALUE_BYTES * values, sum(group.total_byte_size for group in groups)))


def _text_columns(schema: Any) -> list[str]:
    """Return the paths of a Parquet file's columns of text or bytes."""
    columns = (schema.column(index) for index in range(len(schema)))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    ]


class _UnreadableColumnError(Exception):
    """The column called `name` of a Parquet file holds values that Python has not."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


def _values_of(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch. Raises `_UnreadableColumnError`."""
    import pyarrow

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise _UnreadableColumnError(name) from error
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _rows_of(batch: Any, batch_bytes: int, most_bytes: int) -> Iterator[dict[str, Any] | int]:
    """Yield the rows of a batch; of one that takes more than `most_bytes` its bytes alone."""
    if batch_bytes <= _BYTES_AT_ONCE:
        yield from _values_of(batch)
        return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        size = sum(map(_unpacked_bytes, row.columns))
        yield size if size > most_bytes else _values_of(row)[0]


def _unpacked_bytes(array: Any) -> int:
    """Return the bytes that an Arrow array's values take as values of their own."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return int(pyarrow.compute.sum(lengths).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return sum(map(_unpacked_bytes, array.flatten()))
    if pyarrow.types.is_map(kind):
        entries = pyarrow.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        return _unpacked_bytes(pyarrow.ListArray.from_arrays(array.offsets, entries))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return int(array.offsets.nbytes) + _unpacked_bytes(array.flatten())
    return int(array.nbytes)


def _present(value: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the fields that it leaves empty: null in JSON, a column without a value in Parquet."""
    return {name: item for name, item in value.items() if item is not None}


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a field is given twice")
    return value


_BRACKETS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def _depth(text: str, enough: int) -> int:
    """Return how deep brackets nest outside strings (a quick upper bound when that is no more than `enough`)."""
    bound = text.count("[") + text.count("{")
    if bound <= enough:
        return bound
    depth = deepest = 0
    in_string = False
    for match in _BRACKETS.finditer(text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif not in_string and token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not in_string and token in "]}":
            depth -= 1
    return deepest
