"""What training costs: seconds and peak memory, predicted from tokens and adapters, calibrated by a short profile.

    peak bytes = the larger of loading and (fixed + adapters + the larger of training and evaluation), where
        adapters   = per_parameter x P          weights, gradient, two moments, best weights of all adapters held
        training   = per_token x T + per_token_input x I + per_token_rank x R
        evaluation = per_evaluation_token x T   no gradients, so activations do not pile up
    seconds of ticks = base x ticks + per_token x T + per_target x targets + per_squared_length x (sum of lengths^2)
                       + per_token_rank x R + per_stepped_parameter x (parameters that an optimiser step changed)

T counts tokens, R each token once for each unit of lora_rank of its adapter, I each token by the share of the layers
that its adapter adds to (`Load`). Seconds are linear, so that the sum of all loads of a run gives the run's time. The
source (arXiv 2604.05426) has fixed + tokens alone; ranks and optimiser state count as soon as adapters are many.
Coefficients start from a prior, made of the model's shape, and are fitted to measurements by least squares of the
relative errors, pulled weakly to the prior: what a profile did not vary stays what it was. Pure Python: who plans
without torch can use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from alto_common.base_models import ModelFacts, select_modules
from alto_common.tuning import TrialConfig

# fp32 weight, gradient, two moments of AdamW, and the copy of the best weights.
ADAPTER_BYTES_PER_PARAMETER = 20.0
# Activations kept for the backward pass, as a multiple of the inputs and outputs of all linear layers: 1.2 measured for
# an 8B Llama in bf16 on an H100, 1.15 for SmolLM2-135M in fp32 on a CPU. Of them, inputs of adapted layers are a part.
ACTIVATION_FACTOR = 1.2
ADAPTED_INPUT_FACTOR = 0.6
# What torch, its libraries, the chunk of logits and the gaps of the heap take beside the weights, and how many layers'
# activations a pass without gradients has at a time (measured with SmolLM2 on a CPU).
RUNTIME_BYTES = 6.5e8
EVALUATION_LAYERS = 6.0
# A forward pass without gradients, of the time of a whole training tick, when nothing was measured.
EVALUATION_SHARE = 0.5
# Tokens on a tick above which it gets no faster: matrix products are at their best speed and, on a GPU, outlast the
# host's work of launching them. What a narrow layer computes is over sooner, so there it takes more tokens, up to so
# many values of a hidden state [T, H] (measured on an H100: docs/design/010).
ENOUGH_CPU_TOKENS = 1024
ENOUGH_GPU_TOKENS = 8192
ENOUGH_GPU_VALUES = ENOUGH_GPU_TOKENS * 2304
# To move a coefficient by its whole prior value costs as much as a relative error of this size in one measurement. What
# an adapter's buffers and its low-rank activations take follows from their shapes; gaps of the heap must not be taken
# for them.
PRIOR_PULL = 1e-3
PULL_OF_THE_KNOWN = 0.3
KNOWN = frozenset({"bytes_per_parameter", "bytes_per_token_rank"})


@dataclass(frozen=True)
class Load:
    """What one tick, or all ticks of a run together, put through the backbone.

    `token_ranks` sums tokens x lora_rank, where an adapter of some layers counts by its share of the parameters that
    one of all layers has; `token_inputs` sums tokens x the share of all layers' inputs that are kept for the adapter.
    """

    ticks: float = 0.0
    tokens: float = 0.0
    targets: float = 0.0
    squared_lengths: float = 0.0
    token_ranks: float = 0.0
    token_inputs: float = 0.0
    stepped_parameters: float = 0.0

    def __add__(self, other: Load) -> Load:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Load(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def scaled(self, factor: float) -> Load:
        """Return so many times this load."""
        return Load(*(factor * value for value in dataclasses.astuple(self)))

    @classmethod
    def of(
        cls,
        facts: ModelFacts,
        adapters: Iterable[tuple[TrialConfig, float]],
        mean_length: float = 128.0,
        target_share: float = 0.5,
    ) -> Self:
        """Return the load of one tick of (configuration, tokens) pairs, one an adapter, each of which takes a step.

        The tokens lie in sequences of `mean_length`; `target_share` of them count in the loss.
        """
        pairs = [(adapter_shape(facts, config), tokens) for config, tokens in adapters]
        total = sum(tokens for _, tokens in pairs)
        return cls(
            ticks=1.0,
            tokens=total,
            targets=target_share * total,
            squared_lengths=mean_length * total,
            token_ranks=sum(shape.effective_rank * tokens for shape, tokens in pairs),
            token_inputs=sum(shape.input_share * tokens for shape, tokens in pairs),
            stepped_parameters=sum(shape.parameters for shape, _ in pairs),
        )


class AdapterShape(NamedTuple):
    """The size of one adapter: see `Load` for what the shares are of."""

    parameters: int
    effective_rank: float
    input_share: float


def adapter_shape(facts: ModelFacts, config: TrialConfig) -> AdapterShape:
    """Return the size of a configuration's adapter over a backbone."""
    widths = facts.linear_modules
    chosen = select_modules(facts, config.target_modules, config.layers)
    parameters = config.lora_rank * sum(sum(widths[name]) for name in chosen)
    everything = max(1, sum(sum(shape) for shape in widths.values()))
    inputs = max(1, sum(shape[0] for shape in widths.values()))
    return AdapterShape(parameters, parameters / everything, sum(widths[name][0] for name in chosen) / inputs)


