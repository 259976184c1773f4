"""A task's rows on this host: fetched from the artifact store, verified, cached by content, split when asked to.

A file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from alto.v1 import error_pb2, placement_pb2
from alto_common.artifacts import ArtifactStore
from alto_common.errors import DomainError

from alto_training import outages

PARQUET_MAGIC = b"PAR1"


def fetch(store: ArtifactStore, artifact: placement_pb2.Artifact, cache: Path) -> Path:
    """Return a local file with the artifact's content.

    Raises CONTENT_MISMATCH when it is not what was announced, FileNotFoundError, StoreUnreachableError.
    """
    target = cache / artifact.sha256
    if target.exists() and _digest(target) == artifact.sha256:
        # What is in use is not swept away.
        target.touch()
        return target
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with _new_file(target) as file:
        for chunk in outages.read(store, artifact.path):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != artifact.sha256:
            raise DomainError(
                error_pb2.ERROR_REASON_CONTENT_MISMATCH,
                f"the dataset {artifact.path} does not have the SHA-256 it was uploaded with: upload it again",
            )
    return target


def split(dataset: Path, validation_fraction: float, cache: Path) -> tuple[Path, Path]:
    """Return a training and a validation file made of one dataset, the same on every host and in every attempt.

    Rows go to validation by the hash of their content, so that repeated rows stay on one side; at least one row is on
    each side. A row keeps its line. The files are made anew each time, which takes seconds: none that was damaged
    since is trained on. Raises EXECUTION_FAILED when there are fewer than two rows.
    """
    rows = list(_rows(dataset))
    full = [index for index, row in enumerate(rows) if row]
    if len(full) < 2:
        raise DomainError(
            error_pb2.ERROR_REASON_EXECUTION_FAILED,
            f"the dataset has {len(full)} row: give at least two, or a validation dataset",
        )
    places = _validation_rows([hashlib.sha256(rows[index]).digest() for index in full], validation_fraction)
    chosen = {full[place] for place in places}
    # A line of the other side is left blank: what is said of a line holds in the dataset itself.
    name = f"{dataset.name}.{validation_fraction:.6f}"
    train, validation = cache / f"{name}.train", cache / f"{name}.validation"
    _write(train, (b"" if index in chosen else row for index, row in enumerate(rows)))
    _write(validation, (row if index in chosen else b"" for index, row in enumerate(rows)))
    return train, validation


def _validation_rows(digests: list[bytes], fraction: float) -> set[int]:
    order = sorted(range(len(digests)), key=lambda index: (digests[index], index))
    wanted = min(len(order) - 1, max(1, round(len(order) * fraction)))
    # Places between different rows, where the cut leaves copies of one row together.
    cuts = [cut for cut in range(1, len(order)) if digests[order[cut - 1]] != digests[order[cut]]]
    cut = min(cuts, key=lambda place: (abs(place - wanted), place)) if cuts else wanted
    return set(order[:cut])


def _rows(dataset: Path) -> Iterator[bytes]:
    """Yield each row, line by line; blank lines too, empty."""
    with dataset.open("rb") as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    if is_parquet:
        for value in _parquet_rows(dataset):
            # A column that a row leaves empty is a field it does not have. What JSON has no word for, such as a time,
            # is in no field that is trained on.
            row = {name: field for name, field in value.items() if field is not None}
            yield json.dumps(row, ensure_ascii=False, default=str).encode()
        return
    with dataset.open("rb") as file:
        for number, line in enumerate(file):
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).strip()


def _parquet_rows(dataset: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(dataset) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def _write(path: Path, rows: Iterable[bytes]) -> None:
    with _new_file(path) as file:
        file.writelines(row + b"\n" for row in rows)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to fill, flush it to disk, and rename it to `path`; on an exception nothing is left of it.

    Raises OSError with the file's name.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
