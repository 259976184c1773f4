"""Weights that come and go: nothing may keep one for the backward pass, for its buffer is used by others."""

from collections.abc import Sequence
from typing import Any

import alto_kernels
import numpy as np
import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_kernels import CudaKernels
from alto_kernels.mapped_memory import granularity, make_memory, mapped
from alto_training.executor import fused_layer, passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.fused_layer import fuse_layers
from alto_training.executor.fused_norm import fuse_norms
from alto_training.executor.layer_steps import CompiledSteps, LayerParts, Steps, steps_of
from alto_training.executor.tick import Item, PackedSequence, Share
from alto_training.sharding.gather_buffers import GatherBuffer, GatherBuffers, MappedBuffers, PlainBuffers, Shares
from alto_training.sharding.peer_units import PeerRows, PeerUnit, flat_layout, flatten
from alto_training.sharding.sharded_backbone import empty_model, shard_model
from alto_training.sharding.units import ShardedRows, ShardedUnit, layers_kept_whole, plan_units
from alto_training.sharding.weight_files import RandomWeights, fill
from tiny_task import room_for
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 64}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
# Its weights lie transposed: what takes one takes a view, which stays with the buffer of the moment.
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_positions=64, n_layer=5, n_head=4)
CONFIG = TrialConfig(lora_rank=4)


class SpoiledBuffers:
    """Spoils what is given back, as another layer's weights would; nobody has it again.

    Shares are copied on a CPU, so that it is all; on a GPU this rank's own stays where it is.
    """

    def __init__(self, buffers: GatherBuffers) -> None:
        self.size_bytes = 0
        self.gather = buffers.gather
        self.wait = buffers.wait

    def give_back(self, buffer: GatherBuffer) -> None:
        (buffer.whole if buffer.room is None else buffer.parts[1]).fill_(float("nan"))


class OneHostEngine:
    """Two shares in this process, gathered as from peers."""

    name = "one host"
    ranks = 2
    in_place = False  # by what it keeps whole
    uncounted_bytes = 0

    def __init__(self, in_lock_step: bool, device: torch.device = CPU) -> None:
        self.in_lock_step = in_lock_step
        self._device = device
        self._buffers = SpoiledBuffers(MappedBuffers(device) if device.type == "cuda" else PlainBuffers())

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        parameters = list(modules.parameters())
        multiple = granularity(self._device) // 2 if self._device.type == "cuda" else 64
        layout = flat_layout([parameter.numel() for parameter in parameters], 2, multiple)
        flat = flatten(parameters, layout, 2)
        return PeerUnit(name, parameters, layout, self._shares(flat.split(layout.share)), self._buffers)

    def shard_rows(self, embedding: nn.Embedding) -> ShardedRows | None:
        """Gathered in lock step, read row by row else."""
        return None if self.in_lock_step else PeerRows(embedding.weight.detach().clone().split(32), 0)

    def _shares(self, content: Sequence[torch.Tensor]) -> Shares:
        if self._device.type == "cpu":
            return Shares([share.clone() for share in content], 0)
        memories = [make_memory(self._device, share.nbytes) for share in content]
        tensors = [mapped(self._device, [memory], content[0].dtype) for memory in memories]
        for tensor, share in zip(tensors, content, strict=True):
            tensor.copy_(share)
        return Shares(tensors, 0, memories[0])


def make_share(backbone: Backbone) -> Share:
    adapter = Adapter(backbone.adapted_modules(CONFIG), CONFIG.lora_rank, 2.0)
    adapter.initialise(0, backbone.device)
    adapter.param.add_(0.01)
    ids = np.random.default_rng(0).integers(0, 64, 20).astype(np.int32)
    return Share(adapter, [Item((PackedSequence(ids, np.arange(20) >= 1),), 19)], batch_denominator=19.0)


def losses_of_passes(backbone: Backbone, share: Share) -> dict[str, list[float]]:
    """Train, evaluate, and train twice more: what a pass leaves under way is for either kind."""

    def train() -> list[float]:
        losses: list[float] = passes.train_tick(backbone, passes.lay_out(backbone, [share])).tolist()
        return losses

    return {
        "first": train(),
        "evaluated": passes.item_losses(backbone, [share], tokens_per_tick=1000)[0],
        "then": [*train(), *train()],
    }


