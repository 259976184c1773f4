"""Who multiplies frozen layers and the adapters of a tick: Y_t = W x_t + (alpha_i / r_i) B_i A_i dropout_i(x_t).

`ReferenceBackend` is plain torch, one segment after another, and the executable specification of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from alto_kernels.reference import keep_mask

from alto_training.executor.adapter import Adapter
from alto_training.executor.tick import Segment, Tick


class FrozenLinear(Protocol):
    """The backbone's own product, and its derivative by the input."""

    in_features: int
    out_features: int

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return W x + bias, a new [T, N]."""
        ...

    def input_gradient(self, dy_TN: torch.Tensor, onto_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Return dY W, [T, K]: a new tensor, or `onto_TK` with it added."""
        ...


class AdaptedLayer(Protocol):
    """A frozen product, and the number by which adapters know it."""

    frozen: FrozenLinear
    index: int


class LoraBackend(Protocol):
    """Multiplies layers of one input, each with the adapters of a tick; of every layer it is given there is one.

    Gradients of A and B go into the adapters' own buffers.
    """

    name: str

    def prepare(self, tick: Tick) -> None:
        """Do what can be done for a tick before its time; adapters do not change until it begins."""
        ...

    def begin(self, tick: Tick) -> None:
        """Begin a training tick: gradients of segments that begin a batch are to begin from nothing."""
        ...

    def forward(
        self, x_TK: torch.Tensor, layers: Sequence[AdaptedLayer], tick: Tick
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return each layer's new [T, N], and what `backward` needs besides `x_TK`."""
        ...

    def backward(
        self,
        dys_TN: Sequence[torch.Tensor],
        x_TK: torch.Tensor,
        kept: Sequence[torch.Tensor],
        layers: Sequence[AdaptedLayer],
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """Add the gradients of A and B; return that of `x_TK`, a new tensor, None where nobody needs it."""
        ...


def clear_gradients(tick: Tick) -> None:
    """Clear the gradients of segments that begin a batch: for back ends that only add to them."""
    for segment in tick.segments:
        if segment.begins_batch and segment.adapter is not None:
            segment.adapter.grad.zero_()


class ReferenceBackend:
    """The low-rank part in plain torch, segment by segment. S = dropout(x) A^T, [t, R], is kept of each."""

    name = "reference"

    def prepare(self, tick: Tick) -> None:
        """See `LoraBackend.prepare`."""

    def begin(self, tick: Tick) -> None:
        """See `LoraBackend.begin`."""
        clear_gradients(tick)

    def forward(
        self, x_TK: torch.Tensor, layers: Sequence[AdaptedLayer], tick: Tick
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `LoraBackend.forward`."""
        outputs, kept = [], []
        for layer in layers:
            y_TN = layer.frozen.product(x_TK)
            for segment, adapter in _adapted(tick, layer.index):
                views = adapter.views[layer.index]
                x_tK = _dropped(x_TK[segment.start : segment.end], segment, layer.index)
                s_tR = x_tK @ views.a_RK.to(x_tK.dtype).t()
                y_TN[segment.start : segment.end].addmm_(s_tR, views.b_NR.to(x_tK.dtype).t(), alpha=adapter.scaling)
                kept.append(s_tR)
            outputs.append(y_TN)
        return outputs, kept

    def backward(
        self,
        dys_TN: Sequence[torch.Tensor],
        x_TK: torch.Tensor,
        kept: Sequence[torch.Tensor],
        layers: Sequence[AdaptedLayer],
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """See `LoraBackend.backward`."""
        s_of_each = iter(kept)
        dx_TK = None
        for dy_TN, layer in zip(dys_TN, layers, strict=True):
            if needs_dx:
                dx_TK = layer.frozen.input_gradient(dy_TN, dx_TK)
            for segment, adapter in _adapted(tick, layer.index):
                views, s_tR = adapter.views[layer.index], next(s_of_each)
                dy_tN = dy_TN[segment.start : segment.end]
                x_tK = _dropped(x_TK[segment.start : segment.end], segment, layer.index)
                ds_tR = (dy_tN @ views.b_NR.to(dy_tN.dtype)).mul_(adapter.scaling)
                _add_product(views.grad_b_NR, dy_tN.t(), s_tR, adapter.scaling)
                _add_product(views.grad_a_RK, ds_tR.t(), x_tK, 1.0)
                if dx_TK is None:
                    continue
                dx_tK, a_RK = dx_TK[segment.start : segment.end], views.a_RK.to(ds_tR.dtype)
                if segment.row_keys_T is None:
                    dx_tK.addmm_(ds_tR, a_RK)
                else:
                    dx_tK.add_(_dropped(ds_tR @ a_RK, segment, layer.index))
        return dx_TK


def _adapted(tick: Tick, module_index: int) -> Iterator[tuple[Segment, Adapter]]:
    """Yield the segments whose adapter adapts a layer."""
    for segment in tick.segments:
        if segment.adapter is not None and module_index in segment.adapter.views:
            yield segment, segment.adapter


def _dropped(x_tK: torch.Tensor, segment: Segment, module_index: int) -> torch.Tensor:
    """Return the segment's tokens with its dropout, the same mask each time."""
    if segment.row_keys_T is None:
        return x_tK
    keep_tK = keep_mask(segment.row_keys_T, module_index, x_tK.shape[1], segment.dropout)
    # where, not a product with the mask: a value that is not finite must not survive as 0 * inf.
    return torch.where(keep_tK, x_tK, 0.0).mul_(1.0 / (1.0 - segment.dropout))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)
