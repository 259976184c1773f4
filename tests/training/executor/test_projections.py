"""q, k and v read one input, gate and up another: multiplied together they are what each is by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.settings import Backend, ExecutorSettings
from tiny_jobs import assert_close_adapters, job, run, tiny_backbone, train_losses

CONFIG = TrialConfig(lora_rank=4, learning_rate=2e-3, batch_size=3, max_steps=6, max_length=32, adam_epsilon=3e-4)
MIX = (
    CONFIG,
    replace(CONFIG, lora_dropout=0.2, seed=1),
    replace(CONFIG, target_modules=("q_proj", "v_proj", "up_proj")),
)


def names(backbone: Backbone) -> list[tuple[str, ...]]:
    found = []
    for layer in backbone.layers:
        if layer.shared_input is not None and layer.shared_input.projections.layers[0] is layer:
            found.append(tuple(one.path.rsplit(".", 1)[-1] for one in layer.shared_input.projections.layers))
    return found


def test_a_llama_shares_the_inputs_of_its_attention_and_of_its_mlp(backbone: Backbone) -> None:
    assert names(backbone) == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2


def test_one_projection_for_all_shares_with_nobody() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        use_parallel_residual=False,
    )
    found = prepare_backbone(GPTNeoXForCausalLM(config), "tiny-neox", torch.device("cpu"))
    assert names(found) == []


@pytest.mark.parametrize("name", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("recompute", [False, True])
def test_together_they_are_what_each_is_by_itself(tmp_path: Path, name: Backend, recompute: bool) -> None:
    settings = ExecutorSettings(tokens_per_tick=96, backend=name, recompute=recompute)
    apart = tiny_backbone()
    for layer in apart.layers:
        layer.shared_input = None
    alone, alone_events = run(job(*MIX), tmp_path / "alone", settings=settings, backbone=apart)
    together, together_events = run(job(*MIX), tmp_path / "together", settings=settings)
    assert train_losses(together_events) == pytest.approx(train_losses(alone_events), rel=1e-5)
    assert_close_adapters(alone, together)


def test_adapters_are_multiplied_with_the_layers_that_a_tick_adapts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = KernelBackend.forward

    def noted(self: KernelBackend, x: Any, layers: Any, tick: Any) -> Any:
        seen.append(tuple(layer.index for layer in layers))
        return original(self, x, layers, tick)

    monkeypatch.setattr(KernelBackend, "forward", noted)
    settings = ExecutorSettings(tokens_per_tick=96, backend=Backend.CPU)
    run(job(MIX[2]), tmp_path, settings=settings)
    q, v, up, next_q, next_v, next_up = 0, 2, 5, 7, 9, 12
    assert set(seen) == {(q, v), (up,), (next_q, next_v), (next_up,)}
