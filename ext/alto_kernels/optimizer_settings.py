"""What one adapter's optimiser step needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class AdapterStep:
    """One AdamW step of one adapter over its flat buffers, each [P] and contiguous: `grad` fp32 or bf16, the rest fp32.

    A bf16 gradient is widened as it is read; its norm and the step are computed in fp32 like those of any other.

    `step` counts from 1. Elements from `b_start` on are those of B matrices and learn at `lr_b` (LoRA+); the others at
    `lr`. The gradient is multiplied by `grad_scale`, then clipped to `max_grad_norm` (0: not clipped).
    """

    param: torch.Tensor = field(repr=False)
    grad: torch.Tensor = field(repr=False)
    exp_avg: torch.Tensor = field(repr=False)
    exp_avg_sq: torch.Tensor = field(repr=False)
    step: int
    lr: float
    lr_b: float
    b_start: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        size = self.param.numel()
        for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
            tensor: torch.Tensor = getattr(self, name)
            dtypes = _GRADIENT_DTYPES if name == "grad" else (torch.float32,)
            if tensor.dtype not in dtypes or not tensor.is_contiguous() or tuple(tensor.shape) != (size,):
                wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(f"{name}: must be contiguous {wanted} of shape ({size},)")
            if tensor.device != self.param.device:
                raise ValueError(f"{name}: on {tensor.device}, must be on {self.param.device} as param is")
        if self.step < 1:
            raise ValueError(f"step={self.step}: must be at least 1")
        if not 0 <= self.b_start <= size:
            raise ValueError(f"b_start={self.b_start}: must be in [0, {size}]")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: both must be in [0, 1)")
