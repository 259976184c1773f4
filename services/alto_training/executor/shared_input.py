"""Layers that read one input (q, k and v; gate and up), multiplied together: the first to be called does it for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from alto_training.executor.tick import Tick

if TYPE_CHECKING:
    from alto_training.executor.lora_linear import FrozenLinear, MultiLoraLinear


@runtime_checkable
class InputSharing(Protocol):
    """A back end that reads an input once for several layers, where `shares_input` says that it pays."""

    def shares_input(self, frozen: Sequence[FrozenLinear]) -> bool:
        """Return whether these layers are better multiplied together."""
        ...

    def linears(
        self, x_TK: torch.Tensor, frozen: Sequence[FrozenLinear], module_indices: Sequence[int], tick: Tick
    ) -> list[torch.Tensor]:
        """Return what `LoraBackend.linear` returns, for each layer."""
        ...


class SharedInput:
    """Layers that the model gives the same tensor, one after another.

    What waits for a layer belongs to one tensor and one tick: a call with another finds nothing and computes anew, as
    recomputation in the backward pass does.
    """

    def __init__(self, layers: Sequence[MultiLoraLinear]) -> None:
        self.layers = tuple(layers)
        self._backend: object = None
        self._sharing: InputSharing | None = None  # the back end, where it shares inputs
        self._x: torch.Tensor | None = None
        self._tick: Tick | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, layer: MultiLoraLinear, x: torch.Tensor, tick: Tick) -> torch.Tensor | None:
        """Return [T, N] of `layer`, which adapters of the tick adapt; None if it is to be multiplied by itself."""
        if x is not self._x or tick is not self._tick or layer.index not in self._waiting:
            if layer.backend is not self._backend:
                self._backend = layer.backend
                self._sharing = layer.backend if isinstance(layer.backend, InputSharing) else None
            if self._sharing is None:
                return None
            adapted = [one for one in self.layers if one.adapted_in(tick)]
            frozen = [one.frozen for one in adapted]
            if len(adapted) < 2 or not self._sharing.shares_input(frozen):
                return None
            indices = [one.index for one in adapted]
            outputs = self._sharing.linears(x.reshape(-1, layer.frozen.in_features), frozen, indices, tick)
            self._x, self._tick, self._waiting = x, tick, dict(zip(indices, outputs, strict=True))
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
