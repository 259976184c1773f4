"""The one order in which every rank gathers the parts of the backbone: in lock step, or by itself.

The order is fixed by the model alone. A training pass meets embeddings, layers, head, and the layers backwards; a pass
without gradients ends at the head. Where a gather is one of all ranks, a rank without work walks through the same order
and computes nothing; where none is, a training pass that ends launches the first gathers of the next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alto_training.sharding.errors import LockStepError
from alto_training.sharding.units import ShardedUnit


class GatherOrder:
    """Gathers units as a pass enters them, and launches the gathers of the next `prefetch` ones beforehand.

    A pass calls `enter(unit)` before it uses a unit's weights and `leave(unit)` after; `walk` is a pass without
    computation. `beat` is called at each unit: a rank that stops beating hangs. What is launched when depends on the
    position in the order alone, so that ranks cannot drift apart.
    """

    def __init__(
        self,
        embeddings: Sequence[ShardedUnit],
        layers: Sequence[ShardedUnit],
        head: ShardedUnit,
        prefetch: int = 1,
        beat: Callable[[], None] = lambda: None,
        in_lock_step: bool = True,
    ) -> None:
        self.in_lock_step = in_lock_step
        self._forward = (*embeddings, *layers, head)
        self._round_trip = (*self._forward, *reversed(layers))
        # What follows a training pass, of either kind, begins with the forward pass.
        self._next = () if in_lock_step else self._forward
        self._prefetch = prefetch
        self._beat = beat
        self._order: Sequence[ShardedUnit] = ()  # of this pass, to `_end`, and of the next
        self._end = 0
        self._position = 0
        self._launched: list[ShardedUnit] = []  # gathers under way, oldest first
        self._here: list[ShardedUnit] = []
        self.shard_bytes = sum(unit.shard_bytes for unit in dict.fromkeys(self._forward))

    def gathered_bytes(self, training: bool) -> int:
        """Return the bytes of all gathers of a pass, one of many alike, a rank's own shares included."""
        order, end = self._orders(training)
        here: set[ShardedUnit] = set()
        total = 0
        for _ in range(2):  # what the first leaves here the second need not gather
            total = 0
            for position, unit in enumerate(order[:end]):
                total += 0 if unit in here else unit.gathered_bytes
                here.add(unit)
                if not self._stays(order, position):
                    here.discard(unit)
        return total

    def begin(self, training: bool) -> None:
        """Begin a pass. One that was broken off is only forgotten where no other rank counts on it."""
        if self._position != self._end:
            if self.in_lock_step:
                raise self._broken("a new pass")
            self._let_go()
        self._order, self._end = self._orders(training)
        self._position = 0

    def enter(self, unit: ShardedUnit) -> None:
        """Have the weights of `unit` here, and the next ones under way."""
        if self._position >= self._end or self._order[self._position] is not unit:
            raise self._broken(unit.name)
        self._beat()
        for ahead in self._order[self._position : self._position + 1 + self._prefetch]:
            if ahead not in self._here and ahead not in self._launched:
                ahead.start()
                self._launched.append(ahead)
        if unit not in self._here:
            unit.finish()
            self._launched.remove(unit)
            self._here.append(unit)

    def leave(self, unit: ShardedUnit) -> None:
        """Let go of the weights of `unit`, unless the pass meets it again at once."""
        if not self._stays(self._order, self._position):
            unit.release()
            self._here.remove(unit)
        self._position += 1

    def walk(self, training: bool) -> None:
        """Take part in a pass without work."""
        self.begin(training)
        for unit in self._order[: self._end]:
            self.enter(unit)
            self.leave(unit)

    def _orders(self, training: bool) -> tuple[Sequence[ShardedUnit], int]:
        """Return the order of a pass and of what is known of the next, and where the pass ends."""
        if training:
            return (*self._round_trip, *self._next), len(self._round_trip)
        return self._forward, len(self._forward)

    def _let_go(self) -> None:
        for unit in (*self._launched, *self._here):
            unit.release()
        self._launched, self._here = [], []

    def _stays(self, order: Sequence[ShardedUnit], position: int) -> bool:
        """Say whether the unit at `position` is met again within the prefetched ones, as layers are at a turn."""
        return order[position] in order[position + 1 : position + 2 + self._prefetch]

    def _broken(self, entered: str) -> LockStepError:
        due = self._order[self._position].name if self._position < self._end else "the end of the pass"
        return LockStepError(
            f"the backbone came to {entered} where {due} was to be gathered",
            "restart the ranks from their last checkpoint",
        )
