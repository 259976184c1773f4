"""A tiny model on disk, ragged datasets beside it, and jobs over them: what several processes can train in seconds."""

import json
import random
from itertools import count
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.sharding.sharded_backbone import empty_model
from alto_training.sharding.units import layers_kept_whole, plan_units

WORDS = 90


def room_for(config: Any, layers: int, at_once: int = 3) -> int:
    """Return the least room for fp32 weights, to 256 bytes, that has each of two ranks keep so many layers whole.

    With one gather ahead `at_once` is three in lock step, two else.
    """
    plan = plan_units(empty_model(config, torch.float32))
    return next(room for room in count(0, 256) if len(layers_kept_whole(plan, 2, room, at_once)) == layers)


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a random Llama with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": WORDS + 2,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    LlamaForCausalLM(LlamaConfig(**(values | changes))).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{word}": word + 2 for word in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: int, seed: int) -> Path:
    """Write prompts and completions of very different lengths."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            words = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.choice((2, 3, 5, 20)))) for _ in range(2)]
            file.write(json.dumps({"prompt": words[0] + " ", "completion": words[1]}) + "\n")
    return path


def make_job(folder: Path, *configs: TrialConfig, **changes: Any) -> TuningJob:
    """Return a job over the model in `folder`/model, its datasets beside it; written if they are not there."""
    model = folder / "model"
    if not model.exists():
        write_model(model)
        write_rows(folder / "train.jsonl", 23, seed=1)
        write_rows(folder / "validation.jsonl", 7, seed=2)
    values: dict[str, Any] = {
        "task_id": "task",
        "base_model": str(model),
        "train_path": str(folder / "train.jsonl"),
        "validation_path": str(folder / "validation.jsonl"),
        "trials": tuple(Trial(f"trial-{number}", config) for number, config in enumerate(configs)),
        "early_exit": EarlyExit(policy="none"),
        "evaluation": Evaluation(count=3),
    }
    return TuningJob(**(values | changes))


def mixed_configs() -> list[TrialConfig]:
    """Return trials of different ranks, batches, lengths and layers; the last becomes NaN.

    Epsilon is large: AdamW divides what is nearly zero by itself, and so makes any rounding a difference of its own.
    """
    common: dict[str, Any] = {"learning_rate": 2e-3, "adam_epsilon": 1e-3, "max_length": 48}
    return [
        TrialConfig(lora_rank=2, batch_size=2, epochs=2, **common),
        TrialConfig(lora_rank=5, batch_size=3, gradient_accumulation_steps=2, **common),
        TrialConfig(lora_rank=3, batch_size=1, lora_dropout=0.1, seed=3, **common | {"max_length": 24}),
        TrialConfig(lora_rank=4, batch_size=4, layers=(2,), epochs=3, **common),
        TrialConfig(lora_rank=2, batch_size=2, epochs=2, max_grad_norm=0.0, **common | {"learning_rate": 1e30}),
    ]
