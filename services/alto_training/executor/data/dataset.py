"""A tokenised dataset: opened by path, shared by all trials, each of which cuts rows to its own length."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from alto_common.dataset_rows import DatasetError, DatasetLimits, PreferenceRow, check_objective, read_rows, row_format
from alto_common.tuning import Objective
from alto_common.violations import Violation

from alto_training.executor.data.cache import TokenArrays, open_arrays, write_arrays
from alto_training.executor.data.encoding import RowEncoder, tokenizer_sha256
from alto_training.executor.data.segments import Encoded, Tokenizer
from alto_training.executor.data.truncation import kept_indices, prompt_kept

# Part of every fingerprint: raised whenever the same row becomes other tokens or targets.
ENCODING_VERSION = 2
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Example:
    """One sequence: `input_ids` int32 [L]; `target_mask` bool [L], true where token t is a loss target, predicted from
    t - 1. Token 0 never is one, and at least one other is. The arrays are the caller's own.
    """

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class TokenisedDataset:
    """Random access to the rows of one file as tokens.

    `fingerprint` is a sha256 over the file's content, the tokenizer with its chat template and the objective: equal
    fingerprints mean equal examples.
    """

    def __init__(self, arrays: TokenArrays, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._arrays = arrays

    def __len__(self) -> int:
        return self._arrays.layout.rows

    @property
    def has_preferences(self) -> bool:
        """Whether a row is a pair (`preference`) and not one sequence (`example`)."""
        return self._arrays.layout.sequences_per_row == 2

    def line(self, index: int) -> int:
        """Return the line of the file (1-based) that row `index` stands on."""
        return int(self._arrays.lines[index])

    def lengths(self, max_length: int | None = None) -> npt.NDArray[np.int64]:
        """Return the tokens of each row, int64 [rows]; of both its sequences for preferences."""
        lengths = np.diff(self._arrays.offsets)
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        per_row: npt.NDArray[np.int64] = lengths.reshape(len(self), -1).sum(axis=1)
        return per_row

    def sequence_sizes(self) -> list[tuple[int, int]]:
        """Return (tokens, targets) of each sequence, uncut; a row of preferences has two."""
        lengths = np.diff(self._arrays.offsets)
        targets = np.add.reduceat(self._arrays.targets, self._arrays.offsets[:-1], dtype=np.int64)
        return list(zip(lengths.tolist(), targets.tolist(), strict=True))

    def first_token_beyond(self, vocabulary: int) -> tuple[int, int] | None:
        """Return (row, token) of the first token that a vocabulary of this many does not have, None without one."""
        tokens = self._arrays.tokens
        if int(tokens.max()) < vocabulary:
            return None
        place = int((tokens >= vocabulary).argmax())
        sequence = int(np.searchsorted(self._arrays.offsets, place, side="right")) - 1
        return sequence // self._arrays.layout.sequences_per_row, int(tokens[place])

    def truncated_share(self, max_length: int) -> float:
        """Return the share of rows that lose tokens at `max_length`."""
        longest = np.diff(self._arrays.offsets).reshape(len(self), -1).max(axis=1)
        return float((longest > max_length).mean())

    def example(self, index: int, max_length: int) -> Example:
        """Return row `index` cut to at most `max_length` (2 or more) tokens; `truncation` says which go."""
        if self.has_preferences:
            raise TypeError("the rows of this dataset are preferences: ask for preference(index, max_length)")
        self._check(index, max_length)
        whole = self._sequence(index)
        prompt = whole.first_target
        return self._cut(whole, prompt_kept(prompt, len(whole.input_ids) - prompt, max_length), max_length)

    def preference(self, index: int, max_length: int) -> tuple[Example, Example]:
        """Return the chosen and the rejected sequence of row `index`, each at most `max_length` tokens."""
        if not self.has_preferences:
            raise TypeError("the rows of this dataset are no preferences: ask for example(index, max_length)")
        self._check(index, max_length)
        chosen, rejected = self._sequence(2 * index), self._sequence(2 * index + 1)
        prompt = chosen.first_target
        longest = max(len(chosen.input_ids), len(rejected.input_ids)) - prompt
        kept = prompt_kept(prompt, longest, max_length)
        return self._cut(chosen, kept, max_length), self._cut(rejected, kept, max_length)

    def _check(self, index: int, max_length: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if max_length < 2:
            raise ValueError(f"max_length = {max_length}: a target and the token before it need at least 2")

    def _sequence(self, sequence: int) -> Encoded:
        where = slice(self._arrays.offsets[sequence], self._arrays.offsets[sequence + 1])
        return Encoded(np.array(self._arrays.tokens[where]), np.array(self._arrays.targets[where]))

    def _cut(self, whole: Encoded, kept_prompt: int, max_length: int) -> Example:
        length = len(whole.input_ids)
        if length <= max_length and kept_prompt == whole.first_target:
            return Example(whole.input_ids, whole.target_mask)
        kept = kept_indices(length, whole.first_target, kept_prompt, self._arrays.layout.prefix, max_length)
        return Example(whole.input_ids[kept], whole.target_mask[kept])


def open_dataset(
    path: Path,
    tokenizer: Tokenizer,
    objective: Objective,
    cache_dir: Path,
    max_length_cap: int | None = None,
    limits: DatasetLimits | None = None,
) -> TokenisedDataset:
    """Tokenise the rows of `path` into `cache_dir`, or open what is there already.

    `tokenizer` is a transformers tokenizer. With `max_length_cap`, SFT rows are cut to it before they are kept: no
    trial can ask for more. Raises `DatasetError` for a file that `alto_common.dataset_rows` refuses and for rows that
    do not suit the objective or the chat template, `TokenizerError` for a tokenizer without an end-of-sequence token.
    """
    try:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        cure = f"give a readable file ({error.strerror})"
        raise DatasetError([Violation("dataset", str(path), cure)]) from error
    parts = [
        ENCODING_VERSION,
        content,
        tokenizer_sha256(tokenizer),
        str(objective.kind),
        str(objective.loss_scope),
        max_length_cap,
    ]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = cache_dir / fingerprint
    arrays = open_arrays(folder)
    if arrays is None:
        encoder = RowEncoder(tokenizer, objective)
        rows = _encoded_rows(path, encoder, objective, max_length_cap, limits)
        arrays = write_arrays(folder, rows, encoder.prefix_length)
    return TokenisedDataset(arrays, fingerprint)


def _encoded_rows(
    path: Path, encoder: RowEncoder, objective: Objective, cap: int | None, limits: DatasetLimits | None
) -> Iterator[tuple[int, tuple[Encoded, ...]]]:
    rows = read_rows(path, limits)
    empty = True
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        if empty:
            unsuited = check_objective(row_format(chunk[0][1]), objective)
            if unsuited:
                raise DatasetError(unsuited)
        empty = False
        for (line, row), sequences in zip(chunk, encoder.encode(chunk), strict=True):
            # Answers to one prompt must be cut alike, which only a trial's own length decides.
            uncut = cap is None or isinstance(row, PreferenceRow)
            yield line, sequences if uncut else tuple(_capped(one, encoder.prefix_length, cap) for one in sequences)
    if empty:
        raise DatasetError([Violation("dataset", path.name, "it holds no rows: give at least one")])


def _capped(whole: Encoded, prefix: int, cap: int | None) -> Encoded:
    if cap is None or len(whole.input_ids) <= cap:
        return whole
    prompt = whole.first_target
    length = len(whole.input_ids)
    kept = kept_indices(length, prompt, prompt_kept(prompt, length - prompt, cap), prefix, cap)
    return Encoded(whole.input_ids[kept], whole.target_mask[kept])
