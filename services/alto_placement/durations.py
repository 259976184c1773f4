"""How long a task takes: learned from measured ticks, with a prior before there are any.

    seconds = start + training (see `tick_model`) + evaluations + checkpoints

The training's coefficients belong to a (backbone, GPU kind, GPUs). Early exits shorten the work by a share that is
learned for each tenant and shape of search (see `exit_shares`). A prediction is an upper bound (nobody exits), an
expectation and a 90 % interval; it is corrected while the task runs and nothing is ever stopped because it was wrong.
The interval's two sources are the share and the speed. The speed's width is how far whole runs were from what had been
predicted for just the work they did: ticks of one run are slow or fast together, their own noise would be too narrow.
Source: EVIDENCE (Placement), point 7: predict on tokens, keep upper bound, expectation and interval.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alto_placement.exit_shares import ExitShares, Share, quantile
from alto_placement.planner.model import Duration
from alto_placement.tick_model import Features, TickModel

Z90 = 1.645  # half a 90 % interval of a normal distribution, in standard deviations
# A training token costs about 4 floating-point operations a weight: forward, and backward for activations alone.
OPERATIONS_PER_TOKEN_AND_WEIGHT = 4.0
# Sustained operations a second of one worker place, before anything has been measured there.
PRIOR_OPERATIONS_PER_S = {"cpu": 3e10}
PRIOR_GPU_OPERATIONS_PER_S = 1e14
# Tokens on a tick above which it gets no faster; what executors choose where memory allows.
PRIOR_TOKENS_PER_TICK = {"cpu": 1024.0}
PRIOR_GPU_TOKENS_PER_TICK = 8192.0
LEAST_PARAMETERS = 1_000_000
# What a tick costs beside its tokens, and a lora_rank on it, as shares of a full tick and of a token.
PRIOR_TICK_SHARE = 0.05
PRIOR_RANK_TOKENS = 0.2
PRIOR_EVALUATION_SHARE = 0.4  # of what a token costs in training; it goes forward only
PRIOR_START_S = 15.0  # interpreter, libraries, backbone, data
NEWEST_WEIGHT = 0.3
FULL_TICK_FADES = 0.995  # the fullest tick seen counts a little less with each window after it
RUNS = 200  # whole runs whose errors are remembered for each kind of hardware
ENOUGH_RUNS = 20  # their own quantiles are believed from here on
PRIOR_RUN_ERROR, PRIOR_RUNS = 0.1, 4.0
TRUSTED_TICKS = 20.0  # a run's own pace counts half after so many ticks
OVERSTAY = 0.01  # of what has elapsed: a task that outlives its prediction is late, not over
LEAST_LEFT = 1e-6  # of the full work: what has done all of it has yet to say so


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a tick runs. `parameters` of the backbone serve the prior only."""

    backbone: str
    gpu_kind: str
    gpus: int
    parameters: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained, all trials to their ends: tokens in all, steps of the longest trial, tokens evaluated.

    `lora_rank_steps` sums lora_rank over the steps of every trial.
    """

    train_tokens: float
    longest_steps: float
    lora_rank_steps: float = 0.0
    evaluation_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run has done and the seconds of each part, from its start on; see MeasuredWork in the contract."""

    ticks: float = 0.0
    train_tokens: float = 0.0
    lora_rank_ticks: float = 0.0
    training_s: float = 0.0
    evaluation_tokens: float = 0.0
    evaluation_s: float = 0.0
    checkpoints: int = 0
    checkpoint_s: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return self.training_s + self.evaluation_s + self.checkpoint_s

    @property
    def training(self) -> Features:
        """What the training was made of."""
        return self.ticks, self.train_tokens, self.lora_rank_ticks

    def since(self, before: Measured) -> Measured:
        """Return what was done after `before`; everything when the run has begun anew since."""
        if any(getattr(before, name) > getattr(self, name) for name in self.__dataclass_fields__):
            return self
        return Measured(
            self.ticks - before.ticks,
            self.train_tokens - before.train_tokens,
            self.lora_rank_ticks - before.lora_rank_ticks,
            self.training_s - before.training_s,
            self.evaluation_tokens - before.evaluation_tokens,
            self.evaluation_s - before.evaluation_s,
            self.checkpoints - before.checkpoints,
            self.checkpoint_s - before.checkpoint_s,
        )


NOTHING_DONE = Measured()


