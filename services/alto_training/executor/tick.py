"""One tick: how the sequences of many adapters lie on one token axis, adapter-major, packed without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from alto_kernels.upload import upload, upload_parts

from alto_training.executor.adapter import Adapter
from alto_training.executor.randomness import dropout_row_keys


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one sequence. `target_mask[t]` says that token t counts in the loss (it is predicted from t - 1).

    `stream_key` names the sequence within its trial's stream, for dropout.
    """

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]
    stream_key: int = 0

    @property
    def tokens(self) -> int:
        """The sequence's length."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Item:
    """What must share a tick: one sequence (SFT) or a chosen and a rejected one (DPO).

    `denominator` is what the item adds to the divisor of a mean: its target tokens (SFT) or 1 (DPO).
    `reference_nll` are the frozen backbone's own sums for the sequences (DPO), else empty.
    """

    sequences: tuple[PackedSequence, ...]
    denominator: int
    reference_nll: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(sequence.tokens for sequence in self.sequences)


# From the summed token losses of whole items, [S], and the reference's, [S], to the loss of each item, [I].
ItemLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sequence_loss(nll_S: torch.Tensor, reference_nll_S: torch.Tensor) -> torch.Tensor:
    """Take the summed token losses themselves: items of one sequence (SFT)."""
    return nll_S


@dataclass(frozen=True)
class Share:
    """What one adapter puts into a tick. `adapter` None means the backbone alone.

    Each item's loss is weighed with 1 / `batch_denominator`, so that micro-batches add up to the mean over the whole
    effective batch. `begins_batch` says that gradients begin from nothing, whatever their buffer holds.
    """

    adapter: Adapter | None
    items: Sequence[Item]
    item_loss: ItemLoss = sequence_loss
    batch_denominator: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    begins_batch: bool = False


@dataclass(frozen=True)
class Segment:
    """A run of tokens [start, end) that belongs to one adapter. `row_keys_T` is there when its dropout is on.

    `begins_batch`: its gradients begin from nothing.
    """

    adapter: Adapter | None
    start: int
    end: int
    dropout: float
    row_keys_T: torch.Tensor | None
    begins_batch: bool = False


@dataclass(frozen=True)
class Tick:
    """A forward (and, when `training`, backward) pass: T tokens, S sequences, R target rows, I items, G shares.

    `sequence_offsets` are the running sums of `sequence_lengths` from 0, [S + 1], int32, as varlen kernels want them.
    `input_ids_1T` and `position_ids_1T` are [1, T]; positions restart with each sequence. `rows_R` are the token
    indices whose hidden states predict `targets_R`; `sequence_of_row_R` and `share_of_item_I` say where they add up.
    """

    segments: tuple[Segment, ...]
    sequence_lengths: tuple[int, ...]
    sequence_offsets: torch.Tensor
    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    sequence_of_row_R: torch.Tensor
    share_of_item_I: torch.Tensor
    weight_I: torch.Tensor
    reference_nll_S: torch.Tensor
    item_losses: tuple[tuple[ItemLoss, int, int], ...]  # function, first sequence, end
    training: bool
    # Gives the graph a leaf: adapters' gradients go straight into their flat buffers, and the embeddings are frozen.
    anchor: torch.Tensor

    @property
    def tokens(self) -> int:
        """T, the tokens of the tick."""
        return sum(self.sequence_lengths)

    @cached_property
    def adapted_layers(self) -> frozenset[int]:
        """The indices of the layers that an adapter of the tick adapts."""
        views = [segment.adapter.views for segment in self.segments if segment.adapter is not None]
        return frozenset().union(*views)

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest sequence."""
        return max(self.sequence_lengths)


class CurrentTick:
    """The tick that is being run, shared by reference with every adapted layer; None between ticks."""

    def __init__(self) -> None:
        self.tick: Tick | None = None

    def require(self) -> Tick:
        """Return the tick; a layer that runs outside of one is a bug."""
        if self.tick is None:
            raise RuntimeError("the backbone ran outside of a tick")
        return self.tick


def build_tick(shares: Sequence[Share], training: bool, device: torch.device) -> Tick:
    """Lay the shares out on one axis, in the order given."""
    segments: list[Segment] = []
    lengths: list[int] = []
    ids: list[npt.NDArray[np.int32]] = []
    rows: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int32]] = []
    sequence_of_row: list[npt.NDArray[np.int64]] = []
    share_of_item: list[int] = []
    weights: list[float] = []
    reference: list[float] = []
    item_losses: list[tuple[ItemLoss, int, int]] = []
    start = offset = 0
    for share_index, share in enumerate(shares):
        first_sequence = len(lengths)
        for item in share.items:
            share_of_item.append(share_index)
            weights.append(1.0 / share.batch_denominator)
            reference.extend(item.reference_nll or (0.0,) * len(item.sequences))
            for sequence in item.sequences:
                predicted = np.flatnonzero(sequence.target_mask[1:])
                rows.append(predicted + offset)
                targets.append(sequence.input_ids[1:][predicted])
                sequence_of_row.append(np.full(len(predicted), len(lengths)))
                ids.append(sequence.input_ids)
                lengths.append(sequence.tokens)
                offset += sequence.tokens
        item_losses.append((share.item_loss, first_sequence, len(lengths)))
        row_keys_T = None
        if training and share.dropout > 0.0:
            stream_keys = [sequence.stream_key for item in share.items for sequence in item.sequences]
            row_keys_T = upload(dropout_row_keys(share.seed, stream_keys, lengths[first_sequence:]), device)
        begins_batch = training and share.begins_batch
        segments.append(Segment(share.adapter, start, offset, share.dropout, row_keys_T, begins_batch))
        start = offset
    (
        input_ids_T,
        position_ids_T,
        rows_R,
        targets_R,
        sequence_of_row_R,
        share_of_item_I,
        offsets,
        weight_I,
        reference_S,
    ) = _on_device(
        [
            _joined(ids),
            _joined([np.arange(length) for length in lengths]),
            _joined(rows),
            _joined(targets),
            _joined(sequence_of_row),
            np.array(share_of_item, dtype=np.int64),
            np.array([0, *np.cumsum(lengths)], dtype=np.int32),
            np.array(weights, dtype=np.float64),
            np.array(reference, dtype=np.float64),
        ],
        device,
    )
    return Tick(
        segments=tuple(segments),
        sequence_lengths=tuple(lengths),
        sequence_offsets=offsets,
        input_ids_1T=input_ids_T[None],
        position_ids_1T=position_ids_T[None],
        rows_R=rows_R,
        targets_R=targets_R,
        sequence_of_row_R=sequence_of_row_R,
        share_of_item_I=share_of_item_I,
        weight_I=weight_I,
        reference_nll_S=reference_S,
        item_losses=tuple(item_losses),
        training=training,
        anchor=torch.zeros((), device=device, requires_grad=training),
    )


def _joined(parts: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64)


def _on_device(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """Return the arrays as tensors on the device, by one copy that waits for nothing."""
    whole, starts = upload_parts([array.tobytes() for array in arrays], device)
    return [
        whole[start : start + array.nbytes].view(torch.from_numpy(array).dtype)
        for start, array in zip(starts, arrays, strict=True)
    ]
