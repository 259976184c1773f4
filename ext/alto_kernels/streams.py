"""The stream that kernels are launched on."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> int:
    """Return the address of the current stream of a CUDA device.

    Asked as torch's own compiler does: a `torch.cuda.Stream` for each launch takes the host as long as the launch.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))
