"""Which implementations of the kernels are compiled in and usable here."""

from __future__ import annotations

import enum
import importlib
from functools import cache
from types import ModuleType

import torch

_CUTLASS_DTYPES = (torch.bfloat16, torch.float16)


class BackendUnavailableError(RuntimeError):
    """A back end was asked for that is not compiled in, or that has no device here."""


class CudaKernels(enum.StrEnum):
    """The two families of kernels behind the back end `cutlass`.

    `HOPPER` does a frozen product and its adapters in one persistent launch, on compute capability 9.0 alone. `GROUPED`
    adds the adapters to a product of cuBLAS in a few launches, from compute capability 8.0 on.
    """

    HOPPER = "hopper"
    GROUPED = "grouped"


@cache
def compiled_module() -> ModuleType | None:
    """Return `alto_kernels._kernels`, or None where the extension was not built."""
    try:
        return importlib.import_module("alto_kernels._kernels")
    except ModuleNotFoundError:
        return None


def require_compiled() -> ModuleType:
    """Return `alto_kernels._kernels`; raise `BackendUnavailableError` where the extension was not built."""
    module = compiled_module()
    if module is None:
        raise BackendUnavailableError("alto_kernels._kernels is not built: install alto-tuning, or take 'reference'")
    return module


def usable_kernels(
    architectures: str, capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[CudaKernels, ...]:
    """Return the kernels that a build for `architectures` ("80,90a") has for a GPU, the faster first.

    Machine code for 8.0 runs on all of 8.x, and that for 8.6 on 8.6 and later 8.x.

    >>> usable_kernels("80,90a", (8, 9))
    (<CudaKernels.GROUPED: 'grouped'>,)
    """
    if dtype not in _CUTLASS_DTYPES or capability[0] not in (8, 9):
        return ()
    major, minor = capability
    listed = [name.split("-")[0] for name in architectures.split(",")]
    found = []
    if capability == (9, 0) and "90a" in listed:
        found.append(CudaKernels.HOPPER)
    numbers = [int(name.rstrip("af")) for name in listed if name.rstrip("af").isdigit()]
    if any(number // 10 == major and number % 10 <= minor for number in numbers):
        found.append(CudaKernels.GROUPED)
    return tuple(found)


def cuda_kernels(dtype: torch.dtype = torch.bfloat16) -> tuple[CudaKernels, ...]:
    """Return the kernels of back end `cutlass` that run here, the faster first."""
    return () if _why_no_cutlass(dtype) else _kernels_here(dtype)


def cuda_available() -> bool:
    """True when the CUDA kernels are compiled in and a GPU that they run on is there."""
    return bool(cuda_kernels())


def backends(dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Return the names of the usable back ends: always `reference`, then `cpu` and `cutlass` where they are there.

    `dtype` is that of the activations; only `cutlass` is particular about it.
    """
    names = ["reference"]
    if compiled_module() is not None:
        names.append("cpu")
    if cuda_kernels(dtype):
        names.append("cutlass")
    return tuple(names)


def choose(device: torch.device, name: str | None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the back end for tensors on `device`: `name` after a check, or the fastest that is usable."""
    usable = [found for found in backends(dtype) if found == "reference" or (found == "cpu") == (device.type == "cpu")]
    if name is None:
        return usable[-1]
    if name not in usable:
        why = _why_no_cutlass(dtype) if name == "cutlass" else None
        raise BackendUnavailableError(
            f"backend={name!r} is not usable on {device.type}{f' ({why})' if why else ''}; usable: {', '.join(usable)}"
        )
    return name


def choose_kernels(dtype: torch.dtype, wanted: CudaKernels | None) -> CudaKernels:
    """Return the kernels of back end `cutlass` for activations of `dtype`: `wanted` after a check, or the fastest."""
    why = _why_no_cutlass(dtype)
    if why is not None:
        raise BackendUnavailableError(f"backend='cutlass': {why}; take 'reference'")
    usable = _kernels_here(dtype)
    if wanted is None:
        return usable[0]
    if wanted not in usable:
        raise BackendUnavailableError(f"kernels={wanted.value!r}: not for {dtype} here; usable: {', '.join(usable)}")
    return wanted


def _kernels_here(dtype: torch.dtype) -> tuple[CudaKernels, ...]:
    return usable_kernels(require_compiled().cuda_architectures, torch.cuda.get_device_capability(), dtype)


def _why_no_cutlass(dtype: torch.dtype) -> str | None:
    """Return why no kernel of `cutlass` runs here, None where one does."""
    module = compiled_module()
    if module is None or not module.has_cuda:
        return "built without CUDA, see ext/alto_kernels/README.md"
    if not torch.cuda.is_available():
        return "no GPU"
    if dtype not in _CUTLASS_DTYPES:
        return f"takes bfloat16 or float16, not {dtype}"
    if not _kernels_here(dtype):
        major, minor = torch.cuda.get_device_capability()
        return (
            f"built for {module.cuda_architectures}, this GPU has compute capability {major}.{minor}; "
            "there are kernels for 8.x and 9.0"
        )
    return None
