"""The whole executor over a pretrained model and real rows, judged by PEFT over the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alto_common.base_models import UnknownModelError, resolve
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.events import Event, TaskStarted
from alto_training.executor.executor import Executor
from alto_training.executor.settings import ExecutorSettings
from torch.nn.functional import cross_entropy

MODEL = "smollm2-135m-instruct"
EXAMPLES = Path(__file__).parents[3] / "examples" / "gsm8k-small"


def model_folder() -> str:
    try:
        return resolve(MODEL).location
    except UnknownModelError:
        pytest.skip("the model is not there; `alto models fetch` gets it")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_smollm2_has_in_peft_the_validation_loss_that_was_reported(tmp_path: Path) -> None:
    from alto_training.executor.data import open_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder()
    config = TrialConfig(lora_rank=8, learning_rate=2e-3, batch_size=1, max_steps=3, max_length=128)
    job = TuningJob(
        "real",
        MODEL,
        str(EXAMPLES / "train.jsonl"),
        str(EXAMPLES / "validation.jsonl"),
        (Trial("all-linear", config), Trial("attention", replace(config, target_modules=("q_proj", "v_proj")))),
        early_exit=EarlyExit("none"),
        evaluation=Evaluation(count=1, max_examples=2),
    )
    events: list[Event] = []
    outcome = Executor(job, tmp_path, events.append, ExecutorSettings(cache_dir=tmp_path / "cache")).run()
    assert outcome.best is not None

    data = open_dataset(
        Path(job.validation_path), AutoTokenizer.from_pretrained(folder), job.objective, tmp_path / "cache"
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = validation_loss(base, data)
    after = validation_loss(PeftModel.from_pretrained(base, str(outcome.best.adapter_path)), data)
    assert isinstance(events[0], TaskStarted)
    assert events[0].base_validation_loss == pytest.approx(before, abs=1e-3)
    assert outcome.best.best_validation_loss == pytest.approx(after, abs=1e-3)
    assert after < before - 0.02


@torch.no_grad()
def validation_loss(model: torch.nn.Module, data: object) -> float:
    total = tokens = 0.0
    for row in range(2):
        example = data.example(row, 128)  # type: ignore[attr-defined]
        ids = torch.from_numpy(example.input_ids.astype("int64"))
        labels = torch.where(torch.from_numpy(example.target_mask), ids, -100)
        logits = model(input_ids=ids[None]).logits[0]
        total += cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += int(example.target_mask[1:].sum())
    return total / tokens
