"""Randomness that belongs to a trial alone: seeds derived by name, data order, and dropout masks by position.

Nothing here is drawn from a shared stream, so a neighbour, the packing or a resume cannot shift what a trial draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_ROW_PRIME = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


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

    `stream_keys` names each sequence; `lengths` are their tokens. Shape of the answer: [sum(lengths)], int32.
    """
    keys = []
    for stream_key, length in zip(stream_keys, lengths, strict=True):
        start = derive_seed(seed, "dropout", stream_key)
        positions = torch.arange(length, dtype=torch.int64)
        mixed = positions * (_signed(_ROW_PRIME)) + start
        mixed = (mixed ^ (mixed >> 29)) * _signed(0xBF58476D1CE4E5B9)
        keys.append((mixed >> 32).to(torch.int32))
    return torch.cat(keys)


def dropout_keep_mask(row_keys_T: torch.Tensor, module_key: int, features: int, probability: float) -> torch.Tensor:
    """Return the boolean [T, features] mask of what dropout keeps; the same on every device and for every packing.

    A counter-based hash (two rounds of the murmur3 finaliser) of the token's key, the module's and the feature's.
    """
    feature_keys = torch.arange(features, dtype=torch.int32, device=row_keys_T.device) * _signed_32(0x9E3779B1)
    rows = (row_keys_T ^ _signed_32(module_key & 0xFFFFFFFF)) * _signed_32(0x85EBCA6B)
    rows = rows ^ (rows >> 15)
    bits = rows[:, None] ^ feature_keys[None, :]
    bits = bits.mul_(_signed_32(0x85EBCA6B))
    bits = bits.bitwise_xor_(bits >> 13)
    bits = bits.mul_(_signed_32(0xC2B2AE35))
    bits = bits.bitwise_xor_(bits >> 16)
    # Uniform over the signed 32-bit integers: the lowest share `probability` of them is dropped.
    threshold = int(probability * 2**32) - 2**31
    return bits >= threshold


def _signed(value: int) -> int:
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _signed_32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
