"""Memory of a GPU apart from its addresses: mapped in several places, and given to other processes of the host.

It is not torch's: its allocator neither counts it nor has it back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from alto_kernels.availability import require_compiled


class PhysicalMemory:
    """`size_bytes` of memory, freed when no process has it or a tensor over it any more."""

    def __init__(self, compiled: Any, size_bytes: int) -> None:
        self.compiled = compiled
        self.size_bytes = size_bytes

    def share(self) -> int:
        """Return a new file descriptor for another process; who asks closes it."""
        return int(self.compiled.share())


def granularity(device: torch.device) -> int:
    """Return what sizes of memory must be multiples of, in bytes: 2 MiB."""
    with torch.cuda.device(device):
        return int(require_compiled().memory_granularity())


def make_memory(device: torch.device, size_bytes: int) -> PhysicalMemory:
    """Return new memory of a GPU, its content undefined. Raises `MemoryError`."""
    with torch.cuda.device(device):
        try:
            return PhysicalMemory(require_compiled().PhysicalMemory(size_bytes), size_bytes)
        except MemoryError:
            torch.cuda.empty_cache()  # what torch keeps and does not use
            return PhysicalMemory(require_compiled().PhysicalMemory(size_bytes), size_bytes)


def memory_can_be_given(device: torch.device) -> bool:
    """Return whether other processes can have memory of this GPU, by trying it: on some virtual GPUs they cannot."""
    try:
        os.close(make_memory(device, granularity(device)).share())
    except RuntimeError:
        return False
    return True


def memory_of(device: torch.device, descriptor: int, size_bytes: int) -> PhysicalMemory:
    """Return the memory, on whatever GPU, that another process gave by `share`; the descriptor stays open."""
    with torch.cuda.device(device):
        return PhysicalMemory(require_compiled().PhysicalMemory.of_descriptor(descriptor, size_bytes), size_bytes)


def mapped(device: torch.device, parts: Sequence[PhysicalMemory], dtype: torch.dtype) -> Tensor:
    """Return one flat tensor of `device` over all parts, side by side; it keeps them.

    The same memory may lie under several tensors. What is written by one is read by another in the order of a stream.
    Parts of other GPUs are read and written over the link between them.
    """
    with torch.cuda.device(device):
        capsule = require_compiled().mapped([part.compiled for part in parts])
        tensor: Tensor = dlpack.from_dlpack(capsule)
        return tensor.view(dtype)
