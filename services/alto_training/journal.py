"""The journal of an assignment: its events in a file, one after the other, each behind its length. The node's outbox.

The worker appends, the node reads. A record that is cut short at the end (a process died in the middle) is as if it had
never been written; what was synced survives a power cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from alto.v1 import event_pb2
from google.protobuf.message import DecodeError

JOURNAL_FILE = "journal"
ACKNOWLEDGED_FILE = "acknowledged"
MAX_VARINT_BYTES = 10


@dataclass(frozen=True)
class Record:
    """One event of a journal: its number from 1, and where its record ends in the file."""

    sequence: int
    event: event_pb2.TaskEvent
    end_offset: int


class JournalWriter:
    """Appends events to a journal. An incomplete record at the end of the file is cut off first."""

    def __init__(self, path: Path) -> None:
        whole = max((record.end_offset for record in read_journal(path)), default=0)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def append(self, event: event_pb2.TaskEvent, durable: bool) -> None:
        """Append an event; a durable one is on the disk, with all before it, when this returns."""
        payload = event.SerializeToString()
        self._file.write(_varint(len(payload)) + payload)
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path, offset: int = 0, after_sequence: int = 0) -> Iterator[Record]:
    """Yield the whole records from `offset` on, where record `after_sequence` ended; none if there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    sequence = after_sequence
    with file:
        file.seek(offset)
        while True:
            head = file.read(MAX_VARINT_BYTES)
            parsed = _parse_varint(head)
            # A length of 0 is no event: the zeros that a file system may leave at the end after a power cut.
            if parsed is None or parsed[0] == 0:
                return
            length, width = parsed
            file.seek(offset + width)
            payload = file.read(length)
            if len(payload) < length:
                return
            try:
                event = event_pb2.TaskEvent.FromString(payload)
            except DecodeError:
                return
            offset += width + length
            sequence += 1
            yield Record(sequence, event, offset)
            file.seek(offset)


def read_acknowledged(folder: Path) -> int:
    """Return how many events of the journal in `folder` admission is known to have."""
    try:
        return int((folder / ACKNOWLEDGED_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def write_acknowledged(folder: Path, sequence: int) -> None:
    """Note how many events admission has. Losing the note only means that events are sent again."""
    aside = folder / f"{ACKNOWLEDGED_FILE}.part"
    aside.write_text(str(sequence))
    os.replace(aside, folder / ACKNOWLEDGED_FILE)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse_varint(data: bytes) -> tuple[int, int] | None:
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return None
