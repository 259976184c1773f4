from __future__ import annotations

from alto_training.executor.packer import choose_items
from hypothesis import given
from hypothesis import strategies as st

queues = st.lists(st.lists(st.integers(1, 50), max_size=8), min_size=1, max_size=6)


@given(queues, st.integers(1, 120), st.integers(0, 100))
def test_a_tick_stays_within_its_budget_unless_one_item_alone_is_longer(
    waiting: list[list[int]], budget: int, first: int
) -> None:
    taken = choose_items(waiting, budget, first)
    used = sum(sum(queue[:count]) for queue, count in zip(waiting, taken, strict=True))
    assert all(0 <= count <= len(queue) for queue, count in zip(waiting, taken, strict=True))
    assert used <= budget or sum(taken) == 1


@given(queues, st.integers(1, 120))
def test_every_slot_with_work_comes_first_in_turn_so_that_none_starves(waiting: list[list[int]], budget: int) -> None:
    for slot, queue in enumerate(waiting):
        if queue:
            assert choose_items(waiting, budget, first=slot)[slot] >= 1


@given(queues, st.integers(1, 120), st.integers(0, 100))
def test_no_item_that_would_fit_next_is_left_behind(waiting: list[list[int]], budget: int, first: int) -> None:
    taken = choose_items(waiting, budget, first)
    used = sum(sum(queue[:count]) for queue, count in zip(waiting, taken, strict=True))
    for queue, count in zip(waiting, taken, strict=True):
        if count < len(queue):
            assert used + queue[count] > budget


def test_slots_take_turns_rather_than_one_filling_the_tick() -> None:
    assert choose_items([[10] * 9, [10] * 9, [10] * 9], budget=60, first=0) == [2, 2, 2]


def test_nothing_waiting_gives_an_empty_tick() -> None:
    assert choose_items([[], []], budget=10, first=1) == [0, 0]
