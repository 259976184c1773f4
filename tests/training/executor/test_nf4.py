"""A backbone in 4 bits: the numbers of bitsandbytes, training equal to PEFT's over the same weights, less memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from alto_common.tuning import Evaluation, TrialConfig
from alto_training.executor import nf4
from alto_training.executor.backbone import load_backbone
from alto_training.executor.errors import WrongBaseModelError
from alto_training.executor.events import TrialProgress
from alto_training.executor.frozen_linear import QuantisedLinear
from alto_training.executor.loading import load_job_backbone
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from peft_solo import train_alone
from test_families import make
from tiny_jobs import MemoryDataset, adapter_weights, job, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def saved(family: str, folder: Path) -> Path:
    make(family).save_pretrained(folder)
    return folder


def dense_twin(folder: Path) -> Any:
    """Return the model with each linear weight as 4 bits leave it, as an ordinary dense model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nf4.quantise_layers(twin.base_model)
    with torch.no_grad():
        for name, layer in twin.base_model.named_modules():
            if isinstance(layer, nf4.Nf4Linear):
                weight = model.base_model.get_submodule(name).weight
                transposed = type(model.base_model.get_submodule(name)).__name__ == "Conv1D"
                weight.copy_(layer.weight.t() if transposed else layer.weight)
    return model


def config(**changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "lora_rank": 4,
        "learning_rate": 2e-3,
        "batch_size": 3,
        "max_steps": 4,
        "max_length": 24,
        "adam_epsilon": 3e-4,
    }
    return TrialConfig(**(values | changes))


@pytest.mark.parametrize("shape", [(8, 64), (5, 7), (3, 43), (1, 1), (64, 66)])
def test_each_weight_becomes_the_nearest_level_of_its_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    dense = nf4.Nf4Linear(weight, None).weight
    assert dense.shape == shape
    levels = torch.tensor(nf4.LEVELS)
    for block, kept in zip(weight.flatten().split(nf4.BLOCK), dense.flatten().split(nf4.BLOCK), strict=True):
        choices = levels[:, None] * block.abs().max()
        assert torch.allclose((kept - block).abs(), (choices - block).abs().amin(dim=0), atol=1e-7)


def test_a_block_of_zeros_stays_zero() -> None:
    assert torch.equal(nf4.Nf4Linear(torch.zeros(4, 32), None).weight, torch.zeros(4, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(48, 192, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=nf4.BLOCK, quant_type="nf4", compress_statistics=False)
    layer = nf4.Nf4Linear(weight, None)
    assert torch.equal(layer.codes, codes.flatten())
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(layer.weight, expected)
    monkeypatch.setattr(nf4, "_bitsandbytes_is_there", lambda: False)
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
def test_trials_equal_peft_over_the_same_weights(tmp_path: Path, family: str, backend: Backend) -> None:
    folder = saved(family, tmp_path / "model")
    backbone = load_backbone(str(folder), in_nf4=True)
    assert all(isinstance(layer.frozen, QuantisedLinear) for layer in backbone.layers)
    dropout = 0.0 if family == "gpt2" else 0.2  # PEFT's masks are shared by nn.Linear's place alone
    trials = [config(), config(lora_rank=7, lora_dropout=dropout, seed=3)]
    settings = ExecutorSettings(tokens_per_tick=64, backend=backend, backbone_dtype=BackboneDtype.NF4)
    outcome, events = run(
        job(*trials, evaluation=Evaluation(count=1)), tmp_path / "work", backbone=backbone, settings=settings
    )
    ended = sorted(outcome.trials, key=lambda trial: trial.trial_id)
    for trial, trial_config in zip(ended, trials, strict=True):
        alone = train_alone(dense_twin(folder), MemoryDataset(23, seed=1), trial_config)
        losses = [one.train_loss for one in events if isinstance(one, TrialProgress) and one.trial_id == trial.trial_id]
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        weights = adapter_weights(trial.adapter_path)
        for side, letter in enumerate("AB"):
            expected = torch.cat([matrices[side].flatten() for matrices in alone.matrices.values()])
            ours = torch.cat(
                [weights[f"base_model.model.{path}.lora_{letter}.weight"].flatten() for path in alone.matrices]
            )
            assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_layers_take_an_eighth_and_nothing_dense_lives_until_the_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama", tmp_path / "model")
    whole, small = load_backbone(str(folder)), load_backbone(str(folder), in_nf4=True)
    assert (small.fingerprint, small.parameters) == (whole.fingerprint, whole.parameters)
    dense = sum(4 * layer.frozen.in_features * layer.frozen.out_features for layer in whole.layers)
    quantised = [layer.frozen.module for layer in small.layers if isinstance(layer.frozen, QuantisedLinear)]
    assert len(quantised) == len(small.layers)
    held = sum(module.codes.nbytes + module.scales.nbytes for module in quantised)
    assert held < dense / 7  # 4.5 bits of 32
    assert not any(parameter.shape[-2:] == (80, 48) for parameter in small.decoder.parameters())

    made: list[weakref.ref[torch.Tensor]] = []
    original = nf4.dequantise

    def watched(*arguments: Any) -> torch.Tensor:
        weight = original(*arguments)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(nf4, "dequantise", watched)
    most_alive = 0

    def count(*_: object) -> None:
        nonlocal most_alive
        most_alive = max(most_alive, sum(one() is not None for one in made))

    monkeypatch.setattr(QuantisedLinear, "input_gradient", _counted(QuantisedLinear.input_gradient, count))
    run(job(config()), tmp_path / "work", backbone=small)
    assert len(made) > 2 * len(small.layers)
    assert most_alive == 0


def _counted(method: Any, count: Any) -> Any:
    def counted(self: Any, dy_TN: torch.Tensor, onto_TK: torch.Tensor | None = None) -> torch.Tensor:
        count()
        gradient: torch.Tensor = method(self, dy_TN, onto_TK)
        return gradient

    return counted


def test_a_setting_loads_it_and_a_run_in_another_number_format_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    in_nf4 = ExecutorSettings(tokens_per_tick=64, backend=Backend.REFERENCE, backbone_dtype=BackboneDtype.NF4)
    task = job(config(), base_model=str(folder))
    first, events = run(task, tmp_path / "work", settings=in_nf4, backbone=None)
    assert first.state == "succeeded"
    assert events[0].backbone_dtype == "nf4"  # type: ignore[union-attr]
    assert isinstance(load_job_backbone(str(folder), in_nf4).layers[0].frozen, QuantisedLinear)
    in_fp32 = ExecutorSettings(tokens_per_tick=64, backend=Backend.REFERENCE)
    with pytest.raises(WrongBaseModelError, match="nf4"):
        run(task, tmp_path / "work", settings=in_fp32, backbone=None)
