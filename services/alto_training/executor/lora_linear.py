"""A frozen linear layer with many adapters: Y_t = W x_t + (alpha_i / r_i) B_i A_i dropout_i(x_t) for token t of i.

`MultiLoraLinear` stands where the backbone's layer stood and reads the current tick to know whose tokens are whose.
The low-rank part goes through a `LoraBackend`; `ReferenceBackend` is plain torch, one segment after another, and the
executable specification of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from alto_kernels.reference import keep_mask
from torch import nn

from alto_training.executor.adapter import ModuleViews
from alto_training.executor.shared_input import SharedInput
from alto_training.executor.tick import CurrentTick, Segment, Tick


class FrozenLinear(Protocol):
    """The backbone's own product, and its derivative by the input."""

    in_features: int
    out_features: int

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return W x + bias, a new [T, N]."""
        ...

    def input_gradient(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """Return dY W, a new [T, K]."""
        ...


class LoraBackend(Protocol):
    """Multiplies a frozen layer and the adapters of a tick. Gradients of A and B go into the adapters' own buffers."""

    name: str

    def prepare(self, tick: Tick) -> None:
        """Do what can be done for a tick before its time; adapters do not change until it begins."""
        ...

    def begin(self, tick: Tick) -> None:
        """Begin a training tick: gradients of segments that begin a batch are to begin from nothing."""
        ...

    def linear(self, x_TK: torch.Tensor, frozen: FrozenLinear, module_index: int, tick: Tick) -> torch.Tensor:
        """Return [T, N], differentiable by `x_TK` [T, K]; `module_index` names the layer in the adapters' views."""
        ...


class LowRankProducts(Protocol):
    """The low-rank part by itself, for back ends that add it to a frozen product made elsewhere."""

    def forward(self, y_TN: torch.Tensor, x_TK: torch.Tensor, module_index: int, tick: Tick) -> Any:
        """Add to `y_TN` in place; return what `backward` needs besides `x_TK`."""
        ...

    def backward(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        saved: Any,
        module_index: int,
        tick: Tick,
        dx_TK: torch.Tensor | None,
    ) -> None:
        """Add the gradients of A and B, and to `dx_TK` in place unless nobody needs it."""
        ...


def clear_gradients(tick: Tick) -> None:
    """Clear the gradients of segments that begin a batch: for back ends that only add to them."""
    for segment in tick.segments:
        if segment.begins_batch and segment.adapter is not None:
            segment.adapter.grad.zero_()


def frozen_plus_low_rank(
    x_TK: torch.Tensor, frozen: FrozenLinear, products: LowRankProducts, module_index: int, tick: Tick
) -> torch.Tensor:
    """Return the frozen product with the low-rank part added, [T, N], differentiable by `x_TK`."""
    y_TN: torch.Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
        x_TK, tick.anchor, frozen, products, module_index, tick
    )
    return y_TN


@dataclass(frozen=True)
class _Saved:
    """What one segment keeps for its backward pass: S = dropout(x) A^T, [t, R], and the mask, [t, K]."""

    segment: Segment
    views: ModuleViews
    scaling: float
    s_tR: torch.Tensor
    keep_tK: torch.Tensor | None


