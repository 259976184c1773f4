"""Copies on streams of their own, beside the computation, each gather launched in one call.

By torch the same takes ten operations and the host 150 us, as long as a GPU has work for a decoder layer of few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alto_kernels.availability import BackendUnavailableError, compiled_module, require_compiled
from alto_kernels.streams import current_stream

# What is copied: its address, the part of the target that it goes to, the lane that copies it, and the address of an
# int32 that is 1 while somebody reads from there, for which the copy waits to be 0; 0 is no address: nobody else does.
Copies = Sequence[tuple[int, int, int, int]]


def copy_lanes_available() -> bool:
    """True when the CUDA build is there; any GPU will do."""
    module = compiled_module()
    return module is not None and bool(module.has_cuda)


class CopyLanes:
    """`lanes` streams of a CUDA device, and targets that copies go to. Raises `BackendUnavailableError` without CUDA.

    Who calls keeps the memory of targets, sources and what says that they are busy while a gather is under way.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        if not copy_lanes_available():
            raise BackendUnavailableError("CopyLanes: built without CUDA, see ext/alto_kernels/README.md")
        self._device = device
        with torch.cuda.device(device):
            self._lanes = require_compiled().CopyLanes(lanes)

    def add_target(self, parts: Sequence[Tensor]) -> int:
        """Return the number of a target of these parts, each contiguous and as long as what is copied to it."""
        return int(self._lanes.add_target([part.data_ptr() for part in parts]))

    def gather(self, target: int, copies: Copies, size_bytes: int) -> None:
        """Launch copies of `size_bytes` each, to begin after all that the current stream has been given."""
        self._lanes.gather(target, copies, size_bytes, current_stream(self._device))

    def wait(self, target: int) -> None:
        """Have what is launched from here on wait for the target's last gather."""
        self._lanes.wait(target, current_stream(self._device))
