"""What runs in a worker process: facts about base models, token counts, the check of an uploaded file.

Failures come back as values: see `worker`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alto_common.base_models import BaseModelError, ModelFacts, ResolvedModel, inspect, list_models, resolve
from alto_common.dataset_rows import DatasetError, DatasetFacts, DatasetLimits, read_rows, scan
from alto_common.violations import Violation

SAMPLED_ROWS = 2000
SAMPLING_S = 3.0


@dataclass(frozen=True)
class ModelSources:
    """Where base models may come from."""

    models_root: Path
    allowed_folders: tuple[Path, ...] = ()
    allow_hub: bool = False


@dataclass(frozen=True)
class UnusableModel:
    """Why a base model cannot be used."""

    problem: str
    cure: str


@dataclass(frozen=True)
class DamagedFile:
    """What is wrong with an uploaded file. `too_large` says that it is over a limit, `sha256` what its bytes have."""

    violations: tuple[Violation, ...] = ()
    too_large: bool = False
    sha256: str = ""


def model_facts(name: str, sources: ModelSources) -> tuple[ResolvedModel, ModelFacts] | UnusableModel:
    """Return where a base model is and what it is made of."""
    try:
        resolved = resolve(name, sources.models_root, sources.allowed_folders, sources.allow_hub)
        return resolved, inspect(resolved.location)
    except BaseModelError as error:
        # Under the name that it was asked for by: found out about a folder, it is that folder's.
        return UnusableModel(str(BaseModelError(name, error.problem, error.cure)), error.cure)


def all_model_facts(sources: ModelSources) -> list[tuple[str, ModelFacts]]:
    """Return the facts of every model below the models root; one that cannot be used is left out."""
    found = []
    for name in list_models(sources.models_root):
        facts = model_facts(name, sources)
        if not isinstance(facts, UnusableModel):
            found.append((name, facts[1]))
    return found


def check_file(path: Path, sha256: str, limits: DatasetLimits, file_name: str) -> DatasetFacts | DamagedFile:
    """Return the facts of an uploaded file whose bytes must have `sha256`, or what is wrong with it.

    It is told of under `file_name`, as whoever uploaded it knows it.
    """
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        return DamagedFile(sha256=actual)
    rows = _count_rows(path)
    if rows is not None and rows > limits.max_rows:
        cure = f"give at most {limits.max_rows:,} rows, or split the file"
        return DamagedFile((Violation("dataset", f"{rows:,} rows", cure),), too_large=True)
    try:
        return scan(path, limits, file_name)
    except DatasetError as error:
        return DamagedFile(error.violations)


def token_lengths(path: Path, tokenizer_file: Path) -> list[int]:
    """Return the lengths, in tokens, of rows spread over a dataset: as many as a few seconds allow, at least one.

    The text of a row is what its fields hold, without a chat template's few tokens: good enough to predict durations.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    deadline = time.monotonic() + SAMPLING_S
    lengths: list[int] = []
    for index, (_, row) in enumerate(read_rows(path)):
        if index >= SAMPLED_ROWS or (lengths and time.monotonic() > deadline):
            break
        text = "\n".join(_strings(asdict(row)))
        lengths.append(len(tokenizer.encode(text).ids) + 1)
    return lengths


def _count_rows(path: Path) -> int | None:
    """Return the rows or lines of a file, None for a Parquet file that cannot be read (scanning it says why)."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))
    import pyarrow
    import pyarrow.parquet

    try:
        rows: int = pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError):
        return None
    return rows


def _strings(value: Any) -> Sequence[str]:
    """Return every text inside a row."""
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.values() for text in _strings(item)]
        case list() | tuple():
            return [text for item in value for text in _strings(item)]
        case _:
            return []
