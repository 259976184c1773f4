"""Dealing trials to ranks."""

from alto_training.sharding.dealing import deal
from hypothesis import given
from hypothesis import strategies as st

LOADS = st.lists(st.floats(0.0, 1e6), max_size=20)


def totals(loads: list[float], dealt: list[int], ranks: int) -> list[float]:
    return [sum(load for load, rank in zip(loads, dealt, strict=True) if rank == one) for one in range(ranks)]


@given(LOADS, st.integers(1, 8), st.data())
def test_each_trial_has_a_rank_and_dealing_again_moves_nothing(loads: list[float], ranks: int, data: st.DataObject):
    owners = data.draw(st.lists(st.none() | st.integers(0, ranks - 1), min_size=len(loads), max_size=len(loads)))
    dealt = deal(loads, owners, ranks)
    assert len(dealt) == len(loads)
    assert all(0 <= rank < ranks for rank in dealt)
    assert deal(loads, list(dealt), ranks) == dealt
    if loads:
        # Greedy lists are within the mean and one trial of even.
        assert max(totals(loads, dealt, ranks)) <= sum(loads) / ranks + max(loads) * 1.0001 + 0.11 * sum(loads) / ranks


def test_loads_whose_tenth_is_nothing_are_dealt_too() -> None:
    assert sorted(deal([5e-324], [0], 2)) == [0]
    assert len(deal([5e-324, 1e-323], [0, 0], 3)) == 2


def test_newcomers_are_dealt_heaviest_first() -> None:
    assert deal([1.0, 5.0, 4.0, 2.0], [None] * 4, 2) == [0, 0, 1, 1]


def test_even_loads_are_left_alone() -> None:
    assert deal([3.0, 3.1, 2.9], [2, 0, 1], 3) == [2, 0, 1]


def test_what_exits_left_uneven_is_evened_with_one_move() -> None:
    dealt = deal([4.0, 4.0, 4.0, 4.0], [0, 0, 0, 1], 2)
    assert sorted(totals([4.0] * 4, dealt, 2)) == [8.0, 8.0]
    assert sum(before != after for before, after in zip([0, 0, 0, 1], dealt, strict=True)) == 1
