"""Random tables and plans for the kernel tests, and the float64 oracle they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from alto_kernels import AdapterTable, CudaKernels, TickPlan, reference


@dataclass
class Case:
    """Adapters by slot, given as (rank, dropout, modules), over linear layers of the given shapes."""

    shapes: Sequence[tuple[int, int]]
    adapters: dict[int, tuple[int, float, Sequence[int]]]
    slots: Sequence[int]
    offsets: Sequence[int]
    seed: int = 0
    tensors: dict[int, dict[int, tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    def table(
        self,
        backend: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernels: CudaKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> AdapterTable:
        """Seat the adapters; weights are rounded to `dtype`, so that the oracle sees what the kernels see."""
        draws = torch.Generator().manual_seed(self.seed)
        slots = max([*self.adapters, 0]) + 1
        table = AdapterTable(self.shapes, slots, device, backend, dtype, kernels, gradient_dtype)
        self.tensors = {}
        for slot, (rank, dropout, modules) in self.adapters.items():
            weights = {}
            for module in modules:
                in_features, out_features = self.shapes[module]
                a_RK = torch.randn(rank, in_features, generator=draws) / in_features**0.5
                b_NR = torch.randn(out_features, rank, generator=draws) / rank**0.5
                grad_a_RK = torch.randn(rank, in_features, generator=draws).to(gradient_dtype)
                grad_b_NR = torch.randn(out_features, rank, generator=draws).to(gradient_dtype)
                rounded = (a_RK.to(dtype).float(), b_NR.to(dtype).float(), grad_a_RK, grad_b_NR)
                weights[module] = tuple(tensor.to(device) for tensor in rounded)
            self.tensors[slot] = weights
            table.set_slot(slot, rank=rank, scale=0.5 + slot, weights=weights, dropout=dropout)
        return table

    def plan(self, table: AdapterTable, training: bool = True, fresh: Sequence[int] = ()) -> TickPlan:
        keys = torch.randint(-(2**31), 2**31, (self.offsets[-1],), generator=torch.Generator().manual_seed(self.seed))
        return TickPlan(table, self.slots, self.offsets, keys.to(torch.int32), training, fresh)

    def rows(self, features: int, seed: int) -> torch.Tensor:
        return torch.randn(self.offsets[-1], features, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||found - expected|| / ||expected||; NaN never passes a comparison."""
    found, expected = found.double().cpu(), expected.double().cpu()
    scale = expected.norm().item()
    return (found - expected).norm().item() / scale if scale else found.norm().item()


@dataclass
class Outcome:
    """What a forward and backward pass gave; gradients by (slot, module)."""

    ys: list[torch.Tensor]
    dx: torch.Tensor
    grads: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


def float64_oracle(
    case: Case,
    xs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    dys: Sequence[torch.Tensor],
    modules: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype = torch.float32,
) -> Outcome:
    """Run the case through autograd in float64 with nothing of the package but the dropout mask."""
    table = case.table("reference", device, dtype, gradient_dtype=gradient_dtype)
    plan = case.plan(table)
    x = xs.double().to(device).requires_grad_()
    ys, grads = [], {}
    leaves = {}
    for weight, module in zip(weights, modules, strict=True):
        parts = []
        y = x @ weight.double().to(device).t()
        for slot, start, stop in zip(case.slots, case.offsets[:-1], case.offsets[1:], strict=True):
            part = y[start:stop]
            if slot >= 0 and module in case.tensors[slot]:
                a, b, *_ = (tensor.double() for tensor in case.tensors[slot][module])
                a, b = a.requires_grad_(), b.requires_grad_()
                leaves[slot, module] = (a, b)
                inside = x[start:stop]
                dropout = case.adapters[slot][1]
                if dropout and stop > start:
                    assert plan.row_keys is not None
                    keep = reference.keep_mask(plan.row_keys[start:stop], module, x.shape[1], dropout)
                    inside = torch.where(keep, inside / (1 - dropout), 0.0)
                part = part + (0.5 + slot) * (inside @ a.t() @ b.t())
            parts.append(part)
        ys.append(torch.cat(parts))
    sum((y * dy.double().to(device)).sum() for y, dy in zip(ys, dys, strict=True)).backward()
    for (slot, module), (a, b) in leaves.items():
        _, _, grad_a, grad_b = case.tensors[slot][module]
        zero_a, zero_b = torch.zeros_like(a), torch.zeros_like(b)
        grads[slot, module] = (
            grad_a.double() + (zero_a if a.grad is None else a.grad),
            grad_b.double() + (zero_b if b.grad is None else b.grad),
        )
    assert x.grad is not None
    return Outcome([y.detach() for y in ys], x.grad, grads)
