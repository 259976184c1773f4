"""Copies on a stream of their own, beside the computation, each gather launched in one call.

By torch the same takes ten operations and the host 150 us, as long as a GPU has work for a decoder layer of few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alto_kernels.availability import BackendUnavailableError, compiled_module, require_compiled
from alto_kernels.streams import current_stream

# What is copied: its address, the part of the target that it goes to, and the address of an int32 that is 1 while
# somebody reads from there, for which the copy waits to be 0; 0 is no address: nobody else does.
Copies = Sequence[tuple[int, int, int]]


def copy_lane_available() -> bool:
    """True when the CUDA build is there; any GPU will do."""
    module = compiled_module()
    return module is not None and bool(module.has_cuda)


class CopyLane:
    """A stream of a CUDA device, and targets that copies go to. Raises `BackendUnavailableError` without CUDA.

    Who calls keeps the memory of targets, sources and what says that they are busy while a gather is under way.
    """

    def __init__(self, device: torch.device) -> None:
        if not copy_lane_available():
            raise BackendUnavailableError("CopyLane: built without CUDA, see ext/alto_kernels/README.md")
        self._device = device
        with torch.cuda.device(device):
            self._lane = require_compiled().CopyLane()

    def add_target(self, parts: Sequence[int]) -> int:
        """Return the number of a target with parts at these addresses, each as long as what is copied to it."""
        return int(self._lane.add_target(list(parts)))

    def gather(self, target: int, copies: Copies, size_bytes: int) -> None:
        """Launch copies of `size_bytes` each, to begin after all that the current stream has been given."""
        self._lane.gather(target, copies, size_bytes, current_stream(self._device))

    def wait(self, target: int) -> None:
        """Have what is launched from here on wait for the target's last gather."""
        self._lane.wait(target, current_stream(self._device))
