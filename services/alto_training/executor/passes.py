"""The passes of the backbone: one training tick, and losses without gradients for evaluation and references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from alto_training.executor.backbone import Backbone
from alto_training.executor.losses import token_nll
from alto_training.executor.tick import Item, Share, Tick, build_tick


class TickTooLargeError(Exception):
    """Memory ran out within a pass; gradients of the shares in it are in an unknown state."""


def lay_out(backbone: Backbone, shares: Sequence[Share]) -> Tick | None:
    """Make a training tick ready to be run, as far as can be done beforehand; None without shares.

    Raises `TickTooLargeError` when memory runs out.
    """
    if not shares:
        return None
    with out_of_memory_told(backbone):
        tick = build_tick(shares, training=True, device=backbone.device)
        backbone.backend.prepare(tick)
        return tick


def train_tick(backbone: Backbone, tick: Tick | None) -> torch.Tensor:
    """Run one forward and backward pass; gradients are added to the adapters' buffers, or begin from nothing there.

    Without a tick it only takes part in the pass of other worker ranks. Returns each share's part of the mean loss over
    its effective batch, [G] in float64 (the parts of the micro-batches add up to it): on a GPU it is still being
    computed. Raises `TickTooLargeError` when memory runs out.
    """
    if tick is None:
        backbone.weights.idle_pass(training=True)
        return torch.zeros(0, dtype=torch.float64, device=backbone.device)
    with out_of_memory_told(backbone):
        backbone.backend.begin(tick)
        loss_I = _item_losses(backbone, tick)
        loss_G = torch.zeros(len(tick.segments), dtype=loss_I.dtype, device=loss_I.device)
        loss_G = loss_G.index_add(0, tick.share_of_item_I, loss_I * tick.weight_I)
        # A vector of ones, not a sum: no share's loss meets another's, finite or not.
        loss_G.backward(torch.ones_like(loss_G))  # type: ignore[no-untyped-call]
        return loss_G.detach()


@torch.no_grad()
def item_losses(
    backbone: Backbone, shares: Sequence[Share], tokens_per_tick: int, most: Callable[[int], int] = lambda count: count
) -> list[list[float]]:
    """Return the loss of each item of each share, without gradients, in ticks of at most `tokens_per_tick` tokens.

    `most` gives, from the number of ticks here, that of the worker rank with the most of them: all take part in each.
    Raises `TickTooLargeError` when memory runs out.
    """
    losses: list[list[float]] = [[] for _ in shares]
    pieces = list(_pieces(shares, tokens_per_tick))
    for _ in range(most(len(pieces)) - len(pieces)):
        backbone.weights.idle_pass(training=False)
    for piece in pieces:
        tick = build_tick([share for _, share in piece], training=False, device=backbone.device)
        with out_of_memory_told(backbone):
            loss_I = _item_losses(backbone, tick)
        for owner, loss in zip(tick.share_of_item_I.tolist(), loss_I.tolist(), strict=True):
            losses[piece[owner][0]].append(loss)
    return losses


@torch.no_grad()
def reference_sums(backbone: Backbone, items: Sequence[Item], tokens_per_tick: int) -> list[tuple[float, ...]]:
    """Return, for each item, the frozen backbone's summed token losses of its sequences."""
    sums: list[float] = []
    for piece in _pieces([Share(None, items)], tokens_per_tick):
        tick = build_tick([share for _, share in piece], training=False, device=backbone.device)
        sums.extend(_sequence_sums(backbone, tick).tolist())
    answers, start = [], 0
    for item in items:
        answers.append(tuple(sums[start : start + len(item.sequences)]))
        start += len(item.sequences)
    return answers


def settle(backbone: Backbone) -> None:
    """Wait until the device has done all that was begun: what is timed from here on is not a pass begun before."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def reading(values: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to read values from the device; what is returned waits for them, and for nothing that is begun later."""
    if values.device.type != "cuda":
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
    arrived.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        arrived.synchronize()
        numbers: list[float] = on_host.tolist()
        return numbers

    return read


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch (on either device), CUDA's driver or Python says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))


@contextmanager
def out_of_memory_told(backbone: Backbone) -> Iterator[None]:
    """Tell memory that ran out from other errors, and leave the backbone ready for another tick."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        raise TickTooLargeError(str(error)) from error
    finally:
        backbone.end_tick()


def _sequence_sums(backbone: Backbone, tick: Tick) -> torch.Tensor:
    """Return the summed token losses of each sequence, [S], in float64: DPO takes small differences of large sums."""
    hidden_RH = backbone.hidden_states(tick)
    with backbone.weights.head() as head:
        nll_R = token_nll(hidden_RH, tick.targets_R, head)
    nll_S = torch.zeros(len(tick.sequence_lengths), dtype=torch.float64, device=nll_R.device)
    return nll_S.index_add(0, tick.sequence_of_row_R, nll_R.double())


def _item_losses(backbone: Backbone, tick: Tick) -> torch.Tensor:
    """Return the loss of each item, [I], unweighed."""
    nll_S = _sequence_sums(backbone, tick)
    parts = [item_loss(nll_S[start:end], tick.reference_nll_S[start:end]) for item_loss, start, end in tick.item_losses]
    return torch.cat(parts)


def _pieces(shares: Sequence[Share], tokens_per_tick: int) -> Iterator[list[tuple[int, Share]]]:
    """Cut shares into runs of whole items that fit a tick, each with the index of the share it comes from."""
    piece: list[tuple[int, Share]] = []
    left = tokens_per_tick
    for index, share in enumerate(shares):
        taken: list[Item] = []
        for item in share.items:
            if item.tokens > left and (piece or taken):
                if taken:
                    piece.append((index, replace(share, items=taken)))
                yield piece
                piece, taken, left = [], [], tokens_per_tick
            taken.append(item)
            left -= item.tokens
        if taken:
            piece.append((index, replace(share, items=taken)))
    if piece:
        yield piece
