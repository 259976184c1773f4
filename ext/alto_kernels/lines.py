"""What kernels that read and write 16-bit tensors 16 bytes at once ask of a tensor; `csrc/cuda/lines.cuh` beside it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from alto_kernels.availability import cuda_kernels

LINE = 8  # elements that are read at once
_BYTES = 16


def takes_lines(tensor: Tensor) -> bool:
    """Return whether the kernels serve this format on this device."""
    return tensor.is_cuda and _has_kernels(tensor.dtype)


def in_lines(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous, at an address that lines can be read from."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _BYTES == 0 else tensor.clone()


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    return bool(cuda_kernels(dtype))
