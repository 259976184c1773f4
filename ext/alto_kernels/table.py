"""Where the adapters live: for each slot and module the tensors of the adapter that sits there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from alto_kernels.availability import CudaKernels, choose, choose_kernels

if TYPE_CHECKING:
    from alto_kernels.cuda_jobs import JobsOfTable

MAX_LORA_RANK = 256
_GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


class AdapterWeights(NamedTuple):
    """One module of one adapter, contiguous: A [R, in], B [out, R], both fp32, and the gradients that are added to.

    Gradients are of the table's `gradient_dtype`.
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    grad_a_RK: torch.Tensor
    grad_b_NR: torch.Tensor


@dataclass(frozen=True)
class Occupant:
    """The adapter in a slot. `weights` maps module index to tensors; a module that is missing is not adapted."""

    rank: int
    scale: float
    dropout: float
    weights: Mapping[int, AdapterWeights] = field(repr=False)


class AdapterTable:
    """The slots of an executor and the adapters in them.

    `module_shapes[m]` is (in_features, out_features) of the linear layer with index m. The table keeps references to
    the tensors it is given and reads and writes them in place: they are views into the adapters' own buffers. A slot's
    neighbours are never touched.

    After weights change in place (an optimiser step), call `refresh`: the `cutlass` back end keeps copies in `dtype`
    for the tensor cores; elsewhere it does nothing. `dtype` and `kernels` are for `cutlass` alone.

    `gradient_dtype` is that of all gradients of A and B: fp32, or bf16 for half of the memory and traffic. A tick is
    summed over its tokens in fp32 either way; the choice is about the sum of several ticks. bf16 has 8 significant
    bits: every tick rounds the sum by up to 2^-8 of it (kernels `hopper` also round the tick's part first, by up to
    2^-8 of that). A part smaller than 2^-9 of what an element holds is lost there whole: once the sum is 512 times a
    tick's part, further ticks of that size no longer count, however many. n ticks of independent sign and like size
    end 0.17 % (one tick) to 0.12 % times sqrt(n) (many) of the sum off. So bf16 is for effective batches of one tick
    or a few; the first, whose slots are `fresh`, rounds once.

    >>> table = AdapterTable([(64, 32)], max_slots=4)
    >>> table.occupied()
    ()
    """

    def __init__(
        self,
        module_shapes: Sequence[tuple[int, int]],
        max_slots: int,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kernels: CudaKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make an empty table. `backend` is one of `backends()`; None takes the fastest for `device`.

        `dtype` is that of the activations, bf16 or fp16; `kernels` None takes the fastest that run here.
        """
        if gradient_dtype not in _GRADIENT_DTYPES:
            raise ValueError(f"gradient_dtype={gradient_dtype}: must be torch.float32 or torch.bfloat16")
        if not module_shapes or any(len(shape) != 2 or min(shape) < 1 for shape in module_shapes):
            raise ValueError("module_shapes: needs at least one (in_features, out_features), both positive")
        if max_slots < 1:
            raise ValueError(f"max_slots={max_slots}: must be at least 1")
        self.module_shapes = tuple((int(k), int(n)) for k, n in module_shapes)
        self.max_slots = max_slots
        self.device = torch.device(device)
        self.backend = choose(self.device, backend, dtype)
        # A leaf that makes autograd reach the layers even where their input needs no gradient. Its own stays zero.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        # Raised with every change of an occupant, so that a plan made before it is refused.
        self.version = 0
        self._occupants: list[Occupant | None] = [None] * max_slots
        # Of the back ends: copies of weights, and what plans of this table have in common.
        self.pools: object | None = None
        self.jobs: JobsOfTable | None = None
        self.dtype = dtype
        self.gradient_dtype = gradient_dtype
        self.kernels: CudaKernels | None = None
        if self.backend == "cutlass":
            self.kernels = choose_kernels(dtype, kernels)
            from alto_kernels.cuda_pools import CudaPools

            self.pools = CudaPools(self)

    def set_slot(
        self,
        slot: int,
        *,
        rank: int,
        scale: float,
        weights: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
        dropout: float = 0.0,
    ) -> None:
        """Seat an adapter in `slot`, in place of any other.

        `weights` maps module index to (A, B, grad_A, grad_B), see `AdapterWeights`. `scale` is alpha/r or
        alpha/sqrt(r). `dropout` is the probability, used by training plans alone. Raises ValueError that names the
        argument.
        """
        self._check_slot(slot)
        if not 1 <= rank <= MAX_LORA_RANK:
            raise ValueError(f"rank={rank}: must be in [1, {MAX_LORA_RANK}]")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: must be in [0, 1)")
        checked = {}
        for module, tensors in weights.items():
            checked[module] = self._check_weights(module, rank, tensors)
        self._occupants[slot] = Occupant(rank, float(scale), float(dropout), checked)
        self._changed(slot)

    def clear_slot(self, slot: int) -> None:
        """Empty `slot`; the tensors of its adapter and all neighbours stay as they are."""
        self._check_slot(slot)
        self._occupants[slot] = None
        self._changed(slot)

    def refresh(self, slots: Sequence[int] | None = None) -> None:
        """Renew what the back end derives from the weights of `slots` (all by default). Needed after each change."""
        for slot in self.occupied() if slots is None else slots:
            self.occupant(slot)
        if self.pools is not None:
            self.pools.refresh(self.occupied() if slots is None else slots)  # type: ignore[attr-defined]

    def occupant(self, slot: int) -> Occupant:
        """Return the adapter in `slot`; ValueError where it is empty."""
        self._check_slot(slot)
        found = self._occupants[slot]
        if found is None:
            raise ValueError(f"slot={slot}: empty")
        return found

    def occupied(self) -> tuple[int, ...]:
        """Return the slots that hold an adapter, ascending."""
        return tuple(slot for slot, occupant in enumerate(self._occupants) if occupant is not None)

    def _changed(self, slot: int) -> None:
        self.version += 1
        if self.pools is not None:
            self.pools.seat(slot, self._occupants[slot])  # type: ignore[attr-defined]

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise ValueError(f"slot={slot}: must be in [0, {self.max_slots})")

    def _check_weights(
        self, module: int, rank: int, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> AdapterWeights:
        if not 0 <= module < len(self.module_shapes):
            raise ValueError(f"weights[{module}]: module index must be in [0, {len(self.module_shapes)})")
        in_features, out_features = self.module_shapes[module]
        found = AdapterWeights(*tensors)
        shapes = ((rank, in_features), (out_features, rank), (rank, in_features), (out_features, rank))
        dtypes = (torch.float32, torch.float32, self.gradient_dtype, self.gradient_dtype)
        for name, tensor, shape, dtype in zip(("A", "B", "grad_A", "grad_B"), found, shapes, dtypes, strict=True):
            where = f"weights[{module}].{name}"
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{where}: shape {tuple(tensor.shape)}, must be {shape}")
            if tensor.dtype != dtype:
                raise ValueError(f"{where}: dtype {tensor.dtype}, must be {dtype}")
            if tensor.device.type != self.device.type:
                raise ValueError(f"{where}: on {tensor.device}, must be on {self.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{where}: must be contiguous")
        return found
