"""What a tick costs: peak memory and seconds, predicted from tokens and adapters, calibrated by a short profile.

    peak bytes = fixed + adapters + the larger of training and evaluation, where
        adapters   = per_parameter x P          weights, gradient, two moments, best weights: all adapters in slots
        training   = per_token x T + per_token_rank x sum over adapters of (its tokens x its lora_rank)
        evaluation = per_evaluation_token x T   no gradients, so activations do not pile up
    seconds    = base + per_token x T + per_rank x sum of the lora_ranks on the tick

T counts the tokens of one tick. The source (arXiv 2604.05426) has fixed + tokens alone; ranks and optimiser state count
as soon as adapters are many. Coefficients start from a prior, made of the model's shape, and are fitted to measurements
by least squares of the relative errors, pulled weakly to the prior: what a profile did not vary stays what it was. Pure
Python: a planner without torch can use it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from alto_common.base_models import ModelFacts, select_modules
from alto_common.tuning import TrialConfig

# fp32 weight, gradient, two moments of AdamW, and the copy of the best weights.
ADAPTER_BYTES_PER_PARAMETER = 20.0
# Activations kept for the backward pass, as a multiple of the inputs and outputs of all linear layers: 1.2 measured for
# an 8B Llama in bf16 on an H100, 1.33 for SmolLM2-135M in fp32 on a CPU.
ACTIVATION_FACTOR = 1.3
# What torch, its libraries and the chunk of logits take beside the weights (measured with SmolLM2 on a CPU).
RUNTIME_BYTES = 4.3e8
# To move a coefficient by its whole prior value costs as much as a relative error of this size in one measurement.
PRIOR_PULL = 1e-3


@dataclass(frozen=True)
class Load:
    """One tick: its tokens, the sum over adapters of tokens x lora_rank, of lora_rank, and of trainable parameters.

    `adapter_parameters` counts all adapters that are in slots, on this tick or not.
    """

    tokens: int
    token_ranks: int
    ranks: int
    adapter_parameters: int

    @classmethod
    def of(cls, facts: ModelFacts, adapters: Iterable[tuple[TrialConfig, int]]) -> Load:
        """Return the load of (configuration, tokens on the tick) pairs, one an adapter."""
        adapters = list(adapters)
        return cls(
            tokens=sum(tokens for _, tokens in adapters),
            token_ranks=sum(config.lora_rank * tokens for config, tokens in adapters),
            ranks=sum(config.lora_rank for config, _ in adapters),
            adapter_parameters=sum(adapter_parameters(facts, config) for config, _ in adapters),
        )


@dataclass(frozen=True)
class Measurement:
    """What one tick took; `is_evaluation` for a pass without gradients.

    To be taken with a copy of each adapter's weights in place, since a run keeps its best.
    """

    load: Load
    peak_bytes: float
    seconds: float
    is_evaluation: bool = False


class Accuracy(NamedTuple):
    """The largest relative error of a model over the measurements it was fitted to."""

    peak_bytes: float
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """The coefficients; all in bytes and seconds, none negative."""

    fixed_bytes: float
    bytes_per_token: float
    bytes_per_token_rank: float
    bytes_per_parameter: float
    bytes_per_evaluation_token: float
    base_seconds: float
    seconds_per_token: float
    seconds_per_rank: float

    def peak_bytes(self, training: Load, evaluation_tokens: int = 0) -> float:
        """Return the peak of a run whose largest tick is `training` and which evaluates so many tokens at once."""
        return (
            self.fixed_bytes
            + self.bytes_per_parameter * training.adapter_parameters
            + max(
                self.bytes_per_token * training.tokens + self.bytes_per_token_rank * training.token_ranks,
                self.bytes_per_evaluation_token * evaluation_tokens,
            )
        )

    def seconds(self, load: Load) -> float:
        """Return the time of one training tick."""
        return self.base_seconds + self.seconds_per_token * load.tokens + self.seconds_per_rank * load.ranks

    def tokens_that_fit(self, budget_bytes: float, adapters: Load) -> int:
        """Return the most tokens of a training tick within the budget, 0 if not even one fits.

        `adapters` is the load of the adapters at any token count: its mix of ranks is taken to stay the same.
        """
        mean_rank = adapters.token_ranks / adapters.tokens if adapters.tokens else 0.0
        each = self.bytes_per_token + self.bytes_per_token_rank * mean_rank
        left = budget_bytes - self.fixed_bytes - self.bytes_per_parameter * adapters.adapter_parameters
        return max(0, int(left / each)) if each > 0 else 0

    def slots_that_fit(self, budget_bytes: float, tokens: int, parameters: Sequence[int], lora_rank: int) -> int:
        """Return how many adapters fit beside a tick of `tokens`, whatever order they come in.

        `parameters` are those of each adapter that may come, `lora_rank` the largest among them.
        """
        activations = (self.bytes_per_token + self.bytes_per_token_rank * lora_rank) * tokens
        left = budget_bytes - self.fixed_bytes - activations
        slots = 0
        for size in sorted(parameters, reverse=True):
            left -= self.bytes_per_parameter * size
            if left < 0:
                break
            slots += 1
        return slots

    def accuracy(self, measurements: Iterable[Measurement]) -> Accuracy:
        """Return the largest relative errors over measurements; seconds of training ticks only."""
        bytes_errors, seconds_errors = [0.0], [0.0]
        for one in measurements:
            predicted = (
                self.peak_bytes(dataclasses.replace(one.load, tokens=0, token_ranks=0), one.load.tokens)
                if one.is_evaluation
                else self.peak_bytes(one.load)
            )
            bytes_errors.append(abs(predicted / one.peak_bytes - 1))
            if not one.is_evaluation:
                seconds_errors.append(abs(self.seconds(one.load) / one.seconds - 1))
        return Accuracy(max(bytes_errors), max(seconds_errors))


def adapter_parameters(facts: ModelFacts, config: TrialConfig) -> int:
    """Return the trainable parameters of a configuration's adapter: lora_rank x (in + out) over its modules."""
    chosen = select_modules(facts, config.target_modules, config.layers)
    return sum(config.lora_rank * sum(facts.linear_modules[name]) for name in chosen)


