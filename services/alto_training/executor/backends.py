"""Choosing who multiplies the low-rank part: by name, or by rule."""

from __future__ import annotations

from collections.abc import Sequence

import alto_kernels
import torch
from alto_kernels import CudaKernels

from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.lora_backend import LoraBackend, ReferenceBackend
from alto_training.executor.lora_linear import MultiLoraLinear
from alto_training.executor.settings import Backend


def choose_backend(
    name: str, layers: Sequence[MultiLoraLinear], seats: int, device: torch.device, dtype: torch.dtype
) -> LoraBackend:
    """Return the back end of this name for at most `seats` adapters a tick, over activations of `dtype`.

    `auto` goes by rule and not by a stopwatch: each back end rounds in its own way, and two runs on one machine are to
    give the same bits. It takes the most specialised of those that can serve these layers here.
    """
    if name == Backend.AUTO:
        name = _usable(layers, device, dtype)[-1]
    return _make(name, layers, seats, device, dtype)


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
    runs_once = all(layer.runs_once for layer in layers)
    return KernelBackend(name, shapes, seats, device, dtype, kernels, may_overwrite=runs_once)
