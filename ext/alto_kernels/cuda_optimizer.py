"""Back end `cutlass`: AdamW of many adapters in three launches, without a word back to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from alto_kernels.availability import require_compiled
from alto_kernels.optimizer_settings import AdapterStep
from alto_kernels.streams import current_stream
from alto_kernels.upload import upload


def cuda_adamw_step(adapters: Sequence[AdapterStep], zero_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `optimizer.adamw_step`; return (norm [G], finite [G]) on the device."""
    kernels = require_compiled()
    device = adapters[0].param.device
    packed = bytearray()
    counts: list[int] = []
    for adapter in adapters:
        size = adapter.param.numel()
        addresses = tuple(t.data_ptr() for t in (adapter.param, adapter.grad, adapter.exp_avg, adapter.exp_avg_sq))
        packed += kernels.pack_adamw_adapter(
            (*addresses, size, adapter.b_start, sum(counts)), _constants(adapter), adapter.grad.dtype == torch.bfloat16
        )
        counts.append(-(-size // kernels.adamw_block))
    on_device = upload(torch.frombuffer(packed, dtype=torch.uint8), device)
    partial = torch.empty(sum(counts), dtype=torch.float64, device=device)
    factor, norm = torch.empty(2, len(adapters), device=device)
    finite = torch.empty(len(adapters), dtype=torch.bool, device=device)
    kernels.adamw_step(
        adapters=on_device.data_ptr(),
        partial=partial.data_ptr(),
        factor=factor.data_ptr(),
        norm=norm.data_ptr(),
        finite=finite.data_ptr(),
        adapter_count=len(adapters),
        most_blocks=max(counts),
        zero_grad=zero_grad,
        stream=current_stream(device),
    )
    return norm, finite


def _constants(adapter: AdapterStep) -> list[float]:
    """Return the floats of the C++ struct AdamwAdapter, in its order."""
    beta1, beta2 = adapter.betas
    correction1 = 1.0 - beta1**adapter.step
    return [
        adapter.grad_scale,
        adapter.max_grad_norm,
        1.0 - adapter.lr * adapter.weight_decay,
        1.0 - adapter.lr_b * adapter.weight_decay,
        adapter.lr / correction1,
        adapter.lr_b / correction1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / math.sqrt(1.0 - beta2**adapter.step),
        adapter.eps,
    ]
