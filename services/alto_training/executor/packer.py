"""Which items enter the next tick: round robin over the slots, up to a budget of tokens.

An item is what may not be split: one sequence (SFT) or one pair (DPO). Pure arithmetic on token counts.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_items(waiting: Sequence[Sequence[int]], budget: int, first: int) -> list[int]:
    """Return how many of its waiting items each slot puts into the tick.

    `waiting[slot]` are the token counts of the items left of that slot's effective batch, in order; `first` is the slot
    that chooses first, and turns from tick to tick so that none starves. The sum stays within `budget`, except that
    the first item chosen is always taken: a sequence longer than the budget has a tick to itself.
    """
    taken = [0] * len(waiting)
    used = 0
    order = [(first + offset) % len(waiting) for offset in range(len(waiting))]
    open_slots = [slot for slot in order if waiting[slot]]
    while open_slots:
        still_open = []
        for slot in open_slots:
            tokens = waiting[slot][taken[slot]]
            if used and used + tokens > budget:
                continue
            taken[slot] += 1
            used += tokens
            if taken[slot] < len(waiting[slot]):
                still_open.append(slot)
        open_slots = still_open
    return taken
