"""What training costs on one kind of hardware: seconds = a * ticks + b * tokens + c * lora_rank_ticks.

Fitted by recursive least squares on relative errors; `lora_rank_ticks` sums the lora_rank of the adapters on each tick.

It begins at a prior, so that the first measurement already counts and one bad one does little harm. Sums are enough: a
window of many ticks is learned from as well as each tick by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

PRIOR_SPREAD = 1.0  # standard deviation of the logarithm of a prior: a factor of 2.7 either way is usual
SHAPE_SPREAD = 0.5  # relative standard deviation of each coefficient of a prior whose sum has been measured
OUTLIER = 4.0  # a window further off than so many deviations counts as one that far off
FORGETTING = 0.998  # weight of the past at each new tick: speeds drift
FIRST_NOISE = 0.1  # relative deviation of one tick, until it has been measured

# Of a piece of work: training ticks, tokens on them, lora_rank of the adapters on them.
Features = tuple[float, float, float]


@dataclass(slots=True)
class TickModel:
    """Coefficients, how well they are known, and how much one tick differs from another. `ticks` were learned from."""

    weights: list[float]
    covariance: list[list[float]]
    squared_noise: float = FIRST_NOISE**2
    ticks: float = 0.0

    @classmethod
    def prior(cls, weights: Features) -> Self:
        """Return a model that has measured nothing."""
        return cls(list(weights), _diagonal(weights))

    def seconds(self, work: Features) -> float:
        """Return the seconds of `work`; more than 0."""
        return max(sum(weight * amount for weight, amount in zip(self.weights, work, strict=True)), 1e-9)

    def learn(self, work: Features, seconds: float) -> None:
        """Learn from `work` that took `seconds`. Figures that cannot be are ignored."""
        ticks = work[0]
        if not (math.isfinite(seconds) and seconds > 0 and ticks > 0 and min(work) >= 0):
            return
        predicted = self.seconds(work)
        if self.ticks == 0:
            # The prior knows the shape, the first window the speed of this machine.
            scale = seconds / predicted
            self.weights = [weight * scale for weight in self.weights]
            self.covariance = _diagonal(self.weights)
            self.ticks = ticks
            return
        noise = self.squared_noise / ticks
        kept = FORGETTING**ticks
        scaled = [amount / predicted for amount in work]
        gained = [sum(row[j] * scaled[j] for j in range(3)) for row in self.covariance]
        expected = kept * noise + sum(scaled[i] * gained[i] for i in range(3))
        limit = OUTLIER * math.sqrt(expected)
        error = max(-limit, min(limit, (seconds - predicted) / predicted))
        gain = [value / expected for value in gained]
        self.weights = [weight + factor * error for weight, factor in zip(self.weights, gain, strict=True)]
        self.covariance = [
            # What is forgotten is never known less than at the beginning.
            [(self.covariance[i][j] - gain[i] * gained[j]) / kept for j in range(3)]
            for i in range(3)
        ]
        self._bound_covariance()
        rate = max(1.0 / (1.0 + self.ticks / ticks), 1.0 - kept)
        self.squared_noise = max(1e-6, self.squared_noise + rate * (error * error * ticks - self.squared_noise))
        self.ticks += ticks

    def uncertainty(self, work: Features) -> float:
        """Return the relative standard deviation of what the coefficients say about `work`."""
        if self.ticks == 0:
            return PRIOR_SPREAD
        scaled = [amount / self.seconds(work) for amount in work]
        of_mean = sum(scaled[i] * self.covariance[i][j] * scaled[j] for i in range(3) for j in range(3))
        return math.sqrt(max(0.0, of_mean))

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "weights": self.weights,
            "covariance": self.covariance,
            "squared_noise": self.squared_noise,
            "ticks": self.ticks,
        }

    def _bound_covariance(self) -> None:
        """Keep what is forgotten from growing without end: no coefficient is known less well than its prior was."""
        for i in range(3):
            most = (SHAPE_SPREAD * abs(self.weights[i])) ** 2 + 1e-18
            if self.covariance[i][i] > most:
                shrink = math.sqrt(most / self.covariance[i][i])
                for j in range(3):
                    self.covariance[i][j] *= shrink
                    self.covariance[j][i] *= shrink


def _diagonal(weights: list[float] | Features) -> list[list[float]]:
    return [[(weights[i] * SHAPE_SPREAD) ** 2 if i == j else 0.0 for j in range(3)] for i in range(3)]