@dataclass(slots=True)
class HardwareModel:
    """All that is known of one kind of hardware. `fullest` are the tokens of a tick that has as many as it can."""

    training: TickModel
    fullest: float
    evaluation_token_s: float
    overhead: float = 0.0  # checkpoints, as a share of training
    start_s: float = PRIOR_START_S
    evaluated: bool = False
    is_full_known: bool = False
    run_errors: deque[float] = field(default_factory=lambda: deque(maxlen=RUNS))

    def features(self, work: Work, fullest: float | None = None) -> Features:
        """Return the ticks that `work` takes, its tokens, and the lora_ranks on those ticks."""
        steps = max(1.0, work.longest_steps)
        ticks = max(steps, work.train_tokens / max(1.0, fullest or self.fullest))
        return ticks, work.train_tokens, work.lora_rank_steps * ticks / steps

    def seconds(self, training: Features, evaluation_tokens: float) -> float:
        """Return the seconds of training and evaluating, and of the checkpoints meanwhile."""
        evaluation_s = evaluation_tokens * self.evaluation_token_s
        return self.training.seconds(training) * (1.0 + self.overhead) + evaluation_s

    def learn(self, done: Measured) -> None:
        """Learn from a window of a run."""
        self.training.learn(done.training, done.training_s)
        if done.ticks > 0 and done.training_s > 0:
            full = done.train_tokens / done.ticks
            self.fullest = max(full, self.fullest * FULL_TICK_FADES if self.is_full_known else full)
            self.is_full_known = True
            self.overhead += NEWEST_WEIGHT * (min(1.0, done.checkpoint_s / done.training_s) - self.overhead)
        if done.evaluation_tokens > 0 and done.evaluation_s > 0:
            cost = done.evaluation_s / done.evaluation_tokens
            self.evaluation_token_s += (NEWEST_WEIGHT if self.evaluated else 1.0) * (cost - self.evaluation_token_s)
            self.evaluated = True

    def error_interval(self, training: Features) -> tuple[float, float]:
        """Return the ends of the 90 % interval of the logarithm of true over predicted speed."""
        errors = sorted(self.run_errors)
        if len(errors) >= ENOUGH_RUNS:
            low, high = quantile(errors, 0.05, errors[0]), quantile(errors, 0.95, errors[-1])
        else:
            squares = sum(error * error for error in errors) + PRIOR_RUNS * PRIOR_RUN_ERROR**2
            high = Z90 * math.sqrt(squares / (len(errors) + PRIOR_RUNS))
            low = -high
        of_model = Z90 * self.training.uncertainty(training)
        # What runs were off by holds their model's uncertainty already; a model that knows less than that is wider.
        return min(low, -of_model), max(high, of_model)

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "training": self.training.state(),
            "fullest": self.fullest,
            "evaluation_token_s": self.evaluation_token_s,
            "overhead": self.overhead,
            "start_s": self.start_s,
            "evaluated": self.evaluated,
            "is_full_known": self.is_full_known,
            "run_errors": list(self.run_errors),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> HardwareModel:
        """Return the model that `state` describes. Raises TypeError, KeyError, ValueError for what is none."""
        model = cls(
            **{
                **state,
                "training": TickModel(**state["training"]),
                "run_errors": deque(state["run_errors"], maxlen=RUNS),
            }
        )
        tried = model.seconds((1.0, model.fullest, 1.0), 1.0), *model.error_interval((1.0, model.fullest, 1.0))
        if not all(map(math.isfinite, tried)) or tried[0] <= 0:
            raise ValueError(f"a model that predicts {tried} s")
        return model


