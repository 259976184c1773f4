"""alto_kernels: the low-rank part of linear layers for many adapters at once, on the CPU and on NVIDIA GPUs.

An `AdapterTable` knows where the weights and gradients of each slot's adapter lie; a `TickPlan` says which tokens of
the packed axis belong to which slot; `lora_linear` and `lora_linears` are then a frozen product and all its adapters,
with gradients; `adamw_step` steps many adapters at once. `reference` is the same in plain torch, slow and obvious.
"""

from alto_kernels.availability import (
    BackendUnavailableError,
    CudaKernels,
    backends,
    cuda_available,
    cuda_kernels,
)
from alto_kernels.linear import lora_linear, lora_linears, low_rank_backward, low_rank_forward
from alto_kernels.optimizer import AdapterStep, StepReport, adamw_step
from alto_kernels.plan import TickPlan
from alto_kernels.table import AdapterTable, AdapterWeights

__all__ = [
    "AdapterStep",
    "AdapterTable",
    "AdapterWeights",
    "BackendUnavailableError",
    "CudaKernels",
    "StepReport",
    "TickPlan",
    "adamw_step",
    "backends",
    "cuda_available",
    "cuda_kernels",
    "lora_linear",
    "lora_linears",
    "low_rank_backward",
    "low_rank_forward",
]
