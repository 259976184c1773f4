"""Choosing who multiplies the low-rank part: by name, or by measuring."""

from __future__ import annotations

import time
from collections.abc import Sequence

import alto_kernels
import torch
from alto_kernels import CudaKernels

from alto_training.executor.adapter import AdaptedModule, Adapter
from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.lora_linear import FrozenLinear, LoraBackend, MultiLoraLinear, ReferenceBackend
from alto_training.executor.settings import Backend
from alto_training.executor.tick import Item, PackedSequence, Share, Tick, build_tick

_PROBE_TOKENS = 128  # of each adapter
_PROBE_RANK = 16
_REPETITIONS = 5
_CLEARLY_SLOWER = 1.5


def choose_backend(
    name: str, layers: Sequence[MultiLoraLinear], seats: int, device: torch.device, dtype: torch.dtype
) -> LoraBackend:
    """Return the back end of this name; `auto` takes one that is usable and fast here, measured on one layer.

    `seats` is the largest number of adapters in a tick, `dtype` the activations'.
    """
    if name != Backend.AUTO:
        return _make(name, layers, seats, device, dtype)
    candidates = [_make(candidate, layers, seats, device, dtype) for candidate in _usable(layers, device, dtype)]
    if len(candidates) == 1:
        return candidates[0]
    frozen = max((layer.frozen for layer in layers), key=lambda one: one.in_features * one.out_features)
    tick = _probe_tick(frozen, layers, min(seats, 4), device)
    seconds = [_seconds(backend, frozen, tick, dtype) for backend in candidates]
    # The most specialised one, unless it is clearly slower: two runs on one machine should choose alike, for each back
    # end rounds in its own way.
    return next(
        backend
        for backend, own in reversed(list(zip(candidates, seconds, strict=True)))
        if own <= _CLEARLY_SLOWER * min(seconds)
    )


def _usable(layers: Sequence[MultiLoraLinear], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the back ends that can serve these layers here, from the plainest to the most specialised."""
    others = {Backend.CPU} if device.type == "cpu" else {Backend.CUTLASS}
    if any(layer.frozen.in_features % 8 or layer.frozen.out_features % 8 for layer in layers):
        others.discard(Backend.CUTLASS)
    return [one for one in alto_kernels.backends(dtype) if one == Backend.REFERENCE or one in others]


def _make(
    name: str, layers: Sequence[MultiLoraLinear], seats: int, device: torch.device, dtype: torch.dtype
) -> LoraBackend:
    if name == Backend.REFERENCE:
        return ReferenceBackend()
    shapes = [(layer.frozen.in_features, layer.frozen.out_features) for layer in layers]
    # The kernel that does the frozen product too wants the weight itself.
    kernels = None if all(isinstance(layer.frozen, DenseLinear) for layer in layers) else CudaKernels.GROUPED
    return KernelBackend(name, shapes, seats, device, dtype, kernels)


def _probe_tick(frozen: FrozenLinear, layers: Sequence[MultiLoraLinear], adapters: int, device: torch.device) -> Tick:
    index = next(layer.index for layer in layers if layer.frozen is frozen)
    module = AdaptedModule(index, "", frozen.in_features, frozen.out_features)
    ids = torch.zeros(_PROBE_TOKENS, dtype=torch.int32).numpy()
    shares = []
    for seed in range(adapters):
        adapter = Adapter([module], _PROBE_RANK, 1.0)
        adapter.initialise(seed)
        adapter.move(device)
        shares.append(Share(adapter, [Item((PackedSequence(ids, ids == 0),), denominator=1)]))
    return build_tick(shares, training=True, device=device)


def _seconds(backend: LoraBackend, frozen: FrozenLinear, tick: Tick, dtype: torch.dtype) -> float:
    """Return the time of a layer's forward and backward pass: the best of a few."""
    (index,) = (index for segment in tick.segments[:1] if segment.adapter for index in segment.adapter.views)
    x_TK = torch.randn(tick.tokens, frozen.in_features, dtype=dtype, device=tick.rows_R.device, requires_grad=True)
    best = float("inf")
    for _ in range(_REPETITIONS + 1):
        started = time.perf_counter()
        backend.linear(x_TK, frozen, index, tick).sum().backward()  # type: ignore[no-untyped-call]
        if x_TK.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
