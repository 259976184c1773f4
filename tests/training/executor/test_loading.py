"""Opening what a job names: what cannot be trained on is refused by type, which a node can tell a tenant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alto_common.base_models import UnusableModelError
from alto_common.tuning import TuningJob
from alto_training.executor.errors import DatasetRefusedError
from alto_training.executor.loading import open_job_data
from tiny_jobs import job, llama_config
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<unk>", "<eos>", "one", "two", "three"]


def model_folder(folder: Path, vocabulary: int = len(WORDS), **special: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    llama_config(vocab_size=vocabulary).save_pretrained(folder)
    return folder


def job_over(model: Path, rows: list[dict[str, Any]], folder: Path) -> TuningJob:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return job(base_model=str(model), train_path=str(path), validation_path=str(path))


TALK = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


def test_conversations_over_a_model_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", eos_token="<eos>")
    with pytest.raises(DatasetRefusedError, match=r"training rows.*no chat template: give rows of") as caught:
        open_job_data(job_over(model, [TALK], tmp_path), tmp_path / "cache")
    assert [violation.field for violation in caught.value.violations] == ["dataset"]


def test_a_token_that_the_model_has_no_embedding_for_is_refused_with_its_line(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", vocabulary=len(WORDS) - 1, eos_token="<eos>")
    rows = [{"text": "one two"}, {"text": "two three"}]
    with pytest.raises(DatasetRefusedError, match=r"line\[2\] = 'token 4'.*the model has 4 tokens"):
        open_job_data(job_over(model, rows, tmp_path), tmp_path / "cache")
    train, _ = open_job_data(job_over(model, rows[:1], tmp_path), tmp_path / "cache")
    assert len(train) == 1


def test_a_tokenizer_that_is_missing_or_has_no_end_is_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    task = job_over(model, [{"text": "one"}], tmp_path)
    with pytest.raises(UnusableModelError, match="set eos_token"):
        open_job_data(task, tmp_path / "cache")
    (model / "tokenizer.json").unlink()
    with pytest.raises(UnusableModelError, match="no usable tokenizer"):
        open_job_data(task, tmp_path / "cache")
