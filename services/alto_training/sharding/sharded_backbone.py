"""A backbone that no rank holds whole: loaded part by part, and gathered part by part while a pass goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alto_training.executor import attention
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.backbone_weights import fingerprint, fingerprint_part, output_head
from alto_training.executor.losses import OutputHead
from alto_training.sharding.gather_order import GatherOrder
from alto_training.sharding.units import (
    ShardedRows,
    ShardedUnit,
    ShardingEngine,
    gathers_ahead,
    layers_kept_whole,
    plan_units,
    tensor_bytes,
)
from alto_training.sharding.weight_files import SafetensorsFolder, WeightSource, fill, parameters_on_meta


class ShardedWeights:
    """`BackboneWeights` that lie in shares on the ranks.

    `order` is what every pass goes through, `kept_bytes` what this rank keeps: its shares, and layers whole.
    """

    def __init__(
        self,
        model: Any,
        engine: ShardingEngine,
        order: GatherOrder,
        head: ShardedUnit,
        digest: str,
        parameters: int,
        kept_bytes: int,
    ) -> None:
        self.fingerprint = digest
        self.parameters = parameters
        self.order = order
        self.kept_bytes = kept_bytes
        self.in_lock_step = order.in_lock_step
        self._engine = engine
        self._model = model
        self._head = head

    @property
    def uncounted_bytes(self) -> int:
        """See `BackboneWeights`."""
        return self._engine.uncounted_bytes

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """See `BackboneWeights.head`."""
        self.order.enter(self._head)
        yield output_head(self._model)
        self.order.leave(self._head)

    def idle_pass(self, training: bool) -> None:
        """See `BackboneWeights.idle_pass`: nothing to do where no other rank waits for this one."""
        if self.in_lock_step:
            self.order.walk(training)


def load_sharded_backbone(
    folder: str,
    engine: ShardingEngine,
    dtype: torch.dtype,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
    room_bytes: int = 0,
    prefetch: int | None = None,
) -> Backbone:
    """Load a model folder in safetensors, one unit at a time; a rank keeps its share and reads the next.

    With room for more weights than those of its shares, it keeps decoder layers whole.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model = empty_model(config, dtype)
    source = SafetensorsFolder(Path(folder), model.base_model_prefix)
    return shard_model(model, folder, source, engine, device, beat, room_bytes, prefetch)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """Return a causal language model with its buffers, and the shapes alone of its parameters."""
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.PLAIN_IMPLEMENTATION
        )
    return model


def shard_model(
    model: Any,
    name_or_path: str,
    source: WeightSource,
    engine: ShardingEngine,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
    room_bytes: int = 0,
    prefetch: int | None = None,
) -> Backbone:
    """Fill an `empty_model` from `source`, unit by unit, in shares, and make it a backbone.

    See `layers_kept_whole` for what `room_bytes` has kept whole, `gathers_ahead` for `prefetch` where none is given.
    """
    plan = plan_units(model)
    prefetch = gathers_ahead(engine, room_bytes) if prefetch is None else prefetch
    # In lock step a gather that ends is there twice: as it came, and in its parameters.
    at_once = 2 + prefetch if engine.in_lock_step else 1 + prefetch
    whole = layers_kept_whole(plan, engine.ranks, room_bytes, at_once, engine.in_place)
    named = list(model.named_parameters())
    names = {parameter: name for name, parameter in named}
    parts: dict[str, bytes] = {}
    parameters = sum(parameter.numel() for _, parameter in named)

    def read(module: nn.Module) -> None:
        full_names = {own: names[parameter] for own, parameter in module.named_parameters()}
        fill(module, names, source, device)
        for own_name, full_name in full_names.items():
            parts[full_name] = fingerprint_part(full_name, module.get_parameter(own_name))

    def shard(name: str, modules: nn.Sequential) -> ShardedUnit:
        read(modules)
        return engine.shard(name, modules)

    for module in plan.resident:
        read(module)
    for index in whole:
        read(plan.layers[index][1])
    rows: list[tuple[nn.Embedding, ShardedRows]] = []
    embeddings: list[tuple[nn.Sequential, ShardedUnit]] = []
    for name, modules in plan.embeddings:
        read(modules)
        embedding: Any = modules[0]
        # A tied head wants all of them anyway; other classes of embeddings may be called with something else than ids.
        by_rows = len(modules) == 1 and type(embedding) is nn.Embedding
        own = engine.shard_rows(embedding) if by_rows else None
        if own is None:
            embeddings.append((modules, engine.shard(name, modules)))
        else:
            rows.append((embedding, own))
    layers = [
        (modules, shard(name, modules)) for index, (name, modules) in enumerate(plan.layers) if index not in whole
    ]
    tied = next((unit for modules, unit in embeddings if len(modules) > 1), None)
    head = tied if tied is not None else shard(*plan.head)
    order = GatherOrder(
        [unit for _, unit in embeddings], [unit for _, unit in layers], head, prefetch, beat, engine.in_lock_step
    )
    first: nn.Module = plan.embeddings[0][1][0]
    first.register_forward_pre_hook(lambda *_: order.begin(torch.is_grad_enabled()))
    for module, of_module in rows:
        _hook_rows(module, of_module)
    for modules, unit in embeddings:
        _hook_whole(modules[0], unit, order)
    for modules, unit in layers:
        _hook_layer(modules[0], unit, order)
    _hook_whole(model.get_output_embeddings(), head, order)
    model.to(device)
    digest = fingerprint([parts[name] for name, _ in named])
    kept_bytes = order.shard_bytes + sum(of_module.shard_bytes for _, of_module in rows)
    kept_bytes += sum(tensor_bytes(list(plan.layers[index][1].parameters())) for index in whole)
    weights = ShardedWeights(model, engine, order, head, digest, parameters, kept_bytes)
    return prepare_backbone(model, name_or_path, device, weights)


