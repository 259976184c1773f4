"""Where a sharded backbone reads its weights from: one tensor at a time, by the model's own names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from alto_training.executor.randomness import generator
from alto_training.sharding.errors import ShardedLoadError


class WeightSource(Protocol):
    """Gives tensors by the names of `model.named_parameters()`."""

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the tensor `name`, whole, in `dtype` on `device`."""
        ...


class SafetensorsFolder:
    """A model folder as transformers saves it: model.safetensors, or several files and their index.

    `prefix` is the model's own base prefix ("model", "transformer"), which some folders have in their names and some
    have not. Raises `ShardedLoadError` for a tensor that is not there or has another shape.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        else:
            self._file_of = dict.fromkeys(_names(folder / "model.safetensors"), folder / "model.safetensors")
        self._folder = folder
        self._prefix = f"{prefix}."

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightSource.read`."""
        from safetensors import safe_open

        stored = next((one for one in self._spellings(name) if one in self._file_of), None)
        if stored is None:
            raise ShardedLoadError(f"{self._folder} holds no tensor {name}", "train this model without sharding")
        with safe_open(self._file_of[stored], framework="pt") as tensors:
            found: torch.Tensor = tensors.get_tensor(stored)
        if found.shape != shape:
            raise ShardedLoadError(
                f"{stored} in {self._folder} is {tuple(found.shape)}, not {tuple(shape)}",
                "train this model without sharding",
            )
        return found.to(device=device, dtype=dtype)

    def _spellings(self, name: str) -> tuple[str, ...]:
        return name, name.removeprefix(self._prefix), self._prefix + name


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn by name and shape, for measuring shapes of which no weights are at hand.

    The smaller `deviation`, the less a deep model makes of roundings: see the check of packing.
    """

    deviation: float = 0.02

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return N(0, deviation), or ones for a vector: the same on every rank."""
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype, device=device)
        drawn = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            return drawn.normal_(0.0, self.deviation, generator=generator(name))
        seeded = torch.Generator(device).manual_seed(generator(name).initial_seed())
        return drawn.normal_(0.0, self.deviation, generator=seeded)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules made within keep their buffers, and their parameters' shapes alone."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_shape  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(module: nn.Module, names: dict[nn.Parameter, str], source: WeightSource, device: torch.device) -> None:
    """Give `module` its whole weights in place of the shapes on meta; a parameter that is shared stays shared."""
    read: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for attribute, shape in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            if id(shape) not in read:
                tensor = source.read(names[shape], shape.shape, shape.dtype, device)
                read[id(shape)] = nn.Parameter(tensor, requires_grad=False)
            child.register_parameter(attribute, read[id(shape)])


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    if not path.is_file():
        raise ShardedLoadError(f"there is no {path}", "give a folder with the model in safetensors")
    with safe_open(path, framework="pt") as tensors:
        names: Any = tensors.keys()
    return list(names)
