"""One LoRA adapter: its layout over the backbone, and its weights, gradients and optimiser state in flat buffers.

All A matrices lie first, then all B matrices, with views for each module. A checkpoint is then four tensors, the
gradient norm one reduction, and an optimiser step a few vector operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alto_training.executor.randomness import generator

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class AdaptedModule:
    """A linear layer of the backbone that an adapter adds to; `index` is its place among all linear layers."""

    index: int
    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModuleViews:
    """Views into an adapter's flat buffers for one module: A is [R, K], B is [N, R]."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    grad_a_RK: torch.Tensor
    grad_b_NR: torch.Tensor


class Adapter:
    """Weights, gradients and AdamW moments of one trial, in fp32, on one device.

    `buffers` are named `param`, `grad`, `exp_avg`, `exp_avg_sq`, each [P]. `views` maps a module's index to its views.
    A new adapter is shapes alone (torch's meta device) until it is given contents. The gradient adds up over the ticks
    of an effective batch, from nothing in its first; between two batches what it holds means nothing.
    """

    BUFFERS = ("param", "grad", "exp_avg", "exp_avg_sq")

    def __init__(self, modules: Sequence[AdaptedModule], lora_rank: int, scaling: float) -> None:
        self.modules = tuple(modules)
        self.lora_rank = lora_rank
        self.scaling = scaling
        self.a_size = sum(lora_rank * module.in_features for module in self.modules)
        self.size = self.a_size + sum(module.out_features * lora_rank for module in self.modules)
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[int, ModuleViews] = {}
        self.load({name: torch.empty(self.size, device="meta") for name in self.BUFFERS})

    @property
    def param(self) -> torch.Tensor:
        """The weights, [P]."""
        return self.buffers["param"]

    @property
    def grad(self) -> torch.Tensor:
        """The gradient of the effective batch so far, [P]."""
        return self.buffers["grad"]

    def load(self, buffers: dict[str, torch.Tensor]) -> None:
        """Take over these buffers (no copy) and renew the views."""
        self.buffers = buffers
        self.views = {}
        a_offset, b_offset = 0, self.a_size
        for module in self.modules:
            a_shape = (self.lora_rank, module.in_features)
            b_shape = (module.out_features, self.lora_rank)
            a_end = a_offset + math.prod(a_shape)
            b_end = b_offset + math.prod(b_shape)
            self.views[module.index] = ModuleViews(
                a_RK=self.param[a_offset:a_end].view(a_shape),
                b_NR=self.param[b_offset:b_end].view(b_shape),
                grad_a_RK=self.grad[a_offset:a_end].view(a_shape),
                grad_b_NR=self.grad[b_offset:b_end].view(b_shape),
            )
            a_offset, b_offset = a_end, b_end

    def allocate(self, device: torch.device = _HOST) -> None:
        """Give it contents on `device`: zeros."""
        self.load({name: torch.zeros(self.size, device=device) for name in self.BUFFERS})

    def initialise(self, seed: int, device: torch.device = _HOST) -> None:
        """Draw A as PEFT does (Kaiming uniform with a = sqrt 5) from the trial's own generator; all else is 0.

        The draws are the host's, whatever the device.
        """
        draws = generator(seed, "initial weights")
        all_a = torch.empty(self.a_size)
        end = 0
        for module in self.modules:
            start, end = end, end + self.lora_rank * module.in_features
            a_RK = all_a[start:end].view(self.lora_rank, module.in_features)
            torch.nn.init.kaiming_uniform_(a_RK, a=math.sqrt(5), generator=draws)
        self.allocate(device)
        self.param[: self.a_size].copy_(all_a)

    def move(self, device: torch.device) -> None:
        """Carry all buffers to `device`: onto the accelerator for a slot, to the host to be parked.

        Shapes alone have nothing to carry.
        """
        here = self.param.device
        # "cuda" without a number is where it is: to make all views anew takes a millisecond, for each adapter and tick.
        if not self.is_empty and (here.type != device.type or device.index not in (None, here.index)):
            self.load({name: buffer.to(device) for name, buffer in self.buffers.items()})

    @property
    def is_empty(self) -> bool:
        """Whether the buffers are shapes alone: another worker rank has the contents, or there are none yet."""
        return self.param.is_meta

    def leave(self) -> None:
        """Let go of the contents; shapes and views stay, and arithmetic on them does nothing."""
        if self.is_empty:
            return
        self.load({name: buffer.to("meta") for name, buffer in self.buffers.items()})

    def weights_on_host(self) -> torch.Tensor:
        """Return a copy of the weights in host memory, [P]; the shape alone where there is no more."""
        return self.param if self.is_empty else self.param.to("cpu", copy=True)

    def matrices(self, param_P: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return (A [R, K], B [N, R]) by module path, as views of `param_P`, laid out as this adapter's weights."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        a_offset, b_offset = 0, self.a_size
        for module in self.modules:
            a_end = a_offset + self.lora_rank * module.in_features
            b_end = b_offset + self.lora_rank * module.out_features
            found[module.path] = (
                param_P[a_offset:a_end].view(self.lora_rank, module.in_features),
                param_P[b_offset:b_end].view(module.out_features, self.lora_rank),
            )
            a_offset, b_offset = a_end, b_end
        return found
