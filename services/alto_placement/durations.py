"""How long a task takes: learned from measured ticks, with a prior before there are any.

    seconds = start + ticks * (a + b * tokens a tick + c * lora_ranks a tick) + evaluations + checkpoints

a, b, c are fitted for each (backbone, GPU kind, GPUs) by recursive least squares on relative errors, starting from a
prior, so that the first measurement already counts and one bad one does little harm. Early exits shorten the work by a
share that is learned for each tenant and shape of search. A prediction is an upper bound (nobody exits), an expectation
and a 90 % interval; it is corrected while the task runs and nothing is ever stopped because it was wrong.
Source: EVIDENCE (Placement), point 7: predict on tokens, keep upper bound, expectation and interval.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from alto_placement.planner.model import Duration

Z90 = 1.645  # half a 90 % interval of a normal distribution, in standard deviations
PRIOR_SPREAD = 1.0  # standard deviation of the logarithm of a prior: a factor of 2.7 either way is usual
MODEL_ERROR = 0.005  # what remains of relative error however much was measured
OUTLIER = 4.0  # a tick further off than so many deviations counts as one that far off
FORGETTING = 0.995  # weight of the past at each new tick: speeds drift
HISTORY = 200  # finished tasks remembered for each tenant and shape
PRIOR_TASKS = 4.0  # weight of the prior share of early exits, in tasks


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a tick runs."""

    backbone: str
    gpu_kind: str
    gpus: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a task has to do, all trials to their ends: `ticks` of `tokens` tokens and `lora_ranks` summed ranks each.

    `evaluation_tokens` go forward only; `checkpoints` are written.
    """

    ticks: float
    tokens: float
    lora_ranks: float
    evaluation_tokens: float = 0.0
    checkpoints: float = 0.0


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of hardware before anything was measured there. A forward pass costs a third of a step."""

    seconds_per_tick: float = 0.05
    seconds_per_token: float = 1e-4
    seconds_per_lora_rank: float = 1e-5
    start_s: float = 30.0
    checkpoint_s: float = 2.0


@dataclass(slots=True)
class _TickModel:
    """Recursive least squares for seconds = weights . (1, tokens, ranks), errors relative to the prediction."""

    weights: list[float]
    covariance: list[list[float]]
    squared_error: float = PRIOR_SPREAD**2
    ticks: int = 0

    def predict(self, features: tuple[float, float, float]) -> float:
        raw = sum(weight * value for weight, value in zip(self.weights, features, strict=True))
        return max(raw, 1e-9)

    def learn(self, features: tuple[float, float, float], seconds: float) -> None:
        predicted = self.predict(features)
        if self.ticks == 0:
            # The prior knows the shape, the first tick the speed of this machine.
            scale = seconds / predicted
            self.weights = [weight * scale for weight in self.weights]
            self.covariance = [[cell * scale * scale for cell in row] for row in self.covariance]
            self.squared_error = 0.1**2
            self.ticks = 1
            return
        deviation = math.sqrt(self.squared_error)
        error = max(-OUTLIER * deviation, min(OUTLIER * deviation, (seconds - predicted) / predicted))
        scaled = [value / predicted for value in features]
        gained = [sum(row[j] * scaled[j] for j in range(3)) for row in self.covariance]
        denominator = FORGETTING * max(self.squared_error, 1e-6) + sum(scaled[i] * gained[i] for i in range(3))
        gain = [value / denominator for value in gained]
        self.weights = [weight + factor * error for weight, factor in zip(self.weights, gain, strict=True)]
        self.covariance = [
            [(self.covariance[i][j] - gain[i] * gained[j]) / FORGETTING for j in range(3)] for i in range(3)
        ]
        self.ticks += 1
        rate = max(1.0 / self.ticks, 1.0 - FORGETTING)
        self.squared_error += rate * (error * error - self.squared_error)

    def spread(self, features: tuple[float, float, float], ticks: float) -> float:
        """Return the relative standard deviation of the mean of `ticks` future ticks."""
        if self.ticks == 0:
            return PRIOR_SPREAD
        scaled = [value / self.predict(features) for value in features]
        of_mean = sum(scaled[i] * self.covariance[i][j] * scaled[j] for i in range(3) for j in range(3))
        return math.sqrt(MODEL_ERROR**2 + max(0.0, of_mean) + self.squared_error / max(1.0, ticks))


