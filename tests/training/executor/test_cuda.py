"""The same laws on a GPU: left out where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import Objective, ObjectiveKind, TrialConfig
from alto_training.executor.backbone import prepare_backbone
from alto_training.executor.events import Event, TrialProgress
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from tiny_jobs import job, llama_config, run, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = TrialConfig(lora_rank=8, learning_rate=2e-3, batch_size=3, max_steps=8, max_length=32, adam_epsilon=3e-4)
MIX = (CONFIG, replace(CONFIG, lora_rank=16, lora_dropout=0.2, seed=1), replace(CONFIG, target_modules=("q_proj",)))


def on_gpu(
    dtype: torch.dtype, backend: Backend = Backend.REFERENCE, model: Any = None, **changes: Any
) -> dict[str, Any]:
    settings = ExecutorSettings(
        device="cuda",
        backbone_dtype=BackboneDtype.BFLOAT16 if dtype == torch.bfloat16 else BackboneDtype.FLOAT32,
        tokens_per_tick=96,
        backend=backend,
        **changes,
    )
    backbone = prepare_backbone((model or tiny_llama()).to(dtype), "tiny-llama", torch.device("cuda"))
    return {"settings": settings, "backbone": backbone}


def losses(events: list[Event]) -> list[float]:
    steps = [event for event in events if isinstance(event, TrialProgress)]
    return [event.train_loss for event in sorted(steps, key=lambda event: (event.trial_id, event.step))]


@pytest.mark.parametrize("objective", [Objective(), Objective(ObjectiveKind.DPO)])
def test_fp32_on_the_gpu_is_what_the_cpu_gives(tmp_path: Path, objective: Objective) -> None:
    task = job(*MIX, objective=objective)
    _, on_cpu = run(task, tmp_path / "cpu")
    _, on_cuda = run(task, tmp_path / "cuda", **on_gpu(torch.float32))
    assert losses(on_cuda) == pytest.approx(losses(on_cpu), rel=2e-3)


def llama_for_the_kernel() -> Any:
    """Return a tiny Llama whose heads are 16 wide: the varlen kernel takes multiples of 8."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(hidden_size=64))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, llama_for_the_kernel])
def test_bf16_follows_the_fp32_loss_curve(tmp_path: Path, make: Callable[[], Any], recompute: bool) -> None:
    exact_backbone = prepare_backbone(make(), "tiny", torch.device("cpu"))
    _, exact = run(job(*MIX), tmp_path / "cpu", backbone=exact_backbone)
    _, rounded = run(job(*MIX), tmp_path / "cuda", **on_gpu(torch.bfloat16, model=make(), recompute=recompute))
    assert losses(rounded) == pytest.approx(losses(exact), rel=2e-2)


def test_parked_adapters_go_to_the_host_and_come_back(tmp_path: Path) -> None:
    together, _ = run(job(*MIX), tmp_path / "together", **on_gpu(torch.float32))
    in_turn, _ = run(job(*MIX), tmp_path / "in-turn", **on_gpu(torch.float32, slots=1))
    expected = {trial.trial_id: trial.best_validation_loss for trial in together.trials}
    for trial in in_turn.trials:
        assert trial.best_validation_loss == pytest.approx(expected[trial.trial_id], rel=1e-3)


def test_a_poisoned_neighbour_leaves_the_others_finite_and_unchanged(tmp_path: Path) -> None:
    poisoned = job(*MIX, replace(CONFIG, learning_rate=1e30, seed=5))
    _, with_poison = run(poisoned, tmp_path / "poisoned", **on_gpu(torch.bfloat16))
    _, without = run(job(*MIX), tmp_path / "clean", **on_gpu(torch.bfloat16))
    kept = [event for event in with_poison if getattr(event, "trial_id", "") != "trial-3"]
    assert losses(kept) == pytest.approx(losses(without), rel=1e-2)