def test_layers_are_kept_whole_as_far_as_there_is_room() -> None:
    plan = plan_units(empty_model(LLAMA, torch.float32))
    layer, head = (sum(4 * one.numel() for one in unit.parameters()) for unit in (plan.layers[0][1], plan.head[1]))
    # Two of five layers whole, half of the others, of embedding and head, both of these once more, and three layers.
    norm = 4 * LLAMA.hidden_size
    room = 2 * layer + 3 * layer // 2 + 2 * head // 2 + 2 * head + 3 * layer + norm
    assert layers_kept_whole(plan, 2, room, at_once=3) == {2, 4}
    assert len(layers_kept_whole(plan, 2, room - 1, at_once=3)) == 1
    # In place the embedding is not gathered, nor half of the head and of three layers.
    in_place = room - head - head // 2 - 3 * layer // 2
    assert layers_kept_whole(plan, 2, in_place, at_once=3, in_place=True) == {2, 4}
    assert len(layers_kept_whole(plan, 2, in_place - 1, at_once=3, in_place=True)) == 1
    assert layers_kept_whole(plan, 2, 0, at_once=3) == set()
    assert layers_kept_whole(plan, 2, 2**40, at_once=3) == set(range(5))
    assert layers_kept_whole(plan, 1, 2**40, at_once=3) == set(), "the only share is the whole"


@pytest.mark.parametrize("kept", [0, 2, 5])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("in_lock_step", [False, True])
@pytest.mark.parametrize(
    ("config", "fused"), [(LLAMA, False), (LLAMA, True), (GPT2, False)], ids=["llama", "llama, fused", "gpt2"]
)
def test_gradients_are_those_of_a_whole_backbone(
    config: PretrainedConfig, fused: bool, in_lock_step: bool, recompute: bool, kept: int
) -> None:
    model = empty_model(config, torch.float32)
    fill(model, {parameter: name for name, parameter in model.named_parameters()}, RandomWeights(), CPU)
    whole = prepare_backbone(model, "whole", CPU)
    sharded = shard_model(
        empty_model(config, torch.float32),
        "sharded",
        RandomWeights(),
        OneHostEngine(in_lock_step),
        CPU,
        room_bytes=room_for(config, kept, 3 if in_lock_step else 2),
        prefetch=1,
    )
    assert sharded.fingerprint == whole.fingerprint
    away = [layer for layer in sharded.layers if layer.frozen.module.weight.numel() == 0]
    assert len(away) * 5 == len(sharded.layers) * (5 - kept)
    found = []
    for backbone in (whole, sharded):
        if recompute:
            backbone.recompute_activations()
        assert fuse_norms(backbone.decoder) == (11 if config is LLAMA else 0)
        assert not fused or fuse_layers(backbone.decoder) == 5
        backbone.use_backend(choose_backend("cpu", backbone.layers, 1, CPU, torch.float32))
        share = make_share(backbone)
        assert share.adapter is not None
        found.append(losses_of_passes(backbone, share) | {"gradients": share.adapter.grad.tolist()})
    assert found[0] == found[1]
    assert any(found[0]["gradients"])


@pytest.mark.gpu
@pytest.mark.skipif(
    CudaKernels.HOPPER not in alto_kernels.cuda_kernels(torch.bfloat16), reason="needs a GPU of compute capability 9.0"
)
@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("in_lock_step", [False, True])
def test_on_a_gpu_compiled_steps_take_weights_that_come_and_go(
    monkeypatch: pytest.MonkeyPatch, in_lock_step: bool, recompute: bool, kept: int
) -> None:
    device = torch.device("cuda", 0)
    config = LlamaConfig(
        **SIZES | {"hidden_size": 64},
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    taken: list[bool] = []

    def noted(parts: LayerParts, tick: Any) -> Steps:
        steps = steps_of(parts, tick)
        taken.append(isinstance(steps, CompiledSteps))
        return steps

    model = empty_model(config, torch.bfloat16)
    fill(model, {parameter: name for name, parameter in model.named_parameters()}, RandomWeights(), device)
    whole = prepare_backbone(model, "whole", device)
    sharded = shard_model(
        empty_model(config, torch.bfloat16),
        "sharded",
        RandomWeights(),
        OneHostEngine(in_lock_step, device),
        device,
        room_bytes=room_for(config, kept, 3 if in_lock_step else 2) // 2,
        prefetch=1,
    )
    monkeypatch.setattr(fused_layer, "steps_of", noted)
    found = []
    for backbone in (whole, sharded):
        if recompute:
            backbone.recompute_activations()
        backbone.use_backend(choose_backend("cutlass", backbone.layers, 1, device, torch.bfloat16))
        share = make_share(backbone)
        assert share.adapter is not None
        found.append(losses_of_passes(backbone, share) | {"gradients": share.adapter.grad.tolist()})
    assert set(taken) == {True}
    assert found[0] == found[1]
    assert np.isfinite(found[0]["gradients"]).all()
    assert any(found[0]["gradients"])