class ReferenceBackend:
    """The low-rank part in plain torch, segment by segment."""

    name = "reference"

    def prepare(self, tick: Tick) -> None:
        """See `LoraBackend.prepare`."""

    def begin(self, tick: Tick) -> None:
        """See `LoraBackend.begin`."""
        clear_gradients(tick)

    def linear(self, x_TK: torch.Tensor, frozen: FrozenLinear, module_index: int, tick: Tick) -> torch.Tensor:
        """See `LoraBackend.linear`."""
        return frozen_plus_low_rank(x_TK, frozen, self, module_index, tick)

    def forward(self, y_TN: torch.Tensor, x_TK: torch.Tensor, module_index: int, tick: Tick) -> list[_Saved]:
        """See `LowRankProducts.forward`."""
        saved = []
        for segment in tick.segments:
            adapter = segment.adapter
            if adapter is None or module_index not in adapter.views:
                continue
            views = adapter.views[module_index]
            x_tK = x_TK[segment.start : segment.end]
            keep_tK = None
            if segment.row_keys_T is not None:
                keep_tK = keep_mask(segment.row_keys_T, module_index, x_tK.shape[1], segment.dropout)
                x_tK = _dropped(x_tK, keep_tK, segment.dropout)
            s_tR = x_tK @ views.a_RK.to(x_tK.dtype).t()
            y_TN[segment.start : segment.end].addmm_(s_tR, views.b_NR.to(x_tK.dtype).t(), alpha=adapter.scaling)
            saved.append(_Saved(segment, views, adapter.scaling, s_tR, keep_tK))
        return saved

    def backward(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        saved: Sequence[_Saved],
        module_index: int,
        tick: Tick,
        dx_TK: torch.Tensor | None,
    ) -> None:
        """See `LowRankProducts.backward`."""
        for part in saved:
            segment, views = part.segment, part.views
            dy_tN = dy_TN[segment.start : segment.end]
            x_tK = x_TK[segment.start : segment.end]
            if part.keep_tK is not None:
                x_tK = _dropped(x_tK, part.keep_tK, segment.dropout)
            ds_tR = (dy_tN @ views.b_NR.to(dy_tN.dtype)).mul_(part.scaling)
            _add_product(views.grad_b_NR, dy_tN.t(), part.s_tR, part.scaling)
            _add_product(views.grad_a_RK, ds_tR.t(), x_tK, 1.0)
            if dx_TK is None:
                continue
            dx_tK = dx_TK[segment.start : segment.end]
            if part.keep_tK is None:
                dx_tK.addmm_(ds_tR, views.a_RK.to(ds_tR.dtype))
            else:
                dx_tK.add_(_dropped(ds_tR @ views.a_RK.to(ds_tR.dtype), part.keep_tK, segment.dropout))


def _dropped(x_tK: torch.Tensor, keep_tK: torch.Tensor, probability: float) -> torch.Tensor:
    # where, not a product with the mask: a value that is not finite must not survive as 0 * inf.
    return torch.where(keep_tK, x_tK, 0.0).mul_(1.0 / (1.0 - probability))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)


class MultiLoraLinear(nn.Module):
    """The backbone's linear layer number `index`, with the adapters of the current tick."""

    def __init__(self, frozen: FrozenLinear, index: int, path: str, backend: LoraBackend, current: CurrentTick) -> None:
        super().__init__()
        self.frozen = frozen
        self.index = index
        self.path = path
        self.backend = backend
        self.current = current
        self.shared_input: SharedInput | None = None
        self.runs_once = True  # in a pass; not where the model uses a layer in several places, or in none

    def adapted_in(self, tick: Tick) -> bool:
        """Return whether an adapter of the tick adapts this layer."""
        return self.index in tick.adapted_layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., K] to [..., N]; the leading dimensions hold the tick's T tokens in order."""
        tick = self.current.require()
        if not self.adapted_in(tick):
            y_TN: torch.Tensor = _FrozenProduct.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
                self._tokens(x), self.frozen
            )
        else:
            shared_TN = None if self.shared_input is None else self.shared_input.output(self, x, tick)
            y_TN = (
                self.backend.linear(self._tokens(x), self.frozen, self.index, tick) if shared_TN is None else shared_TN
            )
        return y_TN.view(*x.shape[:-1], self.frozen.out_features)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.frozen.in_features)


class _FrozenProduct(torch.autograd.Function):
    """The layer without adapters: nothing is kept, and nothing differentiated but the input."""

    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
        ctx.frozen = frozen
        return frozen.product(x_TK)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.frozen.input_gradient(grad_outputs[0]), None


class _AdaptedProduct(torch.autograd.Function):
    """The layer with adapters; their gradients go into their flat buffers, `anchor` only makes the graph reach here."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        anchor: torch.Tensor,
        frozen: FrozenLinear,
        products: LowRankProducts,
        module_index: int,
        tick: Tick,
    ) -> torch.Tensor:
        y_TN = frozen.product(x_TK)
        saved = products.forward(y_TN, x_TK, module_index, tick)
        if tick.training:
            ctx.save_for_backward(x_TK)
            ctx.saved, ctx.frozen, ctx.products = saved, frozen, products
            ctx.module_index, ctx.tick = module_index, tick
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (x_TK,) = ctx.saved_tensors
        dy_TN = grad_outputs[0].contiguous()
        dx_TK = ctx.frozen.input_gradient(dy_TN) if ctx.needs_input_grad[0] else None
        ctx.products.backward(dy_TN, x_TK, ctx.saved, ctx.module_index, ctx.tick, dx_TK)
        ctx.saved = None
        return dx_TK, None, None, None, None, None
