"""What training costs on one kind of hardware: seconds = a * ticks + b * tokens + c * lora_rank_ticks.

Fitted by least squares on relative errors, older ticks counting less; `lora_rank_ticks` sums the lora_rank of the
adapters on each tick. It begins at a prior, which keeps counting a little: the first measurement already counts, one
bad one does little harm, and what was never seen apart (ticks of another size, other ranks) stays near what is usual.
Sums are enough: a window of many ticks is learned from as well as each tick by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

PRIOR_SPREAD = 1.0  # standard deviation of the logarithm of a prior: a factor of 2.7 either way is usual
SHAPE_SPREAD = 0.5  # relative standard deviation of each coefficient of a prior whose sum has been measured
OUTLIER = 4.0  # a window further off than so many deviations counts as one that far off
FORGETTING = 0.998  # weight of the past at each new tick: speeds drift
FIRST_NOISE = 0.1  # relative deviation of one tick, until it has been measured
LEAST_NOISE, MOST_NOISE = 0.001, 1.0
LEAST_COEFFICIENT = 0.05  # of the prior's: nothing costs less than nothing

# Of a piece of work: training ticks, tokens on them, lora_rank of the adapters on them.
Features = tuple[float, float, float]
_AXES = range(3)


def _zeros() -> list[list[float]]:
    return [[0.0, 0.0, 0.0] for _ in _AXES]


@dataclass(slots=True)
class TickModel:
    """Coefficients in units of `scale`, and the weighted sums that they are solved from. `ticks` were learned from."""

    scale: list[float]
    squares: list[list[float]] = field(default_factory=_zeros)
    products: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    squared_noise: float = FIRST_NOISE**2
    ticks: float = 0.0
    coefficients: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    # Of the information that `squares` hold; None until it is asked for.
    _inverted: list[list[float]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def prior(cls, weights: Features) -> Self:
        """Return a model that has measured nothing."""
        return cls(list(weights))

    @property
    def weights(self) -> Features:
        """Seconds of a tick, of a token on it, of a lora_rank on it."""
        a, b, c = (self.scale[i] * self.coefficients[i] for i in _AXES)
        return a, b, c

    def seconds(self, work: Features) -> float:
        """Return the seconds of `work`; more than 0."""
        (x, y, z), (a, b, c), (ticks, tokens, lora_ranks) = self.scale, self.coefficients, work
        return max(x * a * ticks + y * b * tokens + z * c * lora_ranks, 1e-9)

    def learn(self, work: Features, seconds: float) -> None:
        """Learn from `work` that took `seconds`. Figures that cannot be are ignored."""
        ticks = work[0]
        if not (math.isfinite(seconds) and seconds > 0 and ticks > 0 and min(work) >= 0):
            return
        predicted = self.seconds(work)
        if self.ticks == 0:
            # The prior knows the shape, the first window the speed of this machine.
            self.scale = [unit * seconds / predicted for unit in self.scale]
            predicted = seconds
        limit = OUTLIER * math.hypot(math.sqrt(self.squared_noise / ticks), self.uncertainty(work) if self.ticks else 0)
        error = max(-limit, min(limit, (seconds - predicted) / predicted))
        kept = FORGETTING**ticks
        weight = ticks / self.squared_noise
        relative = [self.scale[i] * work[i] / predicted for i in _AXES]
        for i in _AXES:
            self.products[i] = kept * self.products[i] + weight * relative[i] * (1.0 + error)
            for j in _AXES:
                self.squares[i][j] = kept * self.squares[i][j] + weight * relative[i] * relative[j]
        if self.ticks:
            rate = max(ticks / (ticks + self.ticks), 1.0 - kept)
            self.squared_noise += rate * (error * error * ticks - self.squared_noise)
            self.squared_noise = min(MOST_NOISE**2, max(LEAST_NOISE**2, self.squared_noise))
        self.ticks += ticks
        self._inverted = None
        self.coefficients = self._solved()

    def uncertainty(self, work: Features) -> float:
        """Return the relative standard deviation of what the coefficients say about `work`."""
        if self.ticks == 0:
            return PRIOR_SPREAD
        predicted = self.seconds(work)
        relative = [self.scale[i] * work[i] / predicted for i in _AXES]
        inverse = self._covariance()
        return math.sqrt(max(0.0, sum(relative[i] * inverse[i][j] * relative[j] for i in _AXES for j in _AXES)))

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "_inverted"}

    def _information(self) -> list[list[float]]:
        prior = 1.0 / SHAPE_SPREAD**2
        return [[self.squares[i][j] + (prior if i == j else 0.0) for j in _AXES] for i in _AXES]

    def _covariance(self) -> list[list[float]]:
        if self._inverted is None:
            self._inverted = _inverse(self._information())
        return self._inverted

    def _solved(self) -> list[float]:
        inverse, prior = self._covariance(), 1.0 / SHAPE_SPREAD**2
        solved = [sum(inverse[i][j] * (self.products[j] + prior) for j in _AXES) for i in _AXES]
        return [max(LEAST_COEFFICIENT, coefficient) for coefficient in solved]


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Return the inverse of a symmetric positive definite 3 x 3 matrix, by its cofactors."""
    (a, b, c), (_, d, e), (_, _, f) = matrix
    cofactors = [
        [d * f - e * e, c * e - b * f, b * e - c * d],
        [c * e - b * f, a * f - c * c, b * c - a * e],
        [b * e - c * d, b * c - a * e, a * d - b * b],
    ]
    determinant = sum(matrix[0][i] * cofactors[0][i] for i in _AXES)
    return [[cell / determinant for cell in row] for row in cofactors]
