"""The low-rank part by `alto_kernels`: compiled for the CPU, or CUTLASS on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from alto_kernels import (
    AdapterTable,
    CudaKernels,
    TickPlan,
    low_rank_backward,
    low_rank_forward,
)
from alto_kernels.decoder_layer import DecoderLayer
from alto_kernels.linear import linears_backward, linears_forward

from alto_training.executor.adapter import Adapter
from alto_training.executor.frozen_linear import DenseLinear
from alto_training.executor.lora_backend import AdaptedLayer, clear_gradients
from alto_training.executor.tick import Tick


@dataclass(frozen=True)
class _Seated:
    """Who sits in a seat: the adapter, the buffer that its weights were in, and the dropout it was seated with."""

    adapter: Adapter
    param_P: torch.Tensor
    dropout: float


class KernelBackend:
    """Seats the adapters of each tick in an `AdapterTable` and plans the tick once for all layers.

    `module_shapes[i]` are the input and output features of layer i, `dtype` is the activations', `kernels` those of
    CUTLASS to use (None: the fastest). An adapter keeps its seat until another needs it. `may_overwrite` says that
    every layer has one backward pass a tick: gradients that begin from nothing are then written, where kernels can.
    """

    def __init__(
        self,
        name: str,
        module_shapes: Sequence[tuple[int, int]],
        seats: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: CudaKernels | None = None,
        may_overwrite: bool = False,
    ) -> None:
        self.name = name
        self.table = AdapterTable(module_shapes, seats, device, backend=name, dtype=dtype, kernels=kernels)
        self._seated: list[_Seated | None] = [None] * seats
        self.fuses_products = self.table.kernels == CudaKernels.HOPPER
        self._overwrites = may_overwrite and self.fuses_products
        self._layers: dict[tuple[int, ...], DecoderLayer | None] = {}
        self._planned: tuple[Tick, TickPlan] | None = None
        self._prepared: tuple[Tick, TickPlan] | None = None

    def prepare(self, tick: Tick) -> None:
        """See `LoraBackend.prepare`."""
        self._prepared = (tick, self.make_plan(tick))

    def begin(self, tick: Tick) -> None:
        """See `LoraBackend.begin`."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is tick and prepared[1].is_current and self._holds(tick):
            self._planned = prepared
        if not self._overwrites:
            clear_gradients(tick)

    def forward(
        self, x_TK: torch.Tensor, layers: Sequence[AdaptedLayer], tick: Tick
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `LoraBackend.forward`. On Hopper frozen products and low-rank parts are one kernel."""
        plan = self.plan(tick)
        if self.fuses_products:
            dense = _dense(layers)
            weights_NK, biases_N = [one.weight_NK for one in dense], [one.bias_N for one in dense]
            found = linears_forward(x_TK, weights_NK, biases_N, plan, [layer.index for layer in layers])
            return found[: len(dense)], found[len(dense) :]
        outputs = [layer.frozen.product(x_TK) for layer in layers]
        kept = [low_rank_forward(y_TN, x_TK, plan, layer.index) for y_TN, layer in zip(outputs, layers, strict=True)]
        return outputs, kept

    def backward(
        self,
        dys_TN: Sequence[torch.Tensor],
        x_TK: torch.Tensor,
        kept: Sequence[torch.Tensor],
        layers: Sequence[AdaptedLayer],
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """See `LoraBackend.backward`."""
        plan = self.plan(tick)
        if self.fuses_products:
            weights_NK = [one.weight_NK for one in _dense(layers)]
            return linears_backward(dys_TN, x_TK, weights_NK, kept, plan, [layer.index for layer in layers], needs_dx)
        dx_TK = None
        for dy_TN, s_TR, layer in zip(dys_TN, kept, layers, strict=True):
            if needs_dx:
                dx_TK = layer.frozen.input_gradient(dy_TN, dx_TK)
            low_rank_backward(dy_TN, x_TK, s_TR, plan, layer.index, dx_TK)
        return dx_TK

    def decoder_layer(
        self, modules: tuple[int, ...], head_width: int, epsilons: tuple[float, float, float | None]
    ) -> DecoderLayer | None:
        """Return the kernels of a whole layer, made once; None where they do not serve. See `DecoderLayer`."""
        if modules not in self._layers:
            try:
                made = DecoderLayer(self.table, modules, head_width, *epsilons) if self.fuses_products else None
            except ValueError:  # widths that they do not take
                made = None
            self._layers[modules] = made
        return self._layers[modules]

    def plan(self, tick: Tick) -> TickPlan:
        """Return the plan of a tick, made once; ValueError where a seat was given away since."""
        if self._planned is None or self._planned[0] is not tick:
            self._planned = (tick, self.make_plan(tick))
        plan = self._planned[1]
        plan.check_current()
        return plan

    def make_plan(self, tick: Tick) -> TickPlan:
        """Seat the tick's adapters and plan it; the layers' calls do so by themselves, once a tick."""
        seats = self._seat(tick)
        row_keys_T = None
        if any(segment.row_keys_T is not None for segment in tick.segments):
            row_keys_T = torch.cat(
                [
                    torch.zeros(segment.end - segment.start, dtype=torch.int32, device=tick.rows_R.device)
                    if segment.row_keys_T is None
                    else segment.row_keys_T
                    for segment in tick.segments
                ]
            )
        offsets = [0, *(segment.end for segment in tick.segments)]
        # The optimiser changed weights since the last tick: whatever is derived from them is renewed.
        self.table.refresh([seat for seat in seats if seat >= 0])
        segments = zip(seats, tick.segments, strict=True)
        fresh = [seat for seat, segment in segments if self._overwrites and segment.begins_batch]
        return TickPlan(self.table, seats, offsets, row_keys_T, tick.training, fresh)

    def _holds(self, tick: Tick) -> bool:
        """Say whether every adapter of the tick is seated, with the buffers that it has now."""
        seated = {id(one.adapter): one.param_P for one in self._seated if one is not None}
        adapters = [segment.adapter for segment in tick.segments if segment.adapter is not None]
        return all(seated.get(id(adapter)) is adapter.param for adapter in adapters)

    def _seat(self, tick: Tick) -> list[int]:
        """Return the seat of each segment's adapter, -1 for none; those who have no seat take one that is not used."""
        present = {id(segment.adapter) for segment in tick.segments}
        free = [seat for seat, seated in enumerate(self._seated) if seated is None or id(seated.adapter) not in present]
        seats = []
        for segment in tick.segments:
            if segment.adapter is None:
                seats.append(-1)
                continue
            found = next(
                (seat for seat, one in enumerate(self._seated) if one is not None and one.adapter is segment.adapter),
                None,
            )
            seat = free.pop() if found is None else found
            self._set_slot(seat, segment.adapter, segment.dropout, tick.training)
            seats.append(seat)
        return seats

    def _set_slot(self, seat: int, adapter: Adapter, dropout: float, training: bool) -> None:
        seated = self._seated[seat]
        same = seated is not None and seated.adapter is adapter and seated.param_P is adapter.param
        if same and seated is not None and (not training or seated.dropout == dropout):
            return
        weights = {
            index: (views.a_RK, views.b_NR, views.grad_a_RK, views.grad_b_NR) for index, views in adapter.views.items()
        }
        self._seated[seat] = None  # until it is done: memory may run out on the way
        self.table.set_slot(seat, rank=adapter.lora_rank, scale=adapter.scaling, weights=weights, dropout=dropout)
        self._seated[seat] = _Seated(adapter, adapter.param, dropout)


def _dense(layers: Sequence[AdaptedLayer]) -> list[DenseLinear]:
    """Return the frozen products, which are dense: a table with kernels that fuse them is made for no others."""
    return [layer.frozen for layer in layers if isinstance(layer.frozen, DenseLinear)]
