"""Parameters in one flat buffer, gathered by copies: plain tensors stand for the other ranks' memory."""

import pytest
import torch
from alto_training.sharding.peer_units import GatherBuffers, PeerUnit, flat_layout, flatten, plan_copies
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(1, 5))
def test_parameters_do_not_overlap_and_all_fit(sizes: list[int], ranks: int) -> None:
    layout = flat_layout(sizes, ranks)
    ends = [offset + size for offset, size in zip(layout.offsets, sizes, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, layout.offsets[1:], strict=False))
    assert ends[-1] <= layout.share * ranks
    assert all(offset % 64 == 0 for offset in (*layout.offsets, layout.share))


def make_unit(ranks: int, rank: int, buffers: GatherBuffers, seed: int) -> tuple[PeerUnit, list[nn.Parameter], list]:
    torch.manual_seed(seed)
    whole = [torch.randn(7, 13), torch.randn(5), torch.randn(64, 3)]
    parameters = [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in whole]
    layout = flat_layout([parameter.numel() for parameter in parameters], ranks)
    shares = list(flatten(parameters, layout, ranks).split(layout.share))
    return PeerUnit("unit", parameters, layout, shares, rank, buffers), parameters, whole


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_gathered_is_what_was_cut_and_buffers_are_used_again(ranks: int) -> None:
    buffers = GatherBuffers(torch.device("cpu"))
    one, one_parameters, one_whole = make_unit(ranks, 0, buffers, seed=1)
    other, other_parameters, other_whole = make_unit(ranks, ranks - 1, buffers, seed=2)
    assert all(parameter.numel() == 0 for parameter in one_parameters)
    addresses = set()
    for _ in range(3):
        one.start()
        other.start()
        one.finish()
        other.finish()
        assert all(torch.equal(got, want) for got, want in zip(one_parameters, one_whole, strict=True))
        assert all(torch.equal(got, want) for got, want in zip(other_parameters, other_whole, strict=True))
        addresses |= {one_parameters[0].data_ptr(), other_parameters[0].data_ptr()}
        one.release()
        other.release()
        assert all(parameter.numel() == 0 for parameter in (*one_parameters, *other_parameters))
    assert len(addresses) == 2
    assert one.gathered_bytes == ranks * one.shard_bytes


def test_copies_name_what_they_read_and_whose_turn_to_wait_for() -> None:
    shares, busy = [torch.zeros(64) for _ in range(4)], [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
    *others, own = plan_copies(shares, 2, busy)
    assert [part for _, part, _, _ in others] == [3, 0, 1]
    for address, part, lane, word in others:
        assert (address, lane, word) == (shares[part].data_ptr(), 0, busy[part].data_ptr())
    assert own == (shares[2].data_ptr(), 2, 1, 0)
    assert all(word == 0 for *_, word in plan_copies(shares, 2, []))


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_rank_reads_from_every_other_once_and_where_they_come_out_in_pairs(ranks: int) -> None:
    shares = [torch.zeros(64) for _ in range(ranks)]
    order = [[part for _, part, _, _ in plan_copies(shares, mine, [])] for mine in range(ranks)]
    for mine, parts in enumerate(order):
        assert sorted(parts) == list(range(ranks))
        assert parts[-1] == mine
    if ranks in (2, 4, 8):
        for at_once in zip(*order, strict=True):
            assert all(at_once[at_once[mine]] == mine for mine in range(ranks))
