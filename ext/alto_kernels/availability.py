"""Which implementations of the kernels are compiled in and usable here."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


class BackendUnavailableError(RuntimeError):
    """A back end was asked for that is not compiled in, or that has no device here."""


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


def cuda_available() -> bool:
    """True when the CUDA kernels are compiled in and a GPU of compute capability 9.0, their target, is there."""
    module = compiled_module()
    if module is None or not module.has_cuda or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == (9, 0)


def backends() -> tuple[str, ...]:
    """Return the names of the usable back ends: always `reference`, then `cpu` and `cutlass` where they are there."""
    names = ["reference"]
    if compiled_module() is not None:
        names.append("cpu")
    if cuda_available():
        names.append("cutlass")
    return tuple(names)


def choose(device: torch.device, name: str | None) -> str:
    """Return the back end for tensors on `device`: `name` after a check, or the fastest that is usable."""
    usable = [found for found in backends() if found == "reference" or (found == "cpu") == (device.type == "cpu")]
    if name is None:
        return usable[-1]
    if name not in usable:
        raise BackendUnavailableError(f"backend={name!r} is not usable on {device.type}; usable: {', '.join(usable)}")
    return name
