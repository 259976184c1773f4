"""How much work a search is: samples, steps, tokens, memory. From these placement predicts how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alto_common.base_models import ModelFacts
from alto_common.cost_model import ADAPTER_BYTES_PER_PARAMETER, adapter_parameters, enough_tokens, prior
from alto_common.search_load import Machine, Row, expected_share, search_load
from alto_common.tuning import EarlyExit, Evaluation, Trial

# UTF-8 bytes a token takes, for English text under common vocabularies; used until the tokenizer has counted.
BYTES_PER_TOKEN = 4
# How nodes train unless they are told otherwise, on a CPU and on GPUs: bytes of a weight.
CPU_KIND = "cpu"
BYTES_PER_VALUE = {True: 4, False: 2}


@dataclass(frozen=True)
class Rows:
    """Rows to train on and to validate on, and the tokens of rows drawn from them."""

    train: int
    validation: int
    token_lengths: tuple[int, ...]

    def mean_tokens(self, max_length: int) -> float:
        """Return the mean tokens of a row, each cut to `max_length`."""
        if not self.token_lengths:
            return float(max_length)
        return sum(min(length, max_length) for length in self.token_lengths) / len(self.token_lengths)


@dataclass(frozen=True)
class SearchSize:
    """How much work every trial trained to its last step is; `expected_share` of it is left after early exits.

    Searches of the same `shape` are expected to stop about the same share of their trials.
    """

    steps: int
    samples: int
    train_tokens: int
    evaluation_tokens: int
    total_lora_rank: int
    expected_share: float
    trials: int
    longest_steps: int
    shape: str


def split_rows(rows: int, validation_rows: int | None, validation_fraction: float) -> tuple[int, int]:
    """Return (training rows, validation rows): a share of the rows is set aside when there is no validation dataset."""
    if validation_rows is not None:
        return rows, validation_rows
    aside = min(rows - 1, max(1, round(rows * validation_fraction))) if rows > 1 else 0
    return rows - aside, aside


def search_size(trials: Sequence[Trial], rows: Rows, evaluation: Evaluation, early_exit: EarlyExit) -> SearchSize:
    """Return the size of a search."""
    validated = min(rows.validation, evaluation.max_examples or rows.validation)
    means = {length: rows.mean_tokens(length) for length in {trial.config.max_length for trial in trials}}
    samples = [trial.config.total_samples(rows.train) for trial in trials]
    tokens = sum(count * means[trial.config.max_length] for count, trial in zip(samples, trials, strict=True))
    evaluated = sum(evaluation.count * validated * means[trial.config.max_length] for trial in trials)
    return SearchSize(
        steps=sum(trial.config.total_steps(rows.train) for trial in trials),
        samples=sum(samples),
        train_tokens=round(tokens),
        evaluation_tokens=round(evaluated),
        total_lora_rank=sum(trial.config.lora_rank for trial in trials),
        expected_share=expected_share(early_exit, len(trials)),
        trials=len(trials),
        longest_steps=max(trial.config.total_steps(rows.train) for trial in trials),
        shape=shape(early_exit, len(trials)),
    )


def shape(early_exit: EarlyExit, trials: int) -> str:
    """Return the name of a search's shape: its policy, what decides how many it stops, and its trials in doublings."""
    if early_exit.policy == "none" or trials < 2:
        return "none"
    kept = f"{early_exit.warmup_fraction:.2g}/{early_exit.keep_fraction:.2g}"
    return f"{early_exit.policy[:64]} {kept} {2 ** (trials.bit_length() - 1)}+"


def least_memory_bytes(trials: Sequence[Trial], facts: ModelFacts) -> int:
    """Return the memory below which no node can train: the backbone in four bits a weight, and the smallest adapter."""
    smallest = min(adapter_parameters(facts, trial.config) for trial in trials)
    return facts.parameters // 2 + round(smallest * ADAPTER_BYTES_PER_PARAMETER)


def adapter_memory_bytes(trials: Sequence[Trial], facts: ModelFacts) -> int:
    """Return the memory of the adapters of all trials, with gradients, optimiser states and best weights."""
    return round(sum(adapter_parameters(facts, trial.config) for trial in trials) * ADAPTER_BYTES_PER_PARAMETER)


def peak_memory_bytes(
    trials: Sequence[Trial],
    facts: ModelFacts,
    rows: Rows,
    evaluation: Evaluation,
    early_exit: EarlyExit,
    gpu_kind: str,
) -> int:
    """Return a first estimate of the memory that a search takes, all its trials in slots; the node measures.

    By the cost model that a node begins with, of the model's shape alone.
    """
    on_cpu = gpu_kind == CPU_KIND
    tokens = enough_tokens(on_cpu, facts.hidden_size)
    lengths = [Row(length, length // 2) for length in rows.token_lengths] or [Row(tokens, tokens // 2)]
    machine = Machine(len(trials), tokens, tokens, parked_beside=on_cpu)
    load = search_load(facts, trials, lengths, rows.train, lengths, rows.validation, evaluation, early_exit, machine)
    return round(load.peak_bytes(prior(facts, BYTES_PER_VALUE[on_cpu], flops_per_s=1.0)))
