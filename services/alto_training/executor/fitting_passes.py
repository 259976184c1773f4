"""Passes that fit: which items of whom one pass of the backbone holds, and less of it after memory ran out.

With several worker ranks each passes its own trials, and all of them learn what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from alto_training.executor import passes
from alto_training.executor.backbone import Backbone
from alto_training.executor.errors import OutOfMemoryError, TickOutOfMemoryError
from alto_training.executor.optimizer import take_steps
from alto_training.executor.packer import choose_items
from alto_training.executor.progress import ProgressMeter
from alto_training.executor.ranks import Ownership, Ranks
from alto_training.executor.tick import Share, Tick
from alto_training.executor.trial_run import Place, TrialRun


@dataclass(frozen=True)
class Trained:
    """What a tick did for one trial: the items it trained and their tokens, and their part of the batch's loss.

    `gradient_norm` is that of the whole effective batch where these items complete it, else 0.
    """

    items: int
    tokens: int
    loss: float
    gradient_norm: float


class _Part(NamedTuple):
    """What one trial puts into a tick: the `items` from `place` on."""

    run: TrialRun
    place: Place
    items: int

    @property
    def completes(self) -> bool:
        """Whether they complete the effective batch."""
        return self.run.completes_batch(self.place, self.items)


class _Ahead(NamedTuple):
    """A tick that was laid out before its time and, where `losses` are there, whose pass was begun too."""

    parts: Sequence[_Part]
    tick: Tick | None
    losses: torch.Tensor | None = None


class FittingPasses:
    """Holds the token budgets of a run, of training ticks and of evaluation, and halves what did not fit.

    `on_halved` is told the budget of a tick before and after. `meter` is told what evaluation takes.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens_per_tick: int,
        evaluation_tokens: int,
        ranks: Ranks,
        ownership: Ownership,
        meter: ProgressMeter,
        on_halved: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokens_per_tick = tokens_per_tick
        self.evaluation_tokens = evaluation_tokens
        self._backbone = backbone
        self._ranks = ranks
        self._ownership = ownership
        self._meter = meter
        self._on_halved = on_halved
        self._clock = clock
        self._ahead: _Ahead | None = None

    def train(self, active: Sequence[TrialRun], turn: int) -> dict[TrialRun, Trained]:
        """Train a tick's worth of these trials, forward and backward; return what it did for each that was on it.

        `turn` counts ticks: whose items are chosen first goes round.
        """
        while True:
            parts = self._choose([(run, run.place) for run in active], turn)
            try:
                losses, norms = self._run(parts)
            except passes.TickTooLargeError as error:
                self._halve([part.run for part in parts], sum(part.items for part in parts), error)
                continue
            read_numbers = passes.reading(torch.cat([losses, norms.to(losses)]))
            # A GPU still works on it; this is the last that is done without waiting for it.
            self._lay_out_ahead(active, parts, turn + 1)
            numbers = read_numbers()
            norm_of = dict(zip([part for part in parts if part.completes], numbers[len(parts) :], strict=True))
            places = {run: str(place) for place, run in enumerate(active)}
            trained = self._ranks.united(
                {
                    places[part.run]: (part.items, loss, norm_of.get(part, 0.0))
                    for part, loss in zip(parts, numbers[: len(parts)], strict=True)
                }
            )
            return {
                run: Trained(items, sum(run.waiting_tokens(run.place)[:items]), loss, norm)
                for run, place in places.items()
                if place in trained
                for items, loss, norm in [trained[place]]
            }

    def _choose(self, trials: Sequence[tuple[TrialRun, Place]], turn: int) -> list[_Part]:
        """Return what this rank's trials put into a tick that meets each trial at the place given.

        The batches of all are read, so that ranks read alike.
        """
        waiting = [run.waiting_tokens(place) for run, place in trials]
        mine = [number for number, (run, _) in enumerate(trials) if self._ownership.owns(run)]
        taken = choose_items([waiting[number] for number in mine], self.tokens_per_tick, turn)
        return [_Part(*trials[number], items) for number, items in zip(mine, taken, strict=True) if items]

    def _run(self, parts: Sequence[_Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """Train a tick of these parts, and take the optimiser steps of effective batches that it completes.

        Return each part's loss, and the gradient norms of those steps; on a GPU both are still being computed.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.parts != parts:
            ahead = _Ahead(parts, self._lay_out(parts))
        losses = passes.train_tick(self._backbone, ahead.tick) if ahead.losses is None else ahead.losses
        with passes.out_of_memory_told(self._backbone):
            steps = [(part.run.step_due(), loss) for part, loss in zip(parts, losses, strict=True) if part.completes]
            return losses, take_steps(steps)

    def _lay_out(self, parts: Sequence[_Part]) -> Tick | None:
        return passes.lay_out(self._backbone, [part.run.share(part.place, part.items) for part in parts])

    def _lay_out_ahead(self, active: Sequence[TrialRun], parts: Sequence[_Part], turn: int) -> None:
        """Lay out the tick that comes next unless something ends before it, while the device works on this one.

        Its pass is begun as well where that is all but certain to be wanted, and can be dropped: nothing has been done
        but to gradients that begin from nothing. The device then has work while the host hears what came of this tick.
        """
        if not all(run.reads_ahead for run in active):
            return
        items = {part.run: part.items for part in parts}
        # What other ranks have on the tick is not known here; that their batches end with it is a guess.
        for run in active:
            if run not in items:
                items[run] = 0 if self._ownership.owns(run) else len(run.waiting_tokens(run.place))
        after = [(run, run.place_after(run.place, items[run])) for run in active]
        expected = self._choose([(run, place) for run, place in after if place is not None], turn)
        certain = all(place is not None and not run.evaluates_between(place) for run, place in after)
        can_be_dropped = all(part.place.items_done == 0 for part in expected)
        # Memory that does not suffice for it now may do so in its time.
        with suppress(passes.TickTooLargeError):
            tick = self._lay_out(expected)
            begins = self._begins_ahead and certain and can_be_dropped
            self._ahead = _Ahead(expected, tick, passes.train_tick(self._backbone, tick) if begins else None)

    @property
    def _begins_ahead(self) -> bool:
        """Whether a pass can be under way unseen, and nobody else counts this rank's passes."""
        return self._backbone.device.type == "cuda" and not self._backbone.weights.in_lock_step

    def validation_losses(
        self, due: Sequence[TrialRun], share_of: Callable[[TrialRun], Share]
    ) -> dict[TrialRun, list[float]]:
        """Return the loss of each validation item for each of these trials, all of them evaluated together."""
        mine = [place for place, run in enumerate(due) if self._ownership.owns(run)]
        losses = self.losses([share_of(due[place]) for place in mine])
        told = self._ranks.united({str(place): each for place, each in zip(mine, losses, strict=True)})
        return {run: told[str(place)] for place, run in enumerate(due)}

    def losses(self, shares: Sequence[Share]) -> list[list[float]]:
        """Return the losses of each share's items, without gradients; in smaller passes if memory runs out."""
        passes.settle(self._backbone)
        started = self._clock()
        while True:
            try:
                losses = passes.item_losses(self._backbone, shares, self.evaluation_tokens, self._most)
            except passes.TickTooLargeError as error:
                if self.evaluation_tokens == 1:
                    raise _out_of_memory(error) from error
                self._refuse_if_others_wait(error)
                self.evaluation_tokens = max(1, self.evaluation_tokens // 2)
                continue
            tokens = sum(item.tokens for share in shares for item in share.items)
            self._meter.evaluated(tokens, self._clock() - started)
            return losses

    def _halve(self, on_tick: Sequence[TrialRun], items: int, error: Exception) -> None:
        """Halve the tick after memory ran out; effective batches whose gradients were being added start again."""
        for run in on_tick:
            run.restart_batch()
        if items == 1:
            raise _out_of_memory(error) from error
        self._refuse_if_others_wait(error)
        before, self.tokens_per_tick = self.tokens_per_tick, max(1, self.tokens_per_tick // 2)
        self._on_halved(before, self.tokens_per_tick)

    def _refuse_if_others_wait(self, error: Exception) -> None:
        """Give up where a smaller tick cannot be tried: other ranks are in this pass, or wait for what comes of it."""
        if self._ranks.size > 1:
            raise TickOutOfMemoryError(
                f"memory ran out on worker rank {self._ranks.rank} at {self.tokens_per_tick} tokens a tick ({error})",
                "start all ranks again with half as many",
                self.tokens_per_tick,
            ) from error

    def _most(self, count: int) -> int:
        """Return the largest of the numbers that the ranks have."""
        counts: list[int] = list(self._ranks.united({str(self._ranks.rank): count}).values())
        return max(counts)


def _out_of_memory(error: Exception) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"memory ran out with a single item on the tick ({error})",
        "use recomputation, a smaller max_length, or a device with more memory",
    )
