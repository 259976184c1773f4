"""Decoder layers that are one step of autograd: the same as the layers' own, and no further back than needed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import alto_kernels
import numpy as np
import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_kernels import CudaKernels
from alto_training.executor import fused_layer, layer_steps, passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.fused_layer import fuse_layers
from alto_training.executor.layer_steps import CompiledSteps, LayerParts, PlainSteps, Steps, steps_of
from alto_training.executor.lora_backend import ReferenceBackend
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.tick import Item, PackedSequence, Share, build_tick
from tiny_jobs import assert_close_adapters, job, run, tiny_backbone, train_losses
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = TrialConfig(lora_rank=4, learning_rate=2e-3, batch_size=3, max_steps=6, max_length=32, adam_epsilon=3e-4)
MIX = (
    CONFIG,
    replace(CONFIG, lora_dropout=0.2, seed=1),
    replace(CONFIG, target_modules=("q_proj", "v_proj", "up_proj")),
    replace(CONFIG, target_modules=("o_proj",), layers=(1,)),
)
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | changes))).eval()


KINDS = {
    "llama": ("llama", {}),
    "biases": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "norms of heads": ("qwen3", {}),
    "a window": ("mistral", {"sliding_window": 6}),
    "attention biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "multipliers of 1": ("granite", {}),
}
OTHERS = {
    "multipliers": ("granite", {"residual_multiplier": 0.5}),
    "norms on both sides": ("gemma2", {}),
    "norms after": ("olmo2", {}),
    "one projection for q, k and v": ("phi3", {}),
    "in parallel": ("cohere", {}),
    "another gate": ("llama", {"hidden_act": "gelu"}),
    "experts": ("mixtral", {"num_local_experts": 2}),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_llamas_kind_are_fused_and_give_their_own_logits(name: str) -> None:
    kind, changes = KINDS[name]
    backbone = prepare_backbone(make(kind, **changes), name, torch.device("cpu"))
    share = Share(None, [item(20, 0), item(9, 1)])
    expected = passes.item_losses(backbone, [share], 64)
    assert fuse_layers(backbone.decoder) == 3
    assert passes.item_losses(backbone, [share], 64)[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    kind, changes = OTHERS[name]
    backbone = prepare_backbone(make(kind, **changes), name, torch.device("cpu"))
    assert fuse_layers(backbone.decoder) == 0


def clamped_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x).clamp(max=7.0), module.up_proj(x).clamp(-7.0, 7.0)
    out: torch.Tensor = module.down_proj(torch.nn.functional.silu(gate) * up)
    return out


def attention_by_position(module: Any, *more: Any, position_ids: torch.Tensor, **options: Any) -> Any:
    out, weights = type(module).__mro__[1].forward(module, *more, **options)
    return out * (1.0 + (position_ids > 4096)[..., None]), weights


def raising(module: Any, *_: Any, **options: Any) -> Any:
    return options["what nobody gives"]


@pytest.mark.parametrize(
    ("part", "forward"),
    [("mlp", clamped_mlp), ("self_attn", attention_by_position), ("self_attn", raising)],
    ids=["a clamp", "positions", "an error of its own"],
)
def test_a_layer_whose_parts_do_something_else_is_left_alone(part: str, forward: Any) -> None:
    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    layer: Any = backbone.decoder.get_submodule("layers.1")
    own = getattr(layer, part)
    own.__class__ = type("Other", (type(own),), {"forward": forward})
    assert fuse_layers(backbone.decoder) == 2


def test_a_part_that_is_named_and_missing_is_no_trouble() -> None:
    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    backbone.decoder.get_submodule("layers.1.self_attn").register_module("q_norm", None)
    assert fuse_layers(backbone.decoder) == 3


def test_a_norm_in_another_format_leaves_the_layer_alone() -> None:
    backbone = prepare_backbone(make("llama").bfloat16(), "llama", torch.device("cpu"))
    backbone.decoder.get_submodule("layers.1.input_layernorm").float()
    assert fuse_layers(backbone.decoder) == 2


def test_a_back_end_that_was_replaced_is_let_go_of() -> None:
    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    assert fuse_layers(backbone.decoder) == 3
    backend = choose_backend("cpu", backbone.layers, 2, backbone.device, torch.float32)
    backbone.use_backend(backend)
    gradients(backbone, [CONFIG])
    gone = weakref.ref(backend)
    backbone.use_backend(ReferenceBackend())
    del backend
    gc.collect()
    assert gone() is None


def test_layers_without_positions_keep_their_own_way_beside_others() -> None:
    backbone = prepare_backbone(make("smollm3", no_rope_layers=[1, 0, 1]), "smollm3", torch.device("cpu"))
    assert fuse_layers(backbone.decoder) == 2


def test_positions_in_another_format_take_the_layers_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    assert fuse_layers(backbone.decoder) == 3
    monkeypatch.setattr(PlainSteps, "forward", lambda *_: pytest.fail("they were rotated by ours"))
    layer: Any = backbone.decoder.get_submodule("layers.0")
    backbone.current.tick = build_tick([Share(None, [item(7, 0)])], training=False, device=backbone.device)
    angles = torch.randn(2, 1, 7, 16).bfloat16()
    with torch.no_grad():
        assert layer(torch.randn(1, 7, 64), position_embeddings=tuple(angles)).shape == (1, 7, 64)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("recompute", [False, True])
def test_trials_are_what_they_are_in_the_models_own_layers(tmp_path: Path, backend: Backend, recompute: bool) -> None:
    settings = ExecutorSettings(tokens_per_tick=96, backend=backend, recompute=recompute)
    own, own_events = run(job(*MIX), tmp_path / "own", settings=settings)
    backbone = tiny_backbone()
    assert fuse_layers(backbone.decoder) == 2
    fused, fused_events = run(job(*MIX), tmp_path / "fused", settings=settings, backbone=backbone)
    assert train_losses(fused_events) == pytest.approx(train_losses(own_events), rel=1e-5)
    assert_close_adapters(own, fused)


@pytest.mark.parametrize(
    ("targets", "layers", "attended", "walked"),
    [
        (("down_proj",), (2,), 0, 1),
        (("up_proj",), (2,), 0, 1),
        (("o_proj",), (1,), 1, 2),
        (("v_proj",), (1,), 2, 2),
        (("q_proj",), (0,), 3, 3),
    ],
)
def test_the_backward_pass_goes_no_further_than_the_lowest_adapter(
    monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], layers: tuple[int, ...], attended: int, walked: int
) -> None:
    counts = {"attention": 0, "layers": 0}
    attend_backward, backward = layer_steps.attend_backward, PlainSteps.backward

    def counted_attention(*arguments: Any) -> Any:
        counts["attention"] += 1
        return attend_backward(*arguments)

    def counted_layer(*arguments: Any) -> Any:
        counts["layers"] += 1
        return backward(*arguments)

    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    config = replace(CONFIG, target_modules=targets, layers=layers)
    expected = gradients(backbone, [config])
    assert fuse_layers(backbone.decoder) == 3
    monkeypatch.setattr(layer_steps, "attend_backward", counted_attention)
    monkeypatch.setattr(PlainSteps, "backward", counted_layer)
    for own, ours in zip(expected, gradients(backbone, [config]), strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
    assert counts == {"attention": attended, "layers": walked}


@pytest.mark.gpu
@pytest.mark.skipif(
    CudaKernels.HOPPER not in alto_kernels.cuda_kernels(torch.bfloat16), reason="needs a GPU of compute capability 9.0"
)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all layers", "not the first"])
def test_compiled_steps_give_the_bits_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, layers: tuple[int, ...] | None
) -> None:
    kind, changes = KINDS[name]
    backbone = prepare_backbone(make(kind, **changes).bfloat16(), name, torch.device("cuda"))
    configs = [replace(CONFIG, lora_rank=rank, seed=rank, layers=layers) for rank in (4, 16, 40)]
    backbone.use_backend(choose_backend("cutlass", backbone.layers, 3, backbone.device, torch.bfloat16))
    taken: list[bool] = []

    def noted(parts: LayerParts, tick: Any) -> Steps:
        steps = steps_of(parts, tick)
        taken.append(isinstance(steps, CompiledSteps))
        return steps

    with monkeypatch.context() as patch:
        patch.setattr(fused_layer, "steps_of", noted)
        compiled = gradients(backbone, configs)
    assert taken == ([True] * 3 if layers is None else [False, True, True])
    monkeypatch.setattr(fused_layer, "steps_of", lambda parts, tick: PlainSteps(parts))
    for own, ours in zip(gradients(backbone, configs), compiled, strict=True):
        assert own.isfinite().all()
        assert own.abs().max() > 0
        assert torch.equal(own, ours)


def item(length: int, seed: int) -> Item:
    ids = np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)
    return Item((PackedSequence(ids, np.arange(length) >= 1),), length - 1)


def gradients(backbone: Backbone, configs: list[TrialConfig]) -> list[torch.Tensor]:
    """Return the adapters' gradients after a tick of ragged sequences, and its losses."""
    shares = []
    for number, config in enumerate(configs):
        adapter = Adapter(backbone.adapted_modules(config), config.lora_rank, 2.0)
        adapter.initialise(number, backbone.device)
        adapter.param.add_(0.01)
        items = [item(length, length + number) for length in (17, 60, 5)]
        shares.append(Share(adapter, items, batch_denominator=79.0, begins_batch=True))
    losses = passes.train_tick(backbone, passes.lay_out(backbone, shares))
    return [*(share.adapter.grad.clone() for share in shares if share.adapter is not None), losses.clone()]
