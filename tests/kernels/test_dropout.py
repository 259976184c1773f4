"""The dropout stream: the right share, independent by row, feature and module, and the same whatever the packing."""

from __future__ import annotations

import pytest
import torch
from alto_kernels.reference import keep_mask


def keys(count: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=draws).to(torch.int32)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_share_dropped(probability: float) -> None:
    mask = keep_mask(keys(500), 3, 1000, probability)
    assert mask.float().mean().item() == pytest.approx(1 - probability, abs=4e-3)


def test_modules_rows_and_features_are_uncorrelated() -> None:
    first, second = keep_mask(keys(400), 1, 600, 0.5).float(), keep_mask(keys(400), 2, 600, 0.5).float()
    for a, b in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 0.01


def test_a_row_keeps_its_mask_wherever_it_lies() -> None:
    row_keys = keys(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keep_mask(row_keys, 1, 64, 0.3)[order], keep_mask(row_keys[order], 1, 64, 0.3))
