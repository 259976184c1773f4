"""The share of its full work that a search does before its trials have exited, learned by tenant and shape."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

HISTORY = 200  # finished tasks remembered for each tenant and shape
PRIOR_TASKS = 4.0  # weight of the prior share, in tasks
# Where few were seen, the low end of the interval: this part of the least that was seen.
FEWER, FEWER_WITHOUT_EXITS = 0.4, 0.95
LEAST_SHARE, MOST_SHARE = 0.01, 1.5  # a size that was estimated too low makes a share above 1


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the full work: expectation, and the ends of its 90 % interval."""

    expected: float
    low: float
    high: float

    @classmethod
    def certain(cls, share: float) -> Share:
        """Return a share that is known."""
        return cls(share, share, share)


@dataclass
class ExitShares:
    """The shares of finished searches, by (tenant, shape)."""

    _seen: dict[tuple[str, str], deque[float]] = field(default_factory=dict)
    # The same in ascending order, by the tenant (None: of all together) and shape; made when they are asked for.
    _ordered: dict[tuple[str | None, str], list[float]] = field(default_factory=dict, repr=False, compare=False)

    def observe(self, tenant: str, shape: str, share: float) -> None:
        """Note what share of its full work a search did to its natural end."""
        if math.isfinite(share) and share > 0:
            kept = self._seen.setdefault((tenant, shape), deque(maxlen=HISTORY))
            kept.append(min(MOST_SHARE, max(LEAST_SHARE, share)))
            self._have_changed(tenant, shape)

    def knows(self, tenant: str, shape: str) -> bool:
        """Return whether the tenant has a history of this shape of its own."""
        return bool(self._seen.get((tenant, shape)))

    def expect(self, tenant: str | None, shape: str, prior: float, done: float = 0.0) -> Share:
        """Return the share that a search will have done at its end, given that it has done `done` by now.

        Tenants without a history of this shape, and None, are expected to be like the others; without any history
        `prior` counts.
        """
        ordered = self._history(tenant, shape)
        seen = ordered[bisect_right(ordered, done) :]
        if prior <= done:
            # Who has done more than was expected is one of those that run longer.
            prior = done + 0.5 * max(0.0, 1.0 - done)
        if prior >= 1.0 and not seen:
            return Share(prior, prior, prior)
        mean = (sum(seen) + PRIOR_TASKS * prior) / (len(seen) + PRIOR_TASKS)
        # Order statistics of the history and one more: with few seen, the ends lie outside of what was seen.
        least = done + (FEWER if prior < 1.0 else FEWER_WITHOUT_EXITS) * ((seen[0] if seen else prior) - done)
        low = quantile(seen, 0.05, least)
        high = quantile(seen, 0.95, max([1.0, *seen[-1:]]))
        return Share(mean, min(low, mean), max(high, mean))

    def state(self, tenant: str, shape: str) -> list[float]:
        """Return what is known of a tenant and shape, oldest first."""
        return list(self._seen.get((tenant, shape), ()))

    def load(self, tenant: str, shape: str, shares: Iterable[float]) -> None:
        """Take up what `state` returned."""
        self._seen[tenant, shape] = deque(shares, maxlen=HISTORY)
        self._have_changed(tenant, shape)

    def _history(self, tenant: str | None, shape: str) -> list[float]:
        """Return what counts for a tenant and shape, in ascending order."""
        key = (tenant if tenant is not None and self.knows(tenant, shape) else None, shape)
        if key not in self._ordered:
            self._ordered[key] = sorted(
                share
                for (one, name), shares in self._seen.items()
                if name == shape and key[0] in (None, one)
                for share in shares
            )
        return self._ordered[key]

    def _have_changed(self, tenant: str, shape: str) -> None:
        self._ordered.pop((tenant, shape), None)
        self._ordered.pop((None, shape), None)


def quantile(ordered: list[float], share: float, beyond: float) -> float:
    """Return the `share` quantile of what comes next, given `ordered` draws.

    It is an order statistic of n + 1 draws, so that it is right for any distribution; `beyond` where that lies outside.
    """
    position = share * (len(ordered) + 1) - 1.0
    if position < 0 or position > len(ordered) - 1:
        return beyond
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
