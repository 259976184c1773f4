"""What is minimised: from dataset rows to items, and from per-sequence sums of token losses to per-item losses."""

from __future__ import annotations

from typing import Protocol

import torch
from alto_common.tuning import Objective, ObjectiveKind
from torch.nn.functional import logsigmoid

from alto_training.executor.data_source import DataSource, Example
from alto_training.executor.tick import Item, PackedSequence, sequence_loss


class TrainingObjective(Protocol):
    """How a row becomes an item and what an item costs. `needs_reference`: items carry the backbone's own sums."""

    needs_reference: bool

    def item(self, data: DataSource, row: int, max_length: int, stream_position: int) -> Item:
        """Return row `row`, cut to `max_length` tokens, as an item of the tick."""
        ...

    def item_loss(self, nll_S: torch.Tensor, reference_nll_S: torch.Tensor) -> torch.Tensor:
        """Return the loss of each item, [I], from its sequences' summed token losses, [S], and the backbone's."""
        ...


class SupervisedObjective:
    """SFT: cross-entropy of the target tokens."""

    needs_reference = False

    def item(self, data: DataSource, row: int, max_length: int, stream_position: int) -> Item:
        """See `TrainingObjective.item`."""
        sequence = _sequence(data.example(row, max_length), stream_position)
        return Item((sequence,), denominator=int(sequence.target_mask[1:].sum()))

    def item_loss(self, nll_S: torch.Tensor, reference_nll_S: torch.Tensor) -> torch.Tensor:
        """See `TrainingObjective.item_loss`."""
        return sequence_loss(nll_S, reference_nll_S)


class PreferenceObjective:
    """DPO (arXiv 2305.18290): -log sigmoid(beta ((log pi/ref of chosen) - (log pi/ref of rejected))).

    The reference is the backbone with no adapter.
    """

    needs_reference = True

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def item(self, data: DataSource, row: int, max_length: int, stream_position: int) -> Item:
        """See `TrainingObjective.item`."""
        chosen, rejected = data.preference(row, max_length)
        pair = (_sequence(chosen, 2 * stream_position), _sequence(rejected, 2 * stream_position + 1))
        return Item(pair, denominator=1)

    def item_loss(self, nll_S: torch.Tensor, reference_nll_S: torch.Tensor) -> torch.Tensor:
        """See `TrainingObjective.item_loss`."""
        gain_S = reference_nll_S - nll_S
        gain_chosen_I, gain_rejected_I = gain_S.view(-1, 2).unbind(dim=1)
        return -logsigmoid(self._beta * (gain_chosen_I - gain_rejected_I))


def make_objective(objective: Objective) -> TrainingObjective:
    """Return the objective that a task asks for."""
    if objective.kind is ObjectiveKind.DPO:
        return PreferenceObjective(objective.dpo_beta)
    return SupervisedObjective()


def _sequence(example: Example, stream_key: int) -> PackedSequence:
    return PackedSequence(example.input_ids, example.target_mask, stream_key)
