"""The optimiser steps of a tick: exactly clip_grad_norm_ and torch.optim.AdamW for each adapter, all in one call.

Nothing is read from the device: whether a step may be taken is found out there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from alto_common.tuning import TrialConfig
from alto_kernels import AdapterStep, adamw_step

from alto_training.executor.adapter import Adapter


def adapter_step(adapter: Adapter, config: TrialConfig, step: int, learning_rate: float) -> AdapterStep:
    """Return what optimiser step `step` (0-based) of an adapter is, at `learning_rate`.

    B learns `lora_plus_ratio` times as fast as A (LoRA+, arXiv 2402.12354).
    """
    return AdapterStep(
        param=adapter.param,
        grad=adapter.grad,
        exp_avg=adapter.buffers["exp_avg"],
        exp_avg_sq=adapter.buffers["exp_avg_sq"],
        step=step + 1,
        lr=learning_rate,
        lr_b=learning_rate * config.lora_plus_ratio,
        b_start=adapter.a_size,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=max(0.0, config.max_grad_norm),
    )


def take_steps(steps: Sequence[tuple[AdapterStep, torch.Tensor]]) -> torch.Tensor:
    """Take each step whose loss (a scalar, given with it) and gradient are finite; return the gradients' norms, [G].

    They stay on the device, are those before the clip, and not finite where a step was not taken. What the gradients
    hold afterwards means nothing.
    """
    if not steps:
        return torch.zeros(0)
    # A loss that is not finite makes the gradient so, by one element: the kernel looks at the gradient alone.
    factors_G = torch.where(torch.isfinite(torch.stack([loss for _, loss in steps])), 1.0, math.nan).float()
    for (step, _), factor in zip(steps, factors_G.unbind(), strict=True):
        step.grad[:1].mul_(factor)
    return adamw_step([step for step, _ in steps]).grad_norm
