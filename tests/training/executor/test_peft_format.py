from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alto_common.tuning import Trial, TrialConfig
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.durable_files import replace_folder, write_file
from alto_training.executor.events import TrialProgress
from safetensors.torch import load_file, save_file
from tiny_jobs import adapter_weights, job, run, tiny_llama

CONFIG = TrialConfig(lora_rank=3, learning_rate=1e-2, batch_size=4, max_steps=4, max_length=24)


def description(folder: str | None) -> dict[str, object]:
    assert folder is not None
    found: dict[str, object] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return found


def test_names_are_suffixes_where_those_say_the_same(tmp_path: Path) -> None:
    trials = [
        replace(CONFIG, target_modules=("q_proj", "v_proj")),
        replace(CONFIG, target_modules=("all-linear",), layers=(1,)),
        replace(CONFIG, target_modules=("model.layers.0.self_attn.q_proj",)),
    ]
    outcome, _ = run(job(*trials), tmp_path)
    described = {trial.trial_id: description(trial.adapter_path) for trial in outcome.trials}
    assert described["trial-0"]["target_modules"] == ["q_proj", "v_proj"]
    assert described["trial-0"]["layers_to_transform"] is None
    assert described["trial-1"]["layers_to_transform"] == [1]
    assert "down_proj" in described["trial-1"]["target_modules"]  # type: ignore[operator]
    assert described["trial-2"]["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_the_base_model_is_named_as_the_task_names_it(tmp_path: Path) -> None:
    named, _ = run(job(CONFIG, base_model_name="org/tiny"), tmp_path / "named")
    assert description(named.trials[0].adapter_path)["base_model_name_or_path"] == "org/tiny"
    nameless, _ = run(job(CONFIG), tmp_path / "nameless")
    assert description(nameless.trials[0].adapter_path)["base_model_name_or_path"] == "tiny-llama"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_selection_of_modules_loads_into_peft_with_no_key_missing(tmp_path: Path) -> None:
    from peft import PeftModel

    trials = [
        CONFIG,
        replace(CONFIG, target_modules=("all-linear",), layers=(1,)),
        replace(CONFIG, target_modules=("model.layers.0.self_attn.q_proj", "up_proj")),
    ]
    outcome, _ = run(job(*trials), tmp_path)
    for trial in outcome.trials:
        model = PeftModel.from_pretrained(tiny_llama(), str(trial.adapter_path))
        loaded = {
            name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name
        }
        written = adapter_weights(trial.adapter_path)
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_training_starts_from_an_adapter_and_goes_on_from_its_loss(tmp_path: Path) -> None:
    first, events = run(job(replace(CONFIG, max_steps=12)), tmp_path / "first")
    assert first.best is not None
    warm = Trial("warm", replace(CONFIG, max_steps=2), initial_adapter_path=first.best.adapter_path)
    _, warm_events = run(replace(job(CONFIG), trials=(warm,)), tmp_path / "warm")
    cold_loss = next(event.train_loss for event in events if isinstance(event, TrialProgress))
    warm_loss = next(event.train_loss for event in warm_events if isinstance(event, TrialProgress))
    assert warm_loss < cold_loss - 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "has r 3, the trial 4"),
        ({"target_modules": ("q_proj",)}, "adapt other modules"),
        ({"use_rslora": True}, "has use_rslora False"),
    ],
)
def test_an_adapter_that_does_not_fit_the_trial_fails_it_and_no_other(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    first, _ = run(job(CONFIG), tmp_path / "first")
    assert first.best is not None
    odd = replace(CONFIG, **changes)  # type: ignore[arg-type]
    trials = (Trial("odd", odd, initial_adapter_path=first.best.adapter_path), Trial("sound", CONFIG))
    outcome, _ = run(replace(job(CONFIG), trials=trials), tmp_path / "second")
    ended = {trial.trial_id: trial for trial in outcome.trials}
    assert ended["odd"].state == "failed"
    assert message in ended["odd"].reason
    assert ended["sound"].state == "succeeded"
    assert outcome.state == "succeeded"


def test_an_adapter_of_another_base_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    first, _ = run(job(CONFIG), tmp_path / "first")
    assert first.best is not None
    assert first.best.adapter_path is not None
    warm = Trial("warm", CONFIG, initial_adapter_path=first.best.adapter_path)
    task = replace(job(CONFIG), trials=(warm,))

    other = tiny_llama()
    other.lm_head.weight.data.add_(1.0)
    backbone: Backbone = prepare_backbone(other, "other", torch.device("cpu"))
    outcome, _ = run(task, tmp_path / "second", backbone=backbone)
    assert "another backbone" in outcome.trials[0].reason

    weights = Path(first.best.adapter_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    outcome, _ = run(task, tmp_path / "third")
    assert outcome.state == "failed"
    assert "damaged" in outcome.trials[0].reason


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"use_dora": True}, "without use_dora"),
        ({"lora_bias": True}, "without lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "without modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "without rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "without alpha_pattern"),
        ({"bias": "lora_only"}, 'with bias "none"'),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model's own weights"),
        # The weights would start with another effect than they were trained with.
        ({"lora_alpha": 12.5}, "give the trial lora_alpha 12.5"),
    ],
)
def test_an_adapter_that_is_more_than_lora_or_has_another_scaling_is_refused(
    tmp_path: Path, described: dict[str, object], said: str
) -> None:
    first, _ = run(job(CONFIG), tmp_path / "first")
    assert first.best is not None
    assert first.best.adapter_path is not None
    file = Path(first.best.adapter_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | described))
    warm = Trial("warm", CONFIG, initial_adapter_path=first.best.adapter_path)
    outcome, _ = run(replace(job(CONFIG), trials=(warm,)), tmp_path / "second")
    assert outcome.trials[0].state == "failed"
    assert said in outcome.trials[0].reason


def test_an_adapter_with_a_matrix_missing_or_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    first, _ = run(job(CONFIG), tmp_path / "first")
    assert first.best is not None
    assert first.best.adapter_path is not None
    file = Path(first.best.adapter_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    warm = replace(job(CONFIG), trials=(Trial("warm", CONFIG, initial_adapter_path=first.best.adapter_path),))
    name = min(name for name in tensors if "lora_B" in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    outcome, _ = run(warm, tmp_path / "second")
    assert name.removeprefix("base_model.model.") in outcome.trials[0].reason
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    outcome, _ = run(warm, tmp_path / "third")
    assert "not finite" in outcome.trials[0].reason


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with replace_folder(folder) as aside:
        write_file(aside / "weights", b"old")
    with pytest.raises(RuntimeError), replace_folder(folder) as aside:
        write_file(aside / "weights", b"new")
        raise RuntimeError("the disk is full")
    assert (folder / "weights").read_bytes() == b"old"
    with replace_folder(folder) as aside:
        write_file(aside / "other", b"new")
    assert os.listdir(folder) == ["other"]
    assert os.listdir(tmp_path) == ["adapter"]
