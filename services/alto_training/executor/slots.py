"""Who trains now: a fixed number of slots, and a queue of trials that wait for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Slots(Generic[T]):
    """Slots in a fixed order, and those who wait.

    A freed slot keeps its number, so that leaving and joining never moves a neighbour on the token axis's order.
    """

    def __init__(self, count: int) -> None:
        self.places: list[T | None] = [None] * count
        self.waiting: list[T] = []

    def __iter__(self) -> Iterator[T]:
        """Iterate over those in a slot, in slot order."""
        return (holder for holder in self.places if holder is not None)

    def enqueue(self, newcomer: T, first: bool = False) -> None:
        """Put someone at the end of the queue, or at its head."""
        self.waiting.insert(0 if first else len(self.waiting), newcomer)

    def grow(self, count: int) -> None:
        """Have at least `count` slots; the new ones come last."""
        self.places.extend([None] * (count - len(self.places)))

    def leave(self, leaver: T) -> bool:
        """Take someone out of its slot or out of the queue; say whether it held a slot."""
        if leaver in self.waiting:
            self.waiting.remove(leaver)
            return False
        for slot, holder in enumerate(self.places):
            if holder is leaver:
                self.places[slot] = None
                return True
        return False

    def fill(self) -> list[tuple[int, T]]:
        """Give free slots to those who wait, in order; return who took which."""
        taken = []
        for slot, holder in enumerate(self.places):
            if holder is None and self.waiting:
                newcomer = self.waiting.pop(0)
                self.places[slot] = newcomer
                taken.append((slot, newcomer))
        return taken
