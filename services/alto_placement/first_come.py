"""First come, first served, carried out virtually beside the real cluster: how long it would have made tasks wait.

The same tasks come to the same nodes. Who came first goes first, and who is behind starts earlier only where that does
not delay the first in line (EASY backfilling). Predictions count, and what tasks really took as soon as that is known.
All that is wanted of it is the longest wait, the measure for how long the real cluster, which puts small tasks first,
may let anyone wait. Source: the virtual schedule of Friedman and Henderson, Fairness and efficiency in web server
protocols, 2003. It knows no priorities, quotas, reservations or guests. It is carried out in the compiled core; a plain
one beside its tests says the same.
"""

from __future__ import annotations

import math
from dataclasses import replace

import alto_planner

from alto_placement.planner.errors import snapshot_error
from alto_placement.planner.model import Snapshot


class WaitBound:
    """Bounds waits by what first come first served would have caused: `patience` x its longest; infinite: no bound."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._first_come = alto_planner.FirstCome()

    @property
    def is_set(self) -> bool:
        """Whether waits are bounded at all."""
        return math.isfinite(self.patience)

    @property
    def longest_wait_s(self) -> float:
        """The longest wait of first come first served: of its last 1,000 starts and, foreseen, its first in line."""
        return self._first_come.longest_wait_s

    def applied(self, snapshot: Snapshot) -> Snapshot:
        """Return `snapshot` with the bound in its objective. Show it every snapshot, in the order of their times.

        A row that did not change should be the same object again, then it costs nothing. A snapshot is refused with
        SnapshotError where it cannot be read; the schedule then stays where it was.
        """
        if not self.is_set:
            return snapshot
        try:
            self._first_come.follow(snapshot)
        except alto_planner.ReadError as error:
            raise snapshot_error(error) from None
        bound_s = self.patience * self._first_come.longest_wait_s
        return replace(snapshot, objective=replace(snapshot.objective, longest_wait_s=bound_s))
