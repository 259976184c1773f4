"""Placement's clock: what people read never jumps, whatever becomes of the host's."""

from __future__ import annotations

import time
from collections.abc import Callable

from alto_placement.state import Moment

# Seconds that the wall time may gain or lose on the host's in a second.
SLEW = 0.05


class SteadyClock:
    """Wall time that moves with the monotonic clock and drifts towards the host's, by at most 5 %.

    A host whose clock is set back or forth would otherwise end plans in the past, or make every task wait for years.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._monotonic, self._wall = monotonic, wall
        self._last = Moment(monotonic(), wall())

    def __call__(self) -> Moment:
        """Return the present."""
        now_s = self._monotonic()
        elapsed_s = max(0.0, now_s - self._last.monotonic_s)
        wall_s = self._last.wall_s + elapsed_s
        drift_s = self._wall() - wall_s
        wall_s += max(-SLEW * elapsed_s, min(SLEW * elapsed_s, drift_s))
        self._last = Moment(now_s, wall_s)
        return self._last
