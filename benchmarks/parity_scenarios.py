"""The mixes of trials that benchmarks/parity.py trains, over a small random Llama and random ragged sequences."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from alto_common.tuning import (
    EarlyExit,
    Evaluation,
    Objective,
    ObjectiveKind,
    Schedule,
    ScheduleKind,
    Trial,
    TrialConfig,
    TuningJob,
)
from alto_training.executor.settings import ExecutorSettings

VOCABULARY = 512
POISON = 1e30  # a learning rate after which no weight is usable


def make_model() -> Any:
    """Return the same small Llama every time: 4 layers, hidden 96, grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=176,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,  # attention that attends: at 0.02 it is uniform and its gradients are rounding
        )
    )


@dataclass(frozen=True)
class RandomExample:
    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class RandomDataset:
    """Random sequences of `shortest` to `longest` tokens; the last two thirds of each are targets."""

    def __init__(self, rows: int, seed: int, shortest: int, longest: int) -> None:
        draws = np.random.default_rng(seed)
        lengths = draws.integers(shortest, longest + 1, size=rows)
        self._rows = [draws.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
        self.fingerprint = hashlib.sha256(b"".join(row.tobytes() for row in self._rows)).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, max_length: int) -> RandomExample:
        ids = self._rows[index][:max_length]
        return RandomExample(ids, np.arange(len(ids)) >= len(ids) // 3)

    def preference(self, index: int, max_length: int) -> tuple[RandomExample, RandomExample]:
        return self.example(index, max_length), self.example((index + 1) % len(self), max_length)


# Where a job's paths lead: (rows, seed, shortest, longest).
DATASETS = {
    "even": (61, 1, 30, 40),
    "ragged": (61, 2, 3, 90),
    "other": (37, 3, 8, 60),
    "validation": (5, 4, 20, 40),
}


def open_random(job: TuningJob, cache_dir: Path) -> tuple[RandomDataset, RandomDataset]:
    """Open a job's datasets by the names above."""
    return RandomDataset(*DATASETS[job.train_path]), RandomDataset(*DATASETS[job.validation_path])


@dataclass(frozen=True)
class Scenario:
    """Jobs that run in one executor. `poisoned` ends by itself; trials in `killed` mode die by SIGKILL on the way."""

    name: str
    jobs: tuple[TuningJob, ...]
    settings: ExecutorSettings = field(default_factory=lambda: ExecutorSettings(tokens_per_tick=256))
    poisoned: str | None = None
    killed: bool = False


def trial_mix(count: int, **changes: Any) -> list[TrialConfig]:
    """Return `count` configurations that differ in everything that may differ.

    Adam's epsilon is 3e-4: with 1e-8 an element whose gradient is all but zero takes a whole step in the direction of
    its rounding error, and PEFT does not agree with itself to 1e-5 when it cuts its batch otherwise
    (`--adam-epsilon 1e-8 --floor` shows it).
    """
    targets = [("all-linear",), ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ("o_proj", "k_proj")]
    schedules = [
        Schedule(),
        Schedule(ScheduleKind.LINEAR, warmup_fraction=0.2),
        Schedule(ScheduleKind.COSINE, warmup_fraction=0.1, final_fraction=0.1),
    ]
    mix = []
    for number in range(count):
        values: dict[str, Any] = {
            "lora_rank": (8, 3, 16, 1, 33, 5)[number % 6],
            "lora_alpha": (16.0, 3.0, 32.0, 2.0, 10.0, 20.0)[number % 6],
            "use_rslora": number % 4 == 3,
            "target_modules": targets[number % 4],
            "layers": (1, 3) if number % 5 == 4 else None,
            "learning_rate": (1e-3, 5e-4, 2e-3, 1e-4)[number % 4],
            "lora_plus_ratio": 4.0 if number % 3 == 2 else 1.0,
            "schedule": schedules[number % 3],
            "batch_size": (4, 1, 8, 3, 2)[number % 5],
            "max_steps": (12, 20, 8, 15, 10, 18)[number % 6],
            "max_length": (64, 32, 48)[number % 3],
            "weight_decay": (0.0, 0.01, 0.1)[number % 3],
            "max_grad_norm": (1.0, 0.1, 0.0)[number % 3],
            "adam_epsilon": 3e-4,
            "seed": number,
        }
        mix.append(TrialConfig(**(values | changes)))
    return mix


def make_job(configs: list[TrialConfig], **changes: Any) -> TuningJob:
    """Return a job whose trials run to their end, and are evaluated there."""
    values: dict[str, Any] = {
        "task_id": "task",
        "base_model": "small-llama",
        "train_path": "even",
        "validation_path": "validation",
        "trials": tuple(Trial(f"trial-{number}", config) for number, config in enumerate(configs)),
        "early_exit": EarlyExit(policy="none"),
        "evaluation": Evaluation(count=1),
    }
    return TuningJob(**(values | changes))


def scenario(name: str, trials: int, **changes: Any) -> Scenario:
    """Return the scenario of this name with `trials` trials; `changes` go into every configuration."""
    dpo = Objective(ObjectiveKind.DPO, dpo_beta=0.2)
    mix = trial_mix(trials, **changes)
    settings = ExecutorSettings(tokens_per_tick=256)
    if name == "mix":
        return Scenario(name, (make_job(mix),))
    if name == "ragged":
        return Scenario(name, (make_job(mix, train_path="ragged"),))
    if name == "accumulation":
        accumulating = [
            replace(config, gradient_accumulation_steps=2 + number % 3, batch_size=2 + number % 2, max_steps=6)
            for number, config in enumerate(mix)
        ]
        return Scenario(name, (make_job(accumulating, train_path="ragged"),), ExecutorSettings(tokens_per_tick=128))
    if name == "join_leave":
        return Scenario(name, (make_job(mix),), replace(settings, slots=max(2, trials // 4)))
    if name == "nan_neighbour":
        poisoned = [replace(mix[0], learning_rate=POISON), *mix[1:]]
        return Scenario(name, (make_job(poisoned),), poisoned="trial-0")
    if name == "dropout":
        return Scenario(name, (make_job([replace(c, lora_dropout=(0.1, 0.5)[n % 2]) for n, c in enumerate(mix)]),))
    if name == "dpo":
        return Scenario(name, (make_job(mix, objective=dpo),))
    if name == "resume_after_kill":
        dropping = [replace(config, lora_dropout=0.1) for config in mix]
        every_tick = replace(settings, checkpoint_every_ticks=4)
        return Scenario(name, (make_job(dropping, train_path="ragged"),), every_tick, killed=True)
    if name == "multi_task":
        half = max(1, trials // 2)
        first = make_job(mix[:half], task_id="first")
        second = make_job(mix[half:] or mix[:1], task_id="second", train_path="other", objective=dpo)
        return Scenario(name, (first, second))
    raise ValueError(f"no scenario {name!r}: choose among mix, {', '.join(SCENARIOS)}")


SCENARIOS = (
    "ragged",
    "accumulation",
    "join_leave",
    "nan_neighbour",
    "dropout",
    "dpo",
    "resume_after_kill",
    "multi_task",
)