def adapter_parameters(facts: ModelFacts, config: TrialConfig) -> int:
    """Return the trainable parameters of a configuration's adapter: lora_rank x (in + out) over its modules."""
    return adapter_shape(facts, config).parameters


def enough_tokens(on_cpu: bool, hidden_size: int) -> int:
    """Return the tokens of a tick above which it gets no faster, a power of two.

    >>> [enough_tokens(on_cpu=False, hidden_size=width) for width in (576, 1024, 4096)]
    [32768, 16384, 8192]
    """
    if on_cpu:
        return ENOUGH_CPU_TOKENS
    return max(ENOUGH_GPU_TOKENS, power_of_two_below(ENOUGH_GPU_VALUES // hidden_size))


def power_of_two_below(number: int) -> int:
    """Return the largest power of two that is not above `number`, 0 where there is none."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


@dataclass(frozen=True)
class Measurement:
    """What one tick took; `is_evaluation` for a pass without gradients. `parameters` are those of all adapters held.

    To be taken with a copy of each adapter's weights in place, since a run keeps its best.
    """

    load: Load
    parameters: float
    peak_bytes: float
    seconds: float
    is_evaluation: bool = False


class Accuracy(NamedTuple):
    """The largest relative error of a model over the measurements it was fitted to."""

    peak_bytes: float
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """The coefficients; all in bytes and seconds, none negative.

    `start_seconds` and `loading_bytes` are what comes before the first tick: interpreter, libraries, the backbone.
    """

    loading_bytes: float
    fixed_bytes: float
    bytes_per_token: float
    bytes_per_token_input: float
    bytes_per_token_rank: float
    bytes_per_parameter: float
    bytes_per_evaluation_token: float
    start_seconds: float
    base_seconds: float
    seconds_per_token: float
    seconds_per_target: float
    seconds_per_squared_length: float
    seconds_per_token_rank: float
    seconds_per_stepped_parameter: float
    evaluation_share: float = EVALUATION_SHARE

    def peak_bytes(self, training: Load, parameters: float, evaluation_tokens: float = 0.0) -> float:
        """Return the peak of a run whose largest tick is `training`.

        It holds adapters of so many parameters, and evaluates so many tokens at once.
        """
        activations = (
            self.bytes_per_token * training.tokens
            + self.bytes_per_token_input * training.token_inputs
            + self.bytes_per_token_rank * training.token_ranks
        )
        evaluation = self.bytes_per_evaluation_token * evaluation_tokens
        held = self.fixed_bytes + self.bytes_per_parameter * parameters
        return max(self.loading_bytes, held + max(activations, evaluation))

    def seconds(self, load: Load) -> float:
        """Return the time of training ticks."""
        return (
            self.base_seconds * load.ticks
            + self.seconds_per_token * load.tokens
            + self.seconds_per_target * load.targets
            + self.seconds_per_squared_length * load.squared_lengths
            + self.seconds_per_token_rank * load.token_ranks
            + self.seconds_per_stepped_parameter * load.stepped_parameters
        )

    def evaluation_seconds(self, load: Load) -> float:
        """Return the time of passes without gradients."""
        return self.evaluation_share * self.seconds(dataclasses.replace(load, stepped_parameters=0.0))

    def tokens_that_fit(self, budget_bytes: float, one_tick: Load, parameters: float) -> int:
        """Return the most tokens of a training tick within the budget, 0 if not even one fits.

        `one_tick` is a tick of any number of tokens: its mix of adapters, of so many parameters, is taken to stay.
        """
        tokens = one_tick.tokens or 1.0
        each = (
            self.bytes_per_token
            + self.bytes_per_token_input * one_tick.token_inputs / tokens
            + self.bytes_per_token_rank * one_tick.token_ranks / tokens
        )
        left = budget_bytes - self.fixed_bytes - self.bytes_per_parameter * parameters
        return max(0, int(left / each)) if each > 0 else 0

    def slots_that_fit(self, budget_bytes: float, one_tick: Load, parameters: Sequence[int]) -> int:
        """Return how many adapters fit beside a tick like this one, whatever order they come in.

        `parameters` are those of each adapter that may come; the tick is the costliest that they can make.
        """
        # Loading is over: its peak (in NF4 the dense weights) leaves no less room.
        left = budget_bytes - dataclasses.replace(self, loading_bytes=0.0).peak_bytes(one_tick, 0.0)
        slots = 0
        for size in sorted(parameters, reverse=True):
            left -= self.bytes_per_parameter * size
            if left < 0:
                break
            slots += 1
        return slots

    def accuracy(self, measurements: Iterable[Measurement]) -> Accuracy:
        """Return the largest relative errors over measurements."""
        bytes_errors, seconds_errors = [0.0], [0.0]
        for one in measurements:
            if one.is_evaluation:
                peak = self.peak_bytes(Load(), one.parameters, one.load.tokens)
                seconds = self.evaluation_seconds(one.load)
            else:
                peak, seconds = self.peak_bytes(one.load, one.parameters), self.seconds(one.load)
            bytes_errors.append(abs(peak / one.peak_bytes - 1))
            seconds_errors.append(abs(seconds / one.seconds - 1))
        return Accuracy(max(bytes_errors), max(seconds_errors))


def prior(
    facts: ModelFacts, bytes_per_value: int, flops_per_s: float, backbone_bytes: float | None = None
) -> CostModel:
    """Return the model to use before anything was measured, from the shape of the backbone.

    `bytes_per_value` is that of weights and activations (4 for fp32, 2 for bf16); `flops_per_s` what the device reaches
    in matrix products. Forward and backward of a frozen layer are 4 operations a weight and token, of an adapter 6; the
    output head is met by target tokens alone.
    """
    features = sum(width_in + width_out for width_in, width_out in facts.linear_modules.values())
    inputs = sum(width_in for width_in, _ in facts.linear_modules.values())
    weights = sum(width_in * width_out for width_in, width_out in facts.linear_modules.values())
    activations = ACTIVATION_FACTOR * features * bytes_per_value
    kept_inputs = ADAPTED_INPUT_FACTOR * inputs * bytes_per_value
    backbone = float(facts.parameters * bytes_per_value) if backbone_bytes is None else backbone_bytes
    return CostModel(
        loading_bytes=backbone + RUNTIME_BYTES,
        fixed_bytes=backbone + RUNTIME_BYTES,
        bytes_per_token=activations - kept_inputs,
        bytes_per_token_input=kept_inputs,
        bytes_per_token_rank=2.0 * bytes_per_value * len(facts.linear_modules),
        bytes_per_parameter=ADAPTER_BYTES_PER_PARAMETER,
        bytes_per_evaluation_token=EVALUATION_LAYERS * activations / max(1, facts.layers),
        start_seconds=10.0,
        base_seconds=1e-3,
        seconds_per_token=4.0 * weights / flops_per_s,
        seconds_per_target=4.0 * facts.vocabulary * facts.hidden_size / flops_per_s + 1e-9,
        seconds_per_squared_length=6.0 * facts.layers * facts.hidden_size / flops_per_s,
        seconds_per_token_rank=6.0 * features / flops_per_s,
        # An optimiser step reads and writes memory some forty times the size of a weight.
        seconds_per_stepped_parameter=100.0 / flops_per_s,
    )


def fit(start: CostModel, measurements: Sequence[Measurement]) -> CostModel:
    """Return the coefficients that explain the measurements best; `start` is a prior, or an earlier fit."""
    training = [one for one in measurements if not one.is_evaluation]
    evaluation = [one for one in measurements if one.is_evaluation]
    memory_names = (
        "fixed_bytes",
        "bytes_per_token",
        "bytes_per_token_input",
        "bytes_per_token_rank",
        "bytes_per_parameter",
        "bytes_per_evaluation_token",
    )
    seconds_names = (
        "base_seconds",
        "seconds_per_token",
        "seconds_per_target",
        "seconds_per_squared_length",
        "seconds_per_token_rank",
        "seconds_per_stepped_parameter",
    )
    memory = _least_squares(
        [(_memory_row(one), one.peak_bytes) for one in measurements],
        [getattr(start, name) for name in memory_names],
        [PULL_OF_THE_KNOWN if name in KNOWN else PRIOR_PULL for name in memory_names],
    )
    seconds = _least_squares(
        [(_seconds_row(one.load), one.seconds) for one in training],
        [getattr(start, name) for name in seconds_names],
        [PRIOR_PULL] * len(seconds_names),
    )
    found = dict(zip((*memory_names, *seconds_names), (*memory, *seconds), strict=True))
    model = dataclasses.replace(start, **found)
    if not evaluation:
        return model
    whole = [dataclasses.replace(model, evaluation_share=1.0).evaluation_seconds(one.load) for one in evaluation]
    shares = [one.seconds / seconds for one, seconds in zip(evaluation, whole, strict=True)]
    return dataclasses.replace(model, evaluation_share=sum(shares) / len(shares))


def _memory_row(one: Measurement) -> list[float]:
    load, evaluates = one.load, float(one.is_evaluation)
    trains = 1.0 - evaluates
    return [
        1.0,
        trains * load.tokens,
        trains * load.token_inputs,
        trains * load.token_ranks,
        one.parameters,
        evaluates * load.tokens,
    ]


def _seconds_row(load: Load) -> list[float]:
    return [
        load.ticks,
        load.tokens,
        load.targets,
        load.squared_lengths,
        load.token_ranks,
        load.stepped_parameters,
    ]


def _least_squares(rows: Sequence[tuple[list[float], float]], start: list[float], pulls: list[float]) -> list[float]:
    """Minimise relative errors plus the pull of each coefficient to `start`, with none below 0.

    A coefficient that would be negative is held at 0 and the others are fitted again, until none is.
    """
    free = [index for index, value in enumerate(start) if value > 0]
    while True:
        # In units of the prior (x = coefficient / start) the numbers are of one size, and the pull is to 1.
        scaled = [([row[index] * start[index] / target for index in free], 1.0) for row, target in rows]
        scaled += [([pulls[index] * (index == other) for other in free], pulls[index]) for index in free]
        solution = _solve_normal_equations(scaled, len(free))
        negative = [index for index, value in zip(free, solution, strict=True) if value < 0]
        if not negative:
            found = [0.0] * len(start)
            for index, value in zip(free, solution, strict=True):
                found[index] = value * start[index]
            return found
        free = [index for index in free if index not in negative]


def _solve_normal_equations(rows: Sequence[tuple[list[float], float]], size: int) -> list[float]:
    """Solve (R^T R) x = R^T y by Gaussian elimination with pivoting; the pull makes the matrix regular."""
    matrix = [
        [sum(row[i] * row[j] for row, _ in rows) for j in range(size)] + [sum(row[i] * target for row, target in rows)]
        for i in range(size)
    ]
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(matrix[index][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        for other in range(size):
            if other != column:
                factor = matrix[other][column] / matrix[column][column]
                matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[column], strict=True)]
    return [matrix[index][size] / matrix[index][index] for index in range(size)]
