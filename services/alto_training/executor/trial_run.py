"""One trial while it trains: its place in its data, its effective batch, its adapter, its best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from alto_common.tuning import Evaluation, Trial
from alto_kernels import AdapterStep

from alto_training.executor.adapter import Adapter
from alto_training.executor.data_source import DataSource
from alto_training.executor.objectives import TrainingObjective
from alto_training.executor.optimizer import adapter_step
from alto_training.executor.randomness import DataOrder
from alto_training.executor.tick import Item, Share

# Gives items of the training data, by row and length, the backbone's own sums (DPO); others are returned as they are.
References = Callable[[Sequence[int], Sequence[Item], int], list[Item]]


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step was: the loss of its effective batch before it, and the gradient's norm before the clip.

    `finite` False means that the step was not taken.
    """

    train_loss: float
    learning_rate: float
    gradient_norm: float
    finite: bool


class Place(NamedTuple):
    """A place in a trial's stream: the effective batch of an optimiser step, and how many of its items are trained."""

    step: int
    items_done: int


class TrialRun:
    """The training state of one trial. An effective batch is read at once and trained in as many ticks as it takes."""

    def __init__(
        self,
        trial: Trial,
        data: DataSource,
        objective: TrainingObjective,
        adapter: Adapter,
        evaluation: Evaluation,
        smoothing: float,
        references: References,
    ) -> None:
        self.trial_id = trial.trial_id
        self.config = trial.config
        self.adapter = adapter
        self.total_steps = trial.config.total_steps(len(data))
        self.total_items = trial.config.total_samples(len(data))
        self._data = data
        self._objective = objective
        self._order = DataOrder(len(data), trial.config.seed)
        self._smoothing = smoothing
        self._references = references
        self._evaluation_steps = frozenset(
            math.ceil(self.total_steps * part / evaluation.count) for part in range(1, evaluation.count + 1)
        )
        self.step = 0
        self.items_done = 0  # of the current effective batch
        self.train_loss_smoothed = math.nan
        self.tokens_trained = 0
        self.samples_trained = 0
        self.last_evaluated_step = -1
        self.best_step: int | None = None
        self.best_validation_loss: float | None = None
        self.best_param: torch.Tensor | None = None
        self.version = 0  # grows with every change of the buffers: a checkpoint writes only what changed
        self._batches: dict[int, list[Item]] = {}  # by optimiser step
        self._batch_loss = 0.0

    @property
    def batch(self) -> list[Item]:
        """The items of the current effective batch, in stream order."""
        return self._batch_of(self.step)

    @property
    def place(self) -> Place:
        """Where the trial is."""
        return Place(self.step, self.items_done)

    def completes_batch(self, place: Place, items: int) -> bool:
        """Say whether the `items` items from `place` on complete its effective batch."""
        return place.items_done + items == len(self._batch_of(place.step))

    def place_after(self, place: Place, items: int) -> Place | None:
        """Return where the trial is after the `items` items from `place` on, if all is finite; None at its end."""
        if not self.completes_batch(place, items):
            return Place(place.step, place.items_done + items)
        return Place(place.step + 1, 0) if place.step + 1 < self.total_steps else None

    def evaluates_between(self, place: Place) -> bool:
        """Whether validation loss is measured on the way from here to `place`, at most one step ahead."""
        return place.step != self.step and place.step in self._evaluation_steps

    @property
    def reads_ahead(self) -> bool:
        """Whether batches to come can be read before their time: not where that takes passes of the backbone."""
        return not self._objective.needs_reference

    def waiting_tokens(self, place: Place) -> list[int]:
        """Return token counts of the items of an effective batch that are not trained at `place`."""
        return [item.tokens for item in self._batch_of(place.step)[place.items_done :]]

    def share(self, place: Place, items: int) -> Share:
        """Return the `items` items from `place` on, as this trial's share of a tick."""
        batch = self._batch_of(place.step)
        denominator = sum(item.denominator for item in batch)
        return Share(
            adapter=self.adapter,
            items=batch[place.items_done : place.items_done + items],
            item_loss=self._objective.item_loss,
            batch_denominator=float(max(1, denominator)),
            dropout=self.config.lora_dropout,
            seed=self.config.seed,
            begins_batch=place.items_done == 0,
        )

    def count(self, items: int, loss: float) -> bool:
        """Note that the next `items` items were trained, with their part of the loss; say if the batch is complete."""
        trained = self.batch[self.items_done : self.items_done + items]
        self.tokens_trained += sum(item.tokens for item in trained)
        self.samples_trained += len(trained)
        self.items_done += items
        self._batch_loss += loss
        self.version += 1
        return self.items_done == len(self.batch)

    def restart_batch(self) -> None:
        """Go back to the start of the effective batch: after memory ran out in the middle of a backward pass."""
        undone = self.batch[: self.items_done]
        self.tokens_trained -= sum(item.tokens for item in undone)
        self.samples_trained -= len(undone)
        self.items_done, self._batch_loss = 0, 0.0
        self.version += 1

    def step_due(self) -> AdapterStep:
        """Return the optimiser step that ends the effective batch. It is none if an earlier loss was not finite."""
        step = adapter_step(self.adapter, self.config, self.step, self._learning_rate)
        return step if math.isfinite(self._batch_loss) else replace(step, grad_scale=math.nan)

    def finish_batch(self, norm: float) -> StepReport:
        """Take note of the optimiser step of a complete effective batch, and whether it was one.

        `norm` is the gradient's, which only the rank that has the gradient can tell.
        """
        loss, learning_rate = self._batch_loss, self._learning_rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepReport(loss, learning_rate, norm, finite=False)
        first = math.isnan(self.train_loss_smoothed)
        keep = 0.0 if first else 1.0 - self._smoothing
        self.train_loss_smoothed = loss if first else keep * self.train_loss_smoothed + self._smoothing * loss
        self.step += 1
        self.items_done, self._batch_loss = 0, 0.0
        self.version += 1
        return StepReport(loss, learning_rate, norm, finite=True)

    @property
    def evaluation_due(self) -> bool:
        """Whether the last optimiser step was one after which validation loss is measured."""
        return self.step in self._evaluation_steps

    @property
    def finished(self) -> bool:
        """Whether all optimiser steps have been taken."""
        return self.step >= self.total_steps

    def note_validation(self, loss: float) -> bool:
        """Note the validation loss of the current weights; keep a copy of them if it is the lowest so far."""
        best = self.best_validation_loss is None or loss < self.best_validation_loss
        if best:
            self.best_step, self.best_validation_loss = self.step, loss
            self.best_param = self.adapter.weights_on_host()
        return best

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs besides the buffers, as JSON."""
        return {
            "step": self.step,
            "items_done": self.items_done,
            "batch_loss": self._batch_loss,
            "train_loss_smoothed": self.train_loss_smoothed,
            "tokens_trained": self.tokens_trained,
            "samples_trained": self.samples_trained,
            "last_evaluated_step": self.last_evaluated_step,
            "best_step": self.best_step,
            "best_validation_loss": self.best_validation_loss,
            "version": self.version,
        }

    def load_state(
        self, state: dict[str, Any], buffers: dict[str, torch.Tensor] | None, best: torch.Tensor | None
    ) -> None:
        """Take up where `state` was written; `buffers` are the adapter's, `best` the best weights, if there are any."""
        self.step = state["step"]
        self.items_done = state["items_done"]
        self._batch_loss = state["batch_loss"]
        self.train_loss_smoothed = state["train_loss_smoothed"]
        self.tokens_trained = state["tokens_trained"]
        self.samples_trained = state["samples_trained"]
        self.last_evaluated_step = state["last_evaluated_step"]
        self.best_step = state["best_step"]
        self.best_validation_loss = state["best_validation_loss"]
        self.version = state["version"]
        self.best_param = best
        if buffers is not None:
            self.adapter.load(buffers)

    def take_slot(self, device: torch.device) -> None:
        """Have the adapter on `device`; this worker rank's. A trial that is its seed alone draws its weights now."""
        if self.adapter.is_empty:
            assert self.samples_trained == 0
            self.adapter.initialise(self.config.seed, device)
        self.adapter.move(device)

    def leave(self) -> None:
        """Let go of all tensors: another worker rank has them."""
        self.adapter.leave()
        if self.best_param is not None:
            self.best_param = self.best_param.to("meta")

    def take_up(self, tensors: Sequence[dict[str, torch.Tensor]]) -> None:
        """Take over the tensors that another worker rank had, if any: the buffers, and the best weights."""
        if tensors:
            self.adapter.load(tensors[0])
        if len(tensors) > 1:
            self.best_param = tensors[1]["param"]

    @property
    def _learning_rate(self) -> float:
        return self.config.learning_rate * self.config.schedule.multiplier(self.step, self.total_steps)

    def _batch_of(self, step: int) -> list[Item]:
        """Return the effective batch of a step: the current one, or the next."""
        if step not in self._batches:
            self._batches = {known: batch for known, batch in self._batches.items() if known >= self.step}
            self._batches[step] = self._read_batch(step)
        return self._batches[step]

    def _read_batch(self, step: int) -> list[Item]:
        size = self.config.effective_batch_size
        positions = range(step * size, min((step + 1) * size, self.total_items))
        rows = [self._order.row(position) for position in positions]
        items = [
            self._objective.item(self._data, row, self.config.max_length, position)
            for row, position in zip(rows, positions, strict=True)
        ]
        return self._references(rows, items, self.config.max_length)