@dataclass
class DurationModel:
    """Predicts and learns. Plain state, no clock: the caller says what was measured.

    `shares` of finished searches are of the time that was predicted for all of their work, so that sizes which were
    estimated wrongly are corrected, too; `trained` are of their samples.
    """

    shares: ExitShares = field(default_factory=ExitShares)
    trained: ExitShares = field(default_factory=ExitShares)
    hardware: dict[Hardware, HardwareModel] = field(default_factory=dict)

    def observe(self, hardware: Hardware, done: Measured) -> None:
        """Learn from a window of a run: what it did, and the seconds of each part."""
        self.model(hardware).learn(done)

    def observe_start(self, hardware: Hardware, seconds: float) -> None:
        """Learn how long a run takes that neither trains nor evaluates nor writes: its start."""
        model = self.model(hardware)
        model.start_s += NEWEST_WEIGHT * (max(0.0, seconds) - model.start_s)

    def observe_run(self, hardware: Hardware, predicted_s: float, actual_s: float) -> None:
        """Learn how far a whole run was from what had been predicted, when it began, for just the work it then did."""
        if predicted_s > 0 and actual_s > 0:
            self.model(hardware).run_errors.append(math.log(actual_s / predicted_s))

    def observe_share(self, hardware: Hardware, work: Work, done: Measured, tenant: str, shape: str) -> None:
        """Learn what share of its full work a search did that has come to its natural end."""
        model = self.model(hardware)
        full = model.seconds(model.features(work), work.evaluation_tokens)
        self.shares.observe(tenant, shape, model.seconds(done.training, done.evaluation_tokens) / full)

    def predict(
        self, hardware: Hardware, work: Work, tenant: str = "", shape: str = "", prior_share: float = 1.0
    ) -> Duration:
        """Return how long `work` takes on `hardware`; `prior_share` of it where nothing is known of such searches."""
        model = self.model(hardware)
        training = model.features(work)
        full = model.seconds(training, work.evaluation_tokens)
        share = self.shares.expect(tenant, shape, prior_share)
        return _duration(model.start_s, full, share, full * max(1.0, share.high), model.error_interval(training))

    def remaining(
        self,
        hardware: Hardware,
        work: Work,
        left: Work,
        done: Measured,
        trained_share: float = 0.0,
        tenant: str = "",
        shape: str = "",
        prior_share: float = 1.0,
    ) -> Duration:
        """Return what is left of a running task: at most `left`, all of `work` but what is done or has exited.

        `done` is this attempt's, `trained_share` that of all. The pace of this run counts the more, the more it has
        done. The expectation is never below 1 % of what has elapsed.
        """
        model = self.model(hardware)
        training = model.features(left)
        most = model.seconds(training, left.evaluation_tokens)
        so_far = model.seconds(done.training, done.evaluation_tokens)
        trust = done.ticks / (done.ticks + TRUSTED_TICKS)
        pace = (done.seconds / so_far) ** trust if done.seconds > 0 and so_far > 0 else 1.0
        # In samples, as the node counts them: what is left at most is known, only who of it exits is not.
        most_share = max(LEAST_LEFT, left.train_tokens / max(1.0, work.train_tokens))
        share = self.trained.expect(tenant, shape, prior_share, trained_share)
        least = max(LEAST_LEFT, OVERSTAY * done.seconds / (most * pace))
        left_share = Share(
            *(
                max(least, min(1.0, (total - trained_share) / most_share))
                for total in (share.expected, share.low, share.high)
            )
        )
        low, high = model.error_interval(training)
        low, high = (end * (1.0 - 0.5 * trust) for end in (low, high))
        return _duration(0.0, most * pace, left_share, most * max(1.0, least) * pace, (low, high))

    def throughput_share(self, hardware: Hardware, work: Work) -> float:
        """Return how fast `work` is alone, in tokens a second, as a share of full ticks' speed; in (0, 1].

        What nobody has filled yet is taken to be as large as executors choose where memory allows.
        """
        model = self.model(hardware)
        fullest = max(model.fullest, _prior_fullest(hardware))
        ticks, tokens, lora_ranks = model.features(work, fullest)
        full_s = model.training.seconds((1.0, fullest, lora_ranks / ticks))
        alone_s = model.training.seconds((ticks, tokens, lora_ranks))
        return min(1.0, max(LEAST_LEFT, tokens / alone_s * full_s / fullest))

    def model(self, hardware: Hardware) -> HardwareModel:
        """Return what is known of hardware: measured, else a guess from what is most like it."""
        found = self.hardware.get(hardware)
        if found is None:
            found = self.hardware[hardware] = self._guess(hardware)
        return found

    def is_measured(self, hardware: Hardware) -> bool:
        """Return whether anything was measured on just this hardware."""
        return hardware in self.hardware and self.hardware[hardware].training.ticks > 0

    def _guess(self, hardware: Hardware) -> HardwareModel:
        """Scale a prior by how far it was off on what has been measured of the backbone, else of the GPU kind."""
        guess = _prior(hardware)
        measured = [(known, model) for known, model in self.hardware.items() if model.training.ticks > 0]
        alike = [one for one in measured if one[0].backbone == hardware.backbone] or [
            one for one in measured if one[0].gpu_kind == hardware.gpu_kind and hardware.parameters
        ]
        if alike:
            work = (1.0, guess.fullest, 0.0)
            factors = [
                math.log(model.training.seconds(work) / _prior(known).training.seconds(work)) for known, model in alike
            ]
            factor = math.exp(sum(factors) / len(factors))
            guess.training = TickModel.prior(_scaled(guess.training.weights, factor))
            guess.evaluation_token_s *= factor
            guess.start_s = sum(model.start_s for _, model in alike) / len(alike)
        return guess


def _prior(hardware: Hardware) -> HardwareModel:
    operations = PRIOR_OPERATIONS_PER_S.get(hardware.gpu_kind, PRIOR_GPU_OPERATIONS_PER_S) * hardware.gpus
    token_s = OPERATIONS_PER_TOKEN_AND_WEIGHT * max(hardware.parameters, LEAST_PARAMETERS) / operations
    fullest = _prior_fullest(hardware)
    weights = (PRIOR_TICK_SHARE * fullest * token_s, token_s, PRIOR_RANK_TOKENS * token_s)
    return HardwareModel(TickModel.prior(weights), fullest, PRIOR_EVALUATION_SHARE * token_s)


def _prior_fullest(hardware: Hardware) -> float:
    return PRIOR_TOKENS_PER_TICK.get(hardware.gpu_kind, PRIOR_GPU_TOKENS_PER_TICK)


def _scaled(weights: Sequence[float], factor: float) -> Features:
    a, b, c = (weight * factor for weight in weights)
    return a, b, c


def _duration(fixed_s: float, full_s: float, share: Share, upper_s: float, error: tuple[float, float]) -> Duration:
    """Put a duration together. The share and the speed are independent: their logarithms add in quadrature."""
    expected = full_s * share.expected
    below = math.hypot(error[0], math.log(share.expected / share.low))
    above = math.hypot(error[1], math.log(share.high / share.expected))
    high = fixed_s + expected * math.exp(above)
    upper = max(fixed_s + upper_s * math.exp(error[1]), fixed_s + expected)
    return Duration(fixed_s + expected, upper, fixed_s + expected * math.exp(-below), high)
