"""Parameters in one flat buffer, gathered by copies: plain tensors stand for the other ranks' memory."""

import pytest
import torch
from alto_training.sharding import gather_buffers
from alto_training.sharding.gather_buffers import MappedBuffers, PlainBuffers, Shares
from alto_training.sharding.peer_units import PeerRows, PeerUnit, flat_layout, flatten
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


def make_unit(ranks: int, rank: int, buffers: PlainBuffers, seed: int) -> tuple[PeerUnit, list[nn.Parameter], list]:
    torch.manual_seed(seed)
    whole = [torch.randn(7, 13), torch.randn(5), torch.randn(64, 3)]
    parameters = [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in whole]
    layout = flat_layout([parameter.numel() for parameter in parameters], ranks)
    shares = list(flatten(parameters, layout, ranks).split(layout.share))
    return PeerUnit("unit", parameters, layout, Shares(shares, rank), buffers), parameters, whole


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_gathered_is_what_was_cut_and_buffers_are_used_again(ranks: int) -> None:
    buffers = PlainBuffers()
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
    tensors, busy = [torch.zeros(64) for _ in range(4)], [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
    copies = Shares(tensors, 2, busy=busy).copies
    assert [part for _, part, _ in copies] == [3, 0, 1]
    for address, part, word in copies:
        assert (address, word) == (tensors[part].data_ptr(), busy[part].data_ptr())
    assert all(word == 0 for *_, word in Shares(tensors, 2).copies)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_rank_reads_from_every_other_once_and_where_they_come_out_in_pairs(ranks: int) -> None:
    tensors = [torch.zeros(64) for _ in range(ranks)]
    order = [[part for _, part, _ in Shares(tensors, mine).copies] for mine in range(ranks)]
    for mine, parts in enumerate(order):
        assert sorted([*parts, mine]) == list(range(ranks))
    if ranks in (2, 4, 8):
        for at_once in zip(*order, strict=True):
            assert all(at_once[at_once[mine]] == mine for mine in range(ranks))


@given(st.integers(1, 40), st.integers(1, 5), st.lists(st.integers(0, 1000), max_size=12))
def test_rows_come_from_the_rank_that_has_them(vocabulary: int, ranks: int, drawn: list[int]) -> None:
    weight = torch.arange(vocabulary * 3.0).view(vocabulary, 3)
    rows = -(-vocabulary // ranks)
    whole = torch.cat([weight, torch.full((rows * ranks - vocabulary, 3), float("nan"))])
    ids = torch.tensor([number % vocabulary for number in drawn], dtype=torch.int64)
    assert torch.equal(PeerRows(whole.split(rows), 0).read(ids.view(1, -1)), weight[ids])


class CountedMemory:
    """Stands for memory of a GPU; counts what is there."""

    there = 0

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        CountedMemory.there += 1

    def __del__(self) -> None:
        CountedMemory.there -= 1


class NoLane:
    def __init__(self, device: torch.device) -> None:
        self.targets: list[list[int]] = []

    def add_target(self, parts: list[int]) -> int:
        self.targets.append(parts)
        return len(self.targets) - 1

    def gather(self, target: int, copies: list, size_bytes: int) -> None:
        """Copies nothing: what goes where is tested on a GPU."""


def test_a_room_that_cannot_be_laid_out_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    failing: list[bool] = []

    def mapped(device: torch.device, parts: list[CountedMemory], dtype: torch.dtype) -> torch.Tensor:
        if failing:
            raise MemoryError
        return torch.zeros(sum(part.size_bytes for part in parts) // 4)

    monkeypatch.setattr(gather_buffers, "make_memory", lambda device, size_bytes: CountedMemory(size_bytes))
    monkeypatch.setattr(gather_buffers, "mapped", mapped)
    monkeypatch.setattr(gather_buffers, "CopyLane", NoLane)
    buffers = MappedBuffers(torch.device("cpu"))
    own = CountedMemory(256)
    for mine in (0, 1, 2):
        shares = Shares([torch.zeros(64) for _ in range(3)], mine, own)
        failing.append(True)
        with pytest.raises(MemoryError):
            buffers.gather(shares)
        failing.clear()
        buffer = buffers.gather(shares)
        assert buffer.room is not None
        assert [part.numel() for part in buffer.parts] == [64, 64, 64]
        buffers.give_back(buffer)
        assert (buffers.size_bytes, CountedMemory.there) == (2 * 256, 3)
    first, second = buffers.gather(shares), buffers.gather(shares)
    assert first.room is not second.room
    assert buffers.size_bytes == 4 * 256
