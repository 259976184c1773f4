"""Randomness that belongs to a trial alone: seeds derived by name, data order, and dropout keys by position.

Nothing here is drawn from a shared stream, so a neighbour, the packing or a resume cannot shift what a trial draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and its place, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class DataOrder:
    """The endless stream of dataset rows that one trial reads: a fresh permutation for each epoch.

    >>> order = DataOrder(examples=3, seed=7)
    >>> sorted(order.row(position) for position in (0, 1, 2))
    [0, 1, 2]
    """

    def __init__(self, examples: int, seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def row(self, position: int) -> int:
        """Return the dataset row at `position` (from 0) of the stream."""
        epoch, offset = divmod(position, self._examples)
        if epoch != self._epoch:
            rows = torch.randperm(self._examples, generator=generator(self._seed, "order", epoch))
            self._permutation, self._epoch = rows.tolist(), epoch
        return self._permutation[offset]


def dropout_row_keys(seed: int, stream_keys: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Return one 32-bit key for each token, from the trial's seed, the sequence's place in its stream, and position.

    `alto_kernels.reference.keep_mask` makes masks of them, the same on every device and for every packing.

    `stream_keys` names each sequence; `lengths` are their tokens. Shape of the answer: [sum(lengths)], int32.
    """
    keys = []
    for stream_key, length in zip(stream_keys, lengths, strict=True):
        start = derive_seed(seed, "dropout", stream_key)
        # splitmix64 of start + position, by its upper half.
        mixed = torch.arange(length, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + start
        mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
        keys.append((mixed >> 32).to(torch.int32))
    return torch.cat(keys)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    # A logical shift: torch's own fills with the sign.
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
