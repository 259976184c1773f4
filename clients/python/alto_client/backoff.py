"""How long to wait before the next attempt: exponential with jitter, so that many clients do not return at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic, sleep

from alto_client.errors import AltoError

OnRetry = Callable[[AltoError, float], None]


class Backoff:
    """Waits between attempts. `succeeded` after progress starts anew; `wait` raises the error once patience ends.

    All times in seconds. `patience_s` counts from the first failure after progress.
    """

    def __init__(self, patience_s: float, on_retry: OnRetry | None = None, *, first_s: float = 0.2, most_s: float = 8):
        self._patience_s = patience_s
        self._on_retry = on_retry
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s
        self._failing_since: float | None = None

    def succeeded(self) -> None:
        """Note that something came through."""
        self._next_s = self._first_s
        self._failing_since = None

    def wait(self, error: AltoError) -> None:
        """Sleep before another attempt after `error`, or raise it when patience is at its end."""
        now = monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= self._patience_s:
            raise error
        delay_s = self._next_s * random.uniform(0.5, 1.0)
        if error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, self._patience_s))
        self._next_s = min(self._next_s * 2, self._most_s)
        if self._on_retry is not None:
            self._on_retry(error, delay_s)
        sleep(delay_s)
