"""Token arrays on disk, memory-mapped: written once, read by all trials of all tasks over the same dataset.

A folder named by its fingerprint holds tokens.bin (int32), targets.bin (bool), offsets.bin (int64, one more than there
are sequences), lines.bin (int64, the line of each row) and layout.json, written last, with a sha256 over the arrays. It
appears complete (written aside, flushed to disk, renamed) or not at all, and what was damaged since is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alto_training.executor.data.segments import Encoded

LAYOUT_FILE = "layout.json"
ARRAY_FILES = ("tokens.bin", "targets.bin", "offsets.bin", "lines.bin")


@dataclass(frozen=True)
class Layout:
    """How to read the arrays: `sequences_per_row` is 2 for preferences, `prefix` the tokens that precede any prompt.

    `sha256` is that of all arrays.
    """

    rows: int
    tokens: int
    sequences_per_row: int
    prefix: int
    sha256: str


@dataclass(frozen=True)
class TokenArrays:
    """The arrays of one dataset; sequence s is tokens[offsets[s]:offsets[s + 1]]."""

    layout: Layout
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]


def open_arrays(folder: Path) -> TokenArrays | None:
    """Map the arrays in `folder`; None if they are not there or not what was written."""
    try:
        layout = Layout(**json.loads((folder / LAYOUT_FILE).read_text()))
        if _sha256(folder) != layout.sha256:
            return None
        sequences = layout.rows * layout.sequences_per_row
        with contextlib.suppress(OSError):
            os.utime(folder)  # whoever clears the cache sees that it is used, also where reading leaves no trace
        return TokenArrays(
            layout,
            _mapped(folder / "tokens.bin", np.int32, layout.tokens),
            _mapped(folder / "targets.bin", np.bool_, layout.tokens),
            _mapped(folder / "offsets.bin", np.int64, sequences + 1),
            _mapped(folder / "lines.bin", np.int64, layout.rows),
        )
    except (OSError, ValueError, TypeError):
        return None


def write_arrays(folder: Path, rows: Iterable[tuple[int, tuple[Encoded, ...]]], prefix: int) -> TokenArrays:
    """Write (line, sequences of the row) to `folder`, one row at a time, and map the result.

    If another process has made the folder meanwhile, its result is taken: equal names hold equal content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        offsets, lines = [0], []
        per_row = 1
        with (scratch / "tokens.bin").open("wb") as tokens, (scratch / "targets.bin").open("wb") as targets:
            for line, sequences in rows:
                lines.append(line)
                per_row = len(sequences)
                for sequence in sequences:
                    tokens.write(sequence.input_ids.tobytes())
                    targets.write(sequence.target_mask.tobytes())
                    offsets.append(offsets[-1] + len(sequence.input_ids))
        (scratch / "offsets.bin").write_bytes(np.array(offsets, np.int64).tobytes())
        (scratch / "lines.bin").write_bytes(np.array(lines, np.int64).tobytes())
        layout = Layout(len(lines), offsets[-1], per_row, prefix, _sha256(scratch))
        (scratch / LAYOUT_FILE).write_text(json.dumps(asdict(layout)))
        for file in scratch.iterdir():
            _flush(file)
        if folder.exists() and open_arrays(folder) is None:
            shutil.rmtree(folder)
        # It fails when another process was first; for any other reason, there is nothing to open below.
        with contextlib.suppress(OSError):
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    arrays = open_arrays(folder)
    if arrays is None:
        raise OSError(errno.EIO, "the token cache could not be written: check its permissions and free space", folder)
    return arrays


def _mapped(path: Path, dtype: Any, count: int) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.memmap(path, dtype, mode="r")
    if len(array) != count:
        raise ValueError(f"{path} holds {len(array)} numbers, not {count}")
    return array


def _sha256(folder: Path) -> str:
    """Return a sha256 over the sha256 of each array."""
    whole = hashlib.sha256()
    for name in ARRAY_FILES:
        with (folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
