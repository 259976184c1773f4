"""The parts that a sharded backbone is gathered in, and the order in which a forward pass meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from alto_training.executor.errors import UnsupportedBackboneError


class ShardedUnit(Protocol):
    """Parameters that lie in equal shares on the ranks of a group and are gathered as one.

    `gathered_bytes` is what all of them take when they are here, `shard_bytes` what this rank keeps.
    """

    name: str
    gathered_bytes: int
    shard_bytes: int

    def start(self) -> None:
        """Launch the gather; where ranks are in lock step, every rank of the group must do the same."""
        ...

    def finish(self) -> None:
        """Wait for the gather; from here on the modules hold their whole weights."""
        ...

    def release(self) -> None:
        """Let go of the gathered weights; the rank's own share stays."""
        ...


class ShardedRows(Protocol):
    """An embedding's rows on the ranks of a group, `shard_bytes` of them on this one."""

    shard_bytes: int

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of these ids, [number of ids, H]."""
        ...


class ShardingEngine(Protocol):
    """Cuts parameters into shares and gathers them: DeepSpeed's ZeRO-3, torch's FSDP2, or copies from peers.

    `in_lock_step`: a gather is one of all ranks, which must come to the same ones in the same order. `in_place`: it
    takes no room for this rank's own share, and embeddings are read by rows. A share is one of `ranks`.
    `uncounted_bytes` of its memory are not in torch's count.
    """

    name: str
    in_lock_step: bool
    in_place: bool
    ranks: int

    @property
    def uncounted_bytes(self) -> int:
        """See above."""
        ...

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """Cut the parameters of `modules`, which hold their whole weights, and keep this rank's share."""
        ...

    def shard_rows(self, embedding: nn.Embedding) -> ShardedRows | None:
        """Cut an embedding into rows that are read one by one; None where that is not `in_place`."""
        ...


@dataclass(frozen=True)
class UnitPlan:
    """The modules of each unit, by name, in the order of a forward pass; the head is met last.

    A unit's modules are put in a Sequential to go by one name; it is never called. `resident` are modules too small to
    shard (norms): every rank keeps them whole. A head that is tied to the embedding has the embedding's unit, which is
    then gathered twice in a pass.
    """

    embeddings: tuple[tuple[str, nn.Sequential], ...]
    layers: tuple[tuple[str, nn.Sequential], ...]
    head: tuple[str, nn.Sequential]
    head_is_tied: bool
    resident: tuple[nn.Module, ...]


def plan_units(model: Any) -> UnitPlan:
    """Cut a causal language model of transformers into embeddings, decoder layers and head."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedBackboneError(f"{type(model).__name__} has no output head", "choose a causal language model")
    layers: list[tuple[str, nn.Sequential]] = []
    embeddings: list[tuple[str, nn.Sequential]] = []
    resident: list[nn.Module] = []
    head_is_tied = False
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, GradientCheckpointingLayer):
            layers.append((name, nn.Sequential(module)))
            inside = f"{name}."
        elif isinstance(module, nn.Embedding):
            tied = module.weight is head.weight
            head_is_tied = head_is_tied or tied
            embeddings.append((name, nn.Sequential(*([module, head] if tied else [module]))))
        elif module is not head and next(module.parameters(recurse=False), None) is not None:
            resident.append(module)
    if not layers:
        raise UnsupportedBackboneError(f"{type(model).__name__} has no decoder layers to shard", "train it unsharded")
    head_name = next(name for name, module in model.named_modules() if module is head)
    return UnitPlan(tuple(embeddings), tuple(layers), (head_name, nn.Sequential(head)), head_is_tied, tuple(resident))


def gathers_ahead(engine: ShardingEngine, room_bytes: int) -> int:
    """Return how many gathers are under way while a unit is used, each in a buffer of its own.

    A forward pass waits for gathers and gathers wait for a backward pass: several ahead even that out, six of them as
    measured (docs/design/021). With room for whole layers the memory of a buffer is better spent on one more of them.
    In lock step more than one was not tried.
    """
    if engine.in_lock_step:
        return 1
    return 2 if room_bytes else 6


def layers_kept_whole(
    plan: UnitPlan, ranks: int, room_bytes: int, at_once: int, in_place: bool = False
) -> frozenset[int]:
    """Return the decoder layers, by index, that every rank keeps whole: as many as its room for weights holds.

    That is beside its shares of all the others, and what is gathered of them: the head, `at_once` layers of each size,
    and embeddings, unless gathers are `in_place`. They are spread evenly, so that while one is computed with, the next
    gather goes on.
    """
    if ranks == 1:
        return frozenset()  # a share is the whole
    layers = [_unit_bytes(modules) for _, modules in plan.layers]
    untied = [_unit_bytes(modules) for _, modules in plan.embeddings if len(modules) == 1]
    head = _unit_bytes(plan.head[1])
    resident = sum(tensor_bytes(list(module.parameters())) for module in plan.resident)
    shares = (sum(layers) + sum(untied) + head) / ranks
    others = 1 - 1 / ranks
    gathered = head + at_once * sum(set(layers))
    gathering = gathered * others if in_place else gathered + sum(untied)
    count = min(len(layers), max(0, int((room_bytes - resident - shares - gathering) / (max(layers) * others))))
    return frozenset(
        index for index in range(len(layers)) if (index + 1) * count // len(layers) != index * count // len(layers)
    )


def _unit_bytes(modules: nn.Sequential) -> int:
    return tensor_bytes(list(modules.parameters()))


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