@dataclass
class DurationModel:
    """Predicts and learns. Plain state, no clock: the caller says what was measured."""

    prior: Prior = field(default_factory=Prior)
    early_exit_prior: float = 0.5  # share of the work that is done where nothing is known of a tenant's searches
    _ticks: dict[Hardware, _TickModel] = field(default_factory=dict)
    _shares: dict[tuple[str, str], deque[float]] = field(default_factory=dict)

    def observe_tick(self, hardware: Hardware, tokens: float, lora_ranks: float, seconds: float) -> None:
        """Learn from one measured tick. Figures that cannot be are ignored."""
        if not (math.isfinite(seconds) and seconds > 0 and tokens >= 0 and lora_ranks >= 0):
            return
        self._model(hardware).learn((1.0, tokens, lora_ranks), seconds)

    def observe_finished(self, tenant: str, shape: str, share_done: float) -> None:
        """Learn what share of its full work a finished search of this shape did before its trials had exited."""
        if 0.0 < share_done <= 1.0:
            self._shares.setdefault((tenant, shape), deque(maxlen=HISTORY)).append(share_done)

    def predict(
        self, hardware: Hardware, work: Work, tenant: str = "", shape: str = "", early_exit: bool = True
    ) -> Duration:
        """Return how long `work` takes on `hardware`."""
        model = self._model(hardware)
        features = (1.0, work.tokens, work.lora_ranks)
        per_token = model.weights[1]
        fixed = self.prior.start_s + work.checkpoints * self.prior.checkpoint_s
        full = work.ticks * model.predict(features) + work.evaluation_tokens * max(per_token, 0.0) / 3.0
        share, share_low, share_high = self._share(tenant, shape) if early_exit else (1.0, 1.0, 1.0)
        spread = model.spread(features, work.ticks * share)
        expected = fixed + full * share
        # The two sources of error are independent: their logarithms add in quadrature, side by side.
        below = math.hypot(Z90 * spread, math.log(share / share_low))
        above = math.hypot(Z90 * spread, math.log(share_high / share))
        low = fixed + full * share * math.exp(-below)
        high = fixed + full * share * math.exp(above)
        return Duration(expected, max(expected, fixed + full * math.exp(Z90 * spread)), low, high)

    def remaining(
        self, hardware: Hardware, work: Work, done_share: float, elapsed_s: float, tenant: str = "", shape: str = ""
    ) -> Duration:
        """Return what is left of a running task that has done `done_share` of the full work in `elapsed_s`.

        The measured speed of this run counts the more, the more it has done. The expectation is never below 1 % of what
        has elapsed: a task that outlives its prediction is late, not over.
        """
        before = self.predict(hardware, work, tenant, shape)
        if done_share <= 0.0 or elapsed_s <= 0.0:
            return before
        done_share = min(done_share, 1.0)
        share, _, share_high = self._share(tenant, shape)
        fixed = self.prior.start_s + work.checkpoints * self.prior.checkpoint_s
        learned_full = max(before.expected_s - fixed, 0.0) / share
        measured_full = max(elapsed_s - self.prior.start_s, 0.1 * elapsed_s) / done_share
        trust = done_share / (done_share + 0.05)
        full = (1.0 - trust) * learned_full + trust * measured_full
        floor = 0.01 * elapsed_s
        # Who has done more than the usual share is one of those that run longer.
        expected_share = share if done_share < share else 0.5 * (done_share + 1.0)
        left = max(floor, full * max(0.0, expected_share - done_share))
        upper = max(left, full * (1.0 - done_share))
        width = Z90 * math.hypot(
            MODEL_ERROR, (1.0 - trust) * self._model(hardware).spread((1.0, work.tokens, work.lora_ranks), work.ticks)
        )
        high = max(left, full * max(0.0, max(share_high, expected_share) - done_share)) * math.exp(width)
        return Duration(left, upper, left * math.exp(-width), high)

    def _model(self, hardware: Hardware) -> _TickModel:
        found = self._ticks.get(hardware)
        if found is None:
            found = self._ticks[hardware] = self._from_prior(hardware)
        return found

    def _from_prior(self, hardware: Hardware) -> _TickModel:
        # What was measured on other numbers of GPUs of the kind, scaled by their number, is a better prior than none.
        for known, model in self._ticks.items():
            if (known.backbone, known.gpu_kind) == (hardware.backbone, hardware.gpu_kind) and model.ticks:
                weights = [weight * known.gpus / hardware.gpus for weight in model.weights]
                return _TickModel(weights, _diagonal(weights))
        weights = [
            self.prior.seconds_per_tick,
            self.prior.seconds_per_token / hardware.gpus,
            self.prior.seconds_per_lora_rank / hardware.gpus,
        ]
        return _TickModel(weights, _diagonal(weights))

    def _share(self, tenant: str, shape: str) -> tuple[float, float, float]:
        """Return the expected share of the work that is done, and the ends of its 90 % interval."""
        seen = sorted(self._shares.get((tenant, shape)) or self._of_tenant(tenant))
        if not seen:
            return self.early_exit_prior, max(0.05, 0.4 * self.early_exit_prior), 1.0
        mean = (sum(seen) + PRIOR_TASKS * self.early_exit_prior) / (len(seen) + PRIOR_TASKS)
        # Order statistics of the history and one more: with few seen, the ends lie outside of what was seen.
        low = _quantile(seen, 0.05, 0.5 * min(seen[0], mean))
        high = _quantile(seen, 0.95, 1.0)
        return mean, min(low, mean), max(high, mean)

    def _of_tenant(self, tenant: str) -> list[float]:
        return [share for (name, _), shares in self._shares.items() if name == tenant for share in shares]


def _diagonal(weights: list[float]) -> list[list[float]]:
    return [[(weights[i] * 0.5) ** 2 if i == j else 0.0 for j in range(3)] for i in range(3)]


def _quantile(ordered: list[float], share: float, beyond: float) -> float:
    """Return the `share` quantile as an order statistic of n + 1 draws; `beyond` where it lies outside the sample."""
    position = share * (len(ordered) + 1) - 1.0
    if position < 0 or position > len(ordered) - 1:
        return beyond
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