def _hook_rows(embedding: nn.Embedding, rows: ShardedRows) -> None:
    """Have each call of `embedding` read the rows it asks for: they are its weight, and it is asked for all in turn."""
    nothing = embedding.weight.data.new_empty(0)
    embedding.weight.data = nothing
    embedding.padding_idx = None  # of the whole; it is for gradients alone

    def before(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        ids = inputs[0] if inputs else options["input"]
        embedding.weight.data = rows.read(ids)
        return (torch.arange(ids.numel(), device=ids.device).view(ids.shape),), {}

    def after(*_: Any) -> None:
        embedding.weight.data = nothing

    embedding.register_forward_pre_hook(before, with_kwargs=True)
    embedding.register_forward_hook(after)


def _hook_whole(module: nn.Module, unit: ShardedUnit, order: GatherOrder) -> None:
    """Gather `unit` around each call of `module`, which no backward pass comes to."""
    module.register_forward_pre_hook(lambda *_: order.enter(unit))
    module.register_forward_hook(lambda *_: order.leave(unit))


def _hook_layer(layer: nn.Module, unit: ShardedUnit, order: GatherOrder) -> None:
    """Gather a decoder layer around its forward pass and around its backward pass.

    Backward passes come to every layer of every rank, whatever its adapters adapt: the output of a layer that nothing
    before it has asked for gradients is made to ask for them.
    """

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        order.enter(unit)
        if not torch.is_grad_enabled() or not inputs[0].requires_grad:
            return inputs
        return _LeaveGoingBack.apply(inputs[0], unit, order), *inputs[1:]  # type: ignore[no-untyped-call]  # torch has no types

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        order.leave(unit)
        if not torch.is_grad_enabled():
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        hidden = _EnterGoingBack.apply(hidden, unit, order, not inputs[0].requires_grad)  # type: ignore[no-untyped-call]  # torch has no types
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


class _EnterGoingBack(torch.autograd.Function):
    """At a layer's output: the backward pass enters the layer here.

    It leaves at the layer's input. With `ends`, where no gradient goes there, that is when the whole pass is over.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, unit: ShardedUnit, order: GatherOrder, ends: bool) -> torch.Tensor:
        ctx.unit, ctx.order, ctx.ends = unit, order, ends
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.order.enter(ctx.unit)
        if ctx.ends:
            torch.autograd.Variable._execution_engine.queue_callback(partial(ctx.order.leave, ctx.unit))
        return grad_outputs[0], None, None, None


class _LeaveGoingBack(torch.autograd.Function):
    """At a layer's input: the backward pass has left the layer here."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, unit: ShardedUnit, order: GatherOrder) -> torch.Tensor:
        ctx.unit, ctx.order = unit, order
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.order.leave(ctx.unit)
        return grad_outputs[0], None, None
