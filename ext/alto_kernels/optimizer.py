"""The optimiser step of many adapters at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alto_kernels import reference
from alto_kernels.availability import choose, require_compiled
from alto_kernels.optimizer_settings import AdapterStep

__all__ = ["AdapterStep", "StepReport", "adamw_step"]


@dataclass(frozen=True)
class StepReport:
    """What a step found, one entry an adapter, on the adapters' device: no synchronisation was needed to make it.

    `grad_norm` [G] fp32, after scaling and before clipping. `finite` [G] bool: where False the adapter was not stepped.
    """

    grad_norm: torch.Tensor
    finite: torch.Tensor


def adamw_step(adapters: Sequence[AdapterStep], zero_grad: bool = False, backend: str | None = None) -> StepReport:
    """Step every adapter by AdamW in fp32, as clip_grad_norm_ and torch.optim.AdamW would step each alone.

    Gradients may be bf16, of some adapters or all. Decoupled weight decay, bias correction by the adapter's own step
    count. An adapter with a gradient that is not finite keeps its weights and moments and is reported; the others are
    unaffected. `zero_grad` clears the gradients, also of adapters that were not stepped.
    """
    if not adapters:
        return StepReport(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    device = adapters[0].param.device
    for i, adapter in enumerate(adapters):
        if adapter.param.device != device:
            raise ValueError(f"adapters[{i}]: on {adapter.param.device}, must be on {device} as the first is")
    chosen = choose(device, backend)
    if chosen == "cutlass":
        from alto_kernels.cuda_optimizer import cuda_adamw_step

        return StepReport(*cuda_adamw_step(adapters, zero_grad))
    if chosen == "cpu":
        outcomes = _cpu_step(adapters, zero_grad)
    else:
        outcomes = [reference.adamw_step(adapter) for adapter in adapters]
        if zero_grad:
            for adapter in adapters:
                adapter.grad.zero_()
    norms, finite = zip(*outcomes, strict=True)
    return StepReport(torch.tensor(norms, device=device), torch.tensor(finite, device=device))


def _cpu_step(adapters: Sequence[AdapterStep], zero_grad: bool) -> list[tuple[float, bool]]:
    kernels = require_compiled()
    steps = [
        kernels.CpuAdapterStep(
            param=adapter.param.data_ptr(),
            grad=adapter.grad.data_ptr(),
            grad_is_bfloat16=adapter.grad.dtype == torch.bfloat16,
            exp_avg=adapter.exp_avg.data_ptr(),
            exp_avg_sq=adapter.exp_avg_sq.data_ptr(),
            count=adapter.param.numel(),
            b_start=adapter.b_start,
            step=adapter.step,
            lr=adapter.lr,
            lr_b=adapter.lr_b,
            beta1=adapter.betas[0],
            beta2=adapter.betas[1],
            eps=adapter.eps,
            weight_decay=adapter.weight_decay,
            max_grad_norm=adapter.max_grad_norm,
            grad_scale=adapter.grad_scale,
        )
        for adapter in adapters
    ]
    outcomes: list[tuple[float, bool]] = kernels.cpu_adamw_step(
        adapters=steps, zero_grad=zero_grad, threads=torch.get_num_threads()
    )
    return outcomes
