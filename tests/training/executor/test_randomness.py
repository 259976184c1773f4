from __future__ import annotations

import pytest
import torch
from alto_kernels.reference import keep_mask
from alto_training.executor.randomness import DataOrder, derive_seed, dropout_row_keys
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 40), st.integers(0, 2**40))
def test_each_epoch_reads_every_row_once(examples: int, seed: int) -> None:
    order = DataOrder(examples, seed)
    for epoch in range(3):
        rows = [order.row(epoch * examples + offset) for offset in range(examples)]
        assert sorted(rows) == list(range(examples))


def test_order_can_be_read_from_anywhere_and_depends_on_the_seed() -> None:
    forward = [DataOrder(50, 3).row(position) for position in range(120)]
    order = DataOrder(50, 3)
    assert [order.row(position) for position in reversed(range(120))] == forward[::-1]
    assert [DataOrder(50, 4).row(position) for position in range(120)] != forward
    assert forward[:50] != forward[50:100]


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_in_every_row_and_column(probability: float) -> None:
    keys = dropout_row_keys(seed=5, stream_keys=range(40), lengths=[50] * 40)
    keep = keep_mask(keys, 17, 500, probability).float()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(keep.mean() - (1 - probability)) < 4 * deviation / keep.numel() ** 0.5
    assert (keep.mean(dim=0) - (1 - probability)).abs().max() < 6 * deviation / 2000**0.5
    assert (keep.mean(dim=1) - (1 - probability)).abs().max() < 6 * deviation / 500**0.5


def test_dropout_masks_of_other_seeds_sequences_and_modules_are_unrelated() -> None:
    keys = dropout_row_keys(seed=5, stream_keys=[0], lengths=[200])
    mask = keep_mask(keys, 3, 500, 0.5)
    for other in (
        keep_mask(keys, 4, 500, 0.5),
        keep_mask(dropout_row_keys(5, [1], [200]), 3, 500, 0.5),
        keep_mask(dropout_row_keys(6, [0], [200]), 3, 500, 0.5),
        torch.roll(mask, 1, dims=0),
        torch.roll(mask, 1, dims=1),
    ):
        agreement = (mask == other).float().mean()
        assert abs(agreement - 0.5) < 6 * 0.5 / mask.numel() ** 0.5


def test_a_sequences_keys_do_not_depend_on_what_it_is_packed_with() -> None:
    packed = dropout_row_keys(1, [7, 8, 9], [3, 4, 5])
    assert torch.equal(packed[3:7], dropout_row_keys(1, [8], [4]))


def test_seeds_tell_parts_apart() -> None:
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed("1", "23", "")}) == 4
    assert derive_seed(1, "order") == derive_seed(1, "order")
