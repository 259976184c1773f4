"""What a whole search puts through the backbone: the sum of all its ticks, its largest tick, the adapters it holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from alto_common.base_models import ModelFacts
from alto_common.cost_model import AdapterShape, CostModel, Load, adapter_shape
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig

# Of all that an adapter holds (cost_model.ADAPTER_BYTES_PER_PARAMETER), its best weights, which it has once evaluated.
WEIGHTS_SHARE = 0.2


@dataclass(frozen=True)
class Row:
    """A row of a dataset in tokens, uncut: all of them, and those that count in the loss."""

    tokens: int
    targets: int

    def cut(self, max_length: int) -> Row:
        """Return the row as it is trained: prompts lose tokens before answers do."""
        return Row(min(self.tokens, max_length), min(self.targets, max_length - 1))


@dataclass(frozen=True)
class Machine:
    """How an executor will run: slots, ticks, and whether parked adapters lie in the same memory as those in slots."""

    slots: int
    tokens_per_tick: int
    evaluation_tokens_per_tick: int
    parked_beside: bool


@dataclass(frozen=True)
class SearchLoad:
    """The work of a search. `training` and `evaluation` are sums over the run in which no trial is stopped early.

    `expected_share` of both is left after early exits; `held_parameters` are those of all adapters at the peak, in full
    equivalents of one that trains.
    """

    training: Load
    evaluation: Load
    largest_tick: Load
    largest_evaluation_tokens: float
    held_parameters: float
    expected_share: float

    def peak_bytes(self, costs: CostModel) -> float:
        """Return the peak memory of the search."""
        return costs.peak_bytes(self.largest_tick, self.held_parameters, self.largest_evaluation_tokens)

    def upper_seconds(self, costs: CostModel) -> float:
        """Return the time from the start of the process to its end when no trial is stopped early."""
        return self._seconds(costs, 1.0)

    def expected_seconds(self, costs: CostModel) -> float:
        """Return the time that the search is expected to take with its early exits."""
        return self._seconds(costs, self.expected_share)

    def _seconds(self, costs: CostModel, share: float) -> float:
        return costs.start_seconds + share * (costs.seconds(self.training) + costs.evaluation_seconds(self.evaluation))


def search_load(
    facts: ModelFacts,
    trials: Sequence[Trial],
    train: Sequence[Row],
    train_rows: int,
    validation: Sequence[Row],
    validation_rows: int,
    evaluation: Evaluation,
    early_exit: EarlyExit,
    machine: Machine,
    sequences_per_row: int = 1,
) -> SearchLoad:
    """Return the work of a search. `train` and `validation` are drawn from datasets of so many rows, or hold all.

    Where a row is a pair (DPO), `sequences_per_row` is 2 and `train` and `validation` hold each of its sequences.
    """
    shapes = [adapter_shape(facts, trial.config) for trial in trials]
    evaluated = min(validation_rows, evaluation.max_examples or validation_rows)
    longest = max(trial.config.max_length for trial in trials)
    validated = _sum_of_rows([row.cut(longest) for row in validation]).scaled(
        evaluated * sequences_per_row / len(validation)
    )
    training, evaluating = Load(), Load()
    batches = []
    lengths = {length: _Lengths.of(train, length) for length in {trial.config.max_length for trial in trials}}
    for trial, shape in zip(trials, shapes, strict=True):
        config = trial.config
        rows = lengths[config.max_length]
        sequences = config.total_samples(train_rows) * sequences_per_row
        trained = rows.sum.scaled(sequences / len(train))
        training += _with_adapter(trained, shape, config.total_steps(train_rows))
        evaluating += _with_adapter(validated.scaled(evaluation.count), shape, 0)
        batches.append(_batch(config, shape, rows, sequences_per_row))
    # Before the first tick the base model is evaluated, without any adapter; of pairs it is the reference.
    evaluating += validated
    if sequences_per_row > 1:
        evaluating += validated
        for length in lengths:
            evaluating += lengths[length].sum.scaled(train_rows * sequences_per_row / len(train))
    slots = min(machine.slots, len(trials))
    steps = sorted((trial.config.total_steps(train_rows) for trial in trials), reverse=True)
    training_ticks = max(training.tokens / machine.tokens_per_tick, sum(steps) / slots, steps[0])
    evaluation_ticks = max(1.0, evaluating.tokens / machine.evaluation_tokens_per_tick)
    return SearchLoad(
        training=training + Load(ticks=training_ticks),
        evaluation=evaluating + Load(ticks=evaluation_ticks),
        largest_tick=_largest_tick(batches, slots, machine.tokens_per_tick, training_ticks),
        # All trials that are due are evaluated together.
        largest_evaluation_tokens=min(machine.evaluation_tokens_per_tick, slots * validated.tokens),
        held_parameters=_held(
            [shape.parameters for shape in shapes], slots, evaluation, early_exit, machine.parked_beside
        ),
        expected_share=expected_share(early_exit, len(trials)),
    )


def expected_share(early_exit: EarlyExit, trials: int) -> float:
    """Return the share of the steps expected to be trained: all until warm-up ends, then those of the trials kept."""
    if early_exit.policy == "none" or trials < 2:
        return 1.0
    kept = max(1, math.ceil(early_exit.keep_fraction * trials)) / trials
    return early_exit.warmup_fraction + (1.0 - early_exit.warmup_fraction) * kept


@dataclass(frozen=True)
class _Lengths:
    """The rows of a dataset cut to one length, which many trials share: their sum, and how long they are."""

    sum: Load
    mean: float
    deviation: float
    longest: int

    @classmethod
    def of(cls, rows: Sequence[Row], max_length: int) -> _Lengths:
        cut = [row.cut(max_length) for row in rows]
        tokens = [row.tokens for row in cut]
        return cls(_sum_of_rows(cut), statistics.fmean(tokens), statistics.pstdev(tokens), max(tokens))


@dataclass(frozen=True)
class _Batch:
    """The tokens of a trial's effective batches: their mean, the largest to expect, and the longest single row."""

    shape: AdapterShape
    mean: float
    deviation: float
    longest_row: int