def prior(facts: ModelFacts, bytes_per_value: int, flops_per_s: float) -> CostModel:
    """Return the model to use before anything was measured, from the shape of the backbone.

    `bytes_per_value` is that of weights and activations (4 for fp32, 2 for bf16); `flops_per_s` what the device reaches
    in matrix products. Forward and backward of a frozen backbone are 4 operations a weight and token.
    """
    features = sum(width_in + width_out for width_in, width_out in facts.linear_modules.values())
    activations = ACTIVATION_FACTOR * features * bytes_per_value
    return CostModel(
        fixed_bytes=facts.parameters * bytes_per_value + RUNTIME_BYTES,
        bytes_per_token=activations,
        bytes_per_token_rank=2.0 * bytes_per_value * len(facts.linear_modules),
        bytes_per_parameter=ADAPTER_BYTES_PER_PARAMETER,
        bytes_per_evaluation_token=2.0 * activations / max(1, facts.layers),
        base_seconds=1e-3,
        seconds_per_token=4.0 * facts.parameters / flops_per_s,
        seconds_per_rank=1e-5,
    )


def calibration_loads(facts: ModelFacts, most_tokens: int, configs: Sequence[TrialConfig]) -> list[Load]:
    """Return the training ticks that a profile should measure: each coefficient is seen at two sizes at least.

    A quarter, half and all of the tokens, with the smallest configuration alone and with all of them in equal parts.
    Between two ticks, freed memory must go back to the system (glibc: malloc_trim) and the peak be reset.
    """
    smallest = min(configs, key=lambda config: adapter_parameters(facts, config))
    loads = []
    for tokens in (most_tokens // 4, most_tokens // 2, most_tokens):
        loads.append(Load.of(facts, [(smallest, tokens)]))
        loads.append(Load.of(facts, [(config, tokens // len(configs)) for config in configs]))
    return loads


def fit(start: CostModel, measurements: Sequence[Measurement]) -> CostModel:
    """Return the coefficients that explain the measurements best; `start` is a prior, or an earlier fit."""
    training = [one for one in measurements if not one.is_evaluation]
    evaluation = [one for one in measurements if one.is_evaluation]
    memory = _least_squares(
        [_row(one, one.peak_bytes) for one in training] + [_row(one, one.peak_bytes) for one in evaluation],
        [
            start.fixed_bytes,
            start.bytes_per_token,
            start.bytes_per_token_rank,
            start.bytes_per_parameter,
            start.bytes_per_evaluation_token,
        ],
    )
    seconds = _least_squares(
        [([1.0, one.load.tokens, one.load.ranks], one.seconds) for one in training],
        [start.base_seconds, start.seconds_per_token, start.seconds_per_rank],
    )
    return CostModel(*memory, *seconds)


def _row(one: Measurement, target: float) -> tuple[list[float], float]:
    load, evaluates = one.load, float(one.is_evaluation)
    trains = 1.0 - evaluates
    features = [
        1.0,
        trains * load.tokens,
        trains * load.token_ranks,
        float(load.adapter_parameters),
        evaluates * load.tokens,
    ]
    return features, target


def _least_squares(rows: Sequence[tuple[list[float], float]], start: list[float]) -> list[float]:
    """Minimise relative errors plus the weak pull to `start`, with no coefficient below 0.

    A coefficient that would be negative is held at 0 and the others are fitted again, until none is.
    """
    free = [index for index, value in enumerate(start) if value > 0]
    while True:
        # In units of the prior (x = coefficient / start) the numbers are of one size, and the pull is to 1.
        scaled = [([row[index] * start[index] / target for index in free], 1.0) for row, target in rows]
        scaled += [
            ([PRIOR_PULL * (index == other) for other in range(len(free))], PRIOR_PULL) for index in range(len(free))
        ]
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


@dataclass(frozen=True)
class CalibrationKey:
    """What a calibration holds for: the model (its location or a hash), the kind of device, and how it computes."""

    model: str
    device_kind: str
    backbone_dtype: str
    recompute: bool

    @property
    def file_name(self) -> str:
        """The name of the cache file."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest() + ".json"


def load_calibration(folder: Path, key: CalibrationKey) -> CostModel | None:
    """Return the model saved for `key`, None if there is none that can be read."""
    try:
        return CostModel(**json.loads((folder / key.file_name).read_text())["model"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save_calibration(folder: Path, key: CalibrationKey, model: CostModel) -> None:
    """Keep a calibrated model for `key`; readers see the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"key": dataclasses.asdict(key), "model": dataclasses.asdict(model)}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(content))
    os.replace(file.name, folder / key.file_name)
