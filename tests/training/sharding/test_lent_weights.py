"""Weights that come and go: nothing may keep one for the backward pass, for its buffer is used by others."""

import numpy as np
import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.fused_norm import fuse_norms
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.lora_linear import FrozenLinear
from alto_training.executor.tick import Item, PackedSequence, Share, Tick
from alto_training.sharding.peer_units import CopyLanes, GatherBuffer, PeerUnit, flat_layout, flatten
from alto_training.sharding.sharded_backbone import empty_model, shard_model
from alto_training.sharding.units import ShardedUnit
from alto_training.sharding.weight_files import RandomWeights, fill
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 64}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
# Its weights lie transposed: what takes one takes a view, which stays with the buffer of the moment.
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_positions=64, n_layer=5, n_head=4)
CONFIG = TrialConfig(lora_rank=4)


class SpoilingLane(CopyLanes):
    """Spoils what is given back, as another layer's weights would."""

    def give_back(self, buffer: GatherBuffer) -> None:
        buffer.whole.fill_(float("nan"))


class OneHostEngine:
    """Two shares in this process, gathered as from peers."""

    name = "one host"
    in_lock_step = True

    def __init__(self) -> None:
        self._lane = SpoilingLane(CPU)

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        parameters = list(modules.parameters())
        layout = flat_layout([parameter.numel() for parameter in parameters], 2)
        shares = [share.clone() for share in flatten(parameters, layout, 2).split(layout.share)]
        return PeerUnit(name, parameters, layout, shares, 0, self._lane)


def make_share(backbone: Backbone) -> Share:
    adapter = Adapter(backbone.adapted_modules(CONFIG), CONFIG.lora_rank, 2.0)
    adapter.initialise(0)
    adapter.param.add_(0.01)
    ids = np.random.default_rng(0).integers(0, 64, 20).astype(np.int32)
    return Share(adapter, [Item((PackedSequence(ids, np.arange(20) >= 1),), 19)], batch_denominator=19.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_gradients_are_those_of_a_whole_backbone(
    monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, recompute: bool
) -> None:
    def linear(self: KernelBackend, x: torch.Tensor, frozen: FrozenLinear, index: int, tick: Tick) -> torch.Tensor:
        return self.linears(x, [frozen], [index], tick)[0]

    # As on Hopper, where the kernels take the frozen weight, and layers that read one input are multiplied together.
    monkeypatch.setattr(KernelBackend, "linear", linear)
    monkeypatch.setattr(KernelBackend, "shares_input", lambda self, frozen: True)
    model = empty_model(config, torch.float32)
    fill(model, {parameter: name for name, parameter in model.named_parameters()}, RandomWeights(), CPU)
    whole = prepare_backbone(model, "whole", CPU)
    sharded = shard_model(empty_model(config, torch.float32), "sharded", RandomWeights(), OneHostEngine(), CPU)
    found = []
    for backbone in (whole, sharded):
        if recompute:
            backbone.recompute_activations()
        assert fuse_norms(backbone.decoder) == (11 if config is LLAMA else 0)
        backbone.use_backend(choose_backend("cpu", backbone.layers, 1, CPU, torch.float32))
        share = make_share(backbone)
        assert share.adapter is not None
        found.append((passes.train_tick(backbone, passes.lay_out(backbone, [share])).tolist(), share.adapter.grad))
    assert found[0][0] == found[1][0]
    assert found[0][1].abs().max() > 0
    assert torch.equal(found[0][1], found[1][1])
