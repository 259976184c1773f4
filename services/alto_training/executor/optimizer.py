"""The optimiser step of one adapter: exactly clip_grad_norm_ and torch.optim.AdamW, on flat buffers."""

from __future__ import annotations

import math

import torch
from alto_common.tuning import TrialConfig

from alto_training.executor.adapter import Adapter

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


def gradient_norm(adapter: Adapter) -> float:
    """Return the Euclidean norm of the whole gradient; not finite if any element is not."""
    return float(torch.linalg.vector_norm(adapter.grad))


def adamw_step(adapter: Adapter, config: TrialConfig, step: int, learning_rate: float, norm: float) -> None:
    """Take optimiser step `step` (0-based) at `learning_rate` and zero the gradient.

    `norm` is the gradient's (`gradient_norm`). B learns `lora_plus_ratio` times as fast as A (LoRA+, arXiv 2402.12354).
    Decoupled weight decay, bias correction and epsilon as in torch.optim.AdamW.
    """
    if config.max_grad_norm > 0:
        adapter.grad.mul_(min(1.0, config.max_grad_norm / (norm + _CLIP_EPSILON)))
    if config.lora_plus_ratio == 1.0:
        _adamw(adapter.buffers, slice(None), config, step, learning_rate)
    else:
        _adamw(adapter.buffers, slice(0, adapter.a_size), config, step, learning_rate)
        _adamw(adapter.buffers, slice(adapter.a_size, None), config, step, learning_rate * config.lora_plus_ratio)
    adapter.grad.zero_()


def _adamw(buffers: dict[str, torch.Tensor], part: slice, config: TrialConfig, step: int, learning_rate: float) -> None:
    param_P, grad_P = buffers["param"][part], buffers["grad"][part]
    exp_avg_P, exp_avg_sq_P = buffers["exp_avg"][part], buffers["exp_avg_sq"][part]
    if config.weight_decay != 0.0:
        param_P.mul_(1.0 - learning_rate * config.weight_decay)
    exp_avg_P.lerp_(grad_P, 1.0 - config.adam_beta1)
    exp_avg_sq_P.mul_(config.adam_beta2).addcmul_(grad_P, grad_P, value=1.0 - config.adam_beta2)
    bias_correction_1 = 1.0 - config.adam_beta1 ** (step + 1)
    bias_correction_2 = 1.0 - config.adam_beta2 ** (step + 1)
    denominator_P = exp_avg_sq_P.sqrt().div_(math.sqrt(bias_correction_2)).add_(config.adam_epsilon)
    param_P.addcdiv_(exp_avg_P, denominator_P, value=-learning_rate / bias_correction_1)
