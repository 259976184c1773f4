"""Layers that read one input (q, k and v; gate and up), multiplied together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from alto_training.executor.tick import Tick

if TYPE_CHECKING:
    from alto_training.executor.lora_linear import MultiLoraLinear


class Projections:
    """Layers of one input. Weights are looked up at each use: a sharded backbone lets go of them between passes."""

    def __init__(self, layers: Sequence[MultiLoraLinear]) -> None:
        self.layers = tuple(layers)
        self.in_features = layers[0].frozen.in_features

    def adapted_in(self, tick: Tick) -> bool:
        """Return whether an adapter of the tick adapts one of the layers."""
        return any(layer.index in tick.adapted_layers for layer in self.layers)

    def outputs(self, x: torch.Tensor, tick: Tick) -> tuple[torch.Tensor, ...]:
        """Return [T, N] of each layer, differentiable by `x`, [..., K]."""
        anchor = tick.anchor if self.adapted_in(tick) else None
        outputs: tuple[torch.Tensor, ...] = _Projected.apply(  # type: ignore[no-untyped-call]  # torch has no types
            x.reshape(-1, self.in_features), anchor, self, tick
        )
        return outputs

    def forward(self, x_TK: torch.Tensor, tick: Tick) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return [T, N] of each layer, and what `backward` needs, outside of autograd."""
        adapted = self._adapted(tick)
        if not adapted:
            return [layer.frozen.product(x_TK) for layer in self.layers], []
        layers = [self.layers[place] for place in adapted]
        outputs, kept = layers[0].backend.forward(x_TK, layers, tick)
        if len(adapted) < len(self.layers):
            found = dict(zip(adapted, outputs, strict=True))
            outputs = [
                found[place] if place in found else layer.frozen.product(x_TK)
                for place, layer in enumerate(self.layers)
            ]
        return outputs, [x_TK, *kept]

    def backward(
        self, dys_TN: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], tick: Tick, needs_dx: bool
    ) -> torch.Tensor | None:
        """Add the adapters' gradients; return that of the input, [T, K], None where nobody needs it."""
        adapted = self._adapted(tick)
        dx_TK = None
        if adapted:
            layers = [self.layers[place] for place in adapted]
            of_adapted = [dys_TN[place] for place in adapted]
            dx_TK = layers[0].backend.backward(of_adapted, kept[0], kept[1:], layers, tick, needs_dx)
        if needs_dx and len(adapted) < len(self.layers):
            for place, layer in enumerate(self.layers):
                if place not in adapted:
                    dx_TK = layer.frozen.input_gradient(dys_TN[place], dx_TK)
        return dx_TK

    def _adapted(self, tick: Tick) -> list[int]:
        """Return the places of the layers that an adapter of the tick adapts."""
        return [place for place, layer in enumerate(self.layers) if layer.index in tick.adapted_layers]


class _Projected(torch.autograd.Function):
    """Adapters' gradients go into their flat buffers; `anchor`, there if any are, only makes the graph reach here."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, anchor: torch.Tensor | None, projections: Projections, tick: Tick
    ) -> tuple[torch.Tensor, ...]:
        outputs, kept = projections.forward(x_TK, tick)
        if tick.training:
            ctx.save_for_backward(*kept)
            ctx.projections, ctx.tick = projections, tick
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        dys_TN = [gradient.contiguous() for gradient in gradients]
        return ctx.projections.backward(dys_TN, ctx.saved_tensors, ctx.tick, ctx.needs_input_grad[0]), None, None, None


class SharedInput:
    """Layers that the model calls by itself, with the same tensor, one after another: the first call does it for all.

    What waits for a layer belongs to one tensor and one tick: a call with another finds nothing and computes anew, as
    recomputation in the backward pass does.
    """

    def __init__(self, layers: Sequence[MultiLoraLinear]) -> None:
        self.projections = Projections(layers)
        self._x: torch.Tensor | None = None
        self._tick: Tick | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, layer: MultiLoraLinear, x: torch.Tensor, tick: Tick) -> torch.Tensor:
        """Return [T, N] of `layer`."""
        if x is not self._x or tick is not self._tick or layer.index not in self._waiting:
            outputs = self.projections.outputs(x, tick)
            self._x, self._tick = x, tick
            self._waiting = {one.index: y_TN for one, y_TN in zip(self.projections.layers, outputs, strict=True)}
        y_TN = self._waiting.pop(layer.index)
        if not self._waiting:
            self.forget()
        return y_TN

    def forget(self) -> None:
        """Let go of what nobody came for."""
        self._x, self._tick, self._waiting = None, None, {}


@contextmanager
def shared_inputs_found(layers: Sequence[MultiLoraLinear]) -> Iterator[None]:
    """While the model runs once, see which layers get the same tensor one after another, and join those.

    Each layer is told whether it runs exactly once in the pass.
    """
    calls: list[tuple[MultiLoraLinear, torch.Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append((module, args[0]))) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    counts = Counter(layer for layer, _ in calls)
    for layer in layers:
        layer.runs_once = counts[layer] == 1
    for _, same in groupby(calls, key=lambda call: id(call[1])):
        joined = [layer for layer, _ in same]
        if len(joined) > 1 and len(set(joined)) == len(joined):
            shared = SharedInput(joined)
            for layer in joined:
                layer.shared_input = shared
