"""Passes that fit: which items of whom one pass of the backbone holds, and less of it after memory ran out.

With several worker ranks each passes its own trials, and all of them learn what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alto_training.executor import passes
from alto_training.executor.backbone import Backbone
from alto_training.executor.errors import OutOfMemoryError, TickOutOfMemoryError
from alto_training.executor.packer import choose_items
from alto_training.executor.progress import ProgressMeter
from alto_training.executor.ranks import Ownership, Ranks
from alto_training.executor.tick import Share
from alto_training.executor.trial_run import TrialRun


@dataclass(frozen=True)
class Trained:
    """What a tick did for one trial: the items it trained and their tokens, and their part of the batch's loss.

    `gradient_norm` is that of the whole effective batch where these items complete it, else 0.
    """

    items: int
    tokens: int
    loss: float
    gradient_norm: float


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

    def train(self, active: Sequence[TrialRun], turn: int) -> dict[TrialRun, Trained]:
        """Train a tick's worth of these trials, forward and backward; return what it did for each that was on it.

        `turn` counts ticks: whose items are chosen first goes round.
        """
        while True:
            waiting = [run.waiting_tokens for run in active]
            mine = [place for place, run in enumerate(active) if self._ownership.owns(run)]
            taken = choose_items([waiting[place] for place in mine], self.tokens_per_tick, turn)
            on_tick = [(place, items) for place, items in zip(mine, taken, strict=True) if items]
            try:
                losses = passes.train_tick(self._backbone, [active[place].share(items) for place, items in on_tick])
            except passes.TickTooLargeError as error:
                self._halve([active[place] for place, _ in on_tick], sum(taken), error)
                continue
            trained = self._ranks.united(
                {
                    str(place): (items, loss, active[place].gradient_norm_after(items))
                    for (place, items), loss in zip(on_tick, losses, strict=True)
                }
            )
            return {
                run: Trained(items, sum(waiting[place][:items]), loss, norm)
                for place, run in enumerate(active)
                if str(place) in trained
                for items, loss, norm in [trained[str(place)]]
            }

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
        """Give up where a smaller tick cannot be tried: the other ranks are in the middle of this pass."""
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