def _batch(config: TrialConfig, shape: AdapterShape, rows: _Lengths, sequences_per_row: int) -> _Batch:
    size = config.effective_batch_size * sequences_per_row
    return _Batch(shape, size * rows.mean, math.sqrt(size) * rows.deviation, sequences_per_row * rows.longest)


def _largest_tick(batches: Sequence[_Batch], slots: int, tokens_per_tick: int, ticks: float) -> Load:
    """Return the largest of so many ticks: the slots hold whoever has most to put on it, up to its budget."""
    largest = sorted(batches, key=lambda one: one.mean, reverse=True)[:slots]
    mean = sum(one.mean for one in largest)
    # Where the largest of n draws from a normal distribution lies (Blom 1958).
    above = statistics.NormalDist().inv_cdf(max(0.5, (ticks - 0.375) / (ticks + 0.25)))
    spread = above * math.sqrt(sum(one.deviation**2 for one in largest))
    longest_row = max(one.longest_row for one in batches)
    tokens = max(min(mean + spread, tokens_per_tick), longest_row)
    return Load(
        ticks=1.0,
        tokens=tokens,
        token_ranks=tokens * sum(one.shape.effective_rank * one.mean for one in largest) / mean,
        token_inputs=tokens * sum(one.shape.input_share * one.mean for one in largest) / mean,
    )


def _held(
    parameters: Sequence[int], slots: int, evaluation: Evaluation, early_exit: EarlyExit, parked_beside: bool
) -> float:
    """Return the parameters of all adapters that are held at a time, those not in slots by the share of them there."""
    ordered = sorted(parameters, reverse=True)
    if not parked_beside:
        return float(sum(ordered[:slots]))
    # Who is evaluated at the last step alone has no best weights while it trains.
    training = 1.0 if evaluation.count > 1 else 1.0 - WEIGHTS_SHARE
    # Under a policy trials are parked with all their state; without one those that wait have none yet.
    parked = 0 if early_exit.policy == "none" else sum(ordered[slots:])
    return training * sum(ordered[:slots]) + parked


def _sum_of_rows(rows: Sequence[Row]) -> Load:
    return Load(
        tokens=float(sum(row.tokens for row in rows)),
        targets=float(sum(row.targets for row in rows)),
        squared_lengths=float(sum(row.tokens**2 for row in rows)),
    )


def _with_adapter(load: Load, shape: AdapterShape, steps: int) -> Load:
    return load + Load(
        token_ranks=shape.effective_rank * load.tokens,
        token_inputs=shape.input_share * load.tokens,
        stepped_parameters=float(steps * shape.parameters),
    )
