"""A tiny random Llama, in-memory datasets with the executor's interface, and short jobs over them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.events import Event, Outcome, TrialProgress
from alto_training.executor.executor import Executor
from alto_training.executor.settings import Backend, ExecutorSettings
from safetensors.torch import load_file

VOCABULARY = 96


@dataclass(frozen=True)
class MemoryExample:
    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class MemoryDataset:
    """Rows of random tokens of ragged lengths; the completion's tokens are the targets."""

    def __init__(self, rows: int, seed: int = 0, longest: int = 24) -> None:
        draws = np.random.default_rng(seed)
        self._rows = []
        for _ in range(rows):
            prompt, completion = draws.integers(2, longest // 2, size=2)
            self._rows.append((draws.integers(0, VOCABULARY, prompt + completion).astype(np.int32), int(prompt)))
        self.fingerprint = hashlib.sha256(b"".join(ids.tobytes() for ids, _ in self._rows)).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, max_length: int) -> MemoryExample:
        ids, prompt = self._rows[index]
        ids = ids[:max_length]
        return MemoryExample(ids, np.arange(len(ids)) >= prompt)

    def preference(self, index: int, max_length: int) -> tuple[MemoryExample, MemoryExample]:
        chosen = self.example(index, max_length)
        other = self.example((index + 1) % len(self), max_length)
        return chosen, other


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(values | changes))


def tiny_llama() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config())


def tiny_backbone() -> Backbone:
    return prepare_backbone(tiny_llama(), "tiny-llama", torch.device("cpu"))


def job(*configs: TrialConfig, **changes: Any) -> TuningJob:
    values: dict[str, Any] = {
        "task_id": "task",
        "base_model": "tiny-llama",
        "train_path": "train",
        "validation_path": "validation",
        "trials": tuple(Trial(f"trial-{number}", config) for number, config in enumerate(configs)),
        "early_exit": EarlyExit(policy="none"),
        "evaluation": Evaluation(count=3),
    }
    return TuningJob(**(values | changes))


def open_memory(job: TuningJob, cache_dir: Path) -> tuple[MemoryDataset, MemoryDataset]:
    return MemoryDataset(23, seed=1), MemoryDataset(6, seed=2)


def run(job: TuningJob, workdir: Path, **options: Any) -> tuple[Outcome, list[Event]]:
    """Run an executor over the tiny Llama and return its outcome and all its events."""
    events: list[Event] = []
    settings = options.pop("settings", ExecutorSettings(tokens_per_tick=96, backend=Backend.REFERENCE))
    options = {"backbone": tiny_backbone(), "open_data": open_memory} | options
    sink = options.pop("events", events.append)
    outcome = Executor(job, workdir, sink, settings, **options).run()
    return outcome, events


def adapter_weights(folder: str | Path | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return load_file(Path(folder) / "adapter_model.safetensors")


def train_losses(events: list[Event]) -> list[float]:
    """Return the loss of every step, trial by trial."""
    steps = [event for event in events if isinstance(event, TrialProgress)]
    return [event.train_loss for event in sorted(steps, key=lambda event: (event.trial_id, event.step))]


def assert_close_adapters(first: Outcome, second: Outcome) -> None:
    """Assert that the trials of two runs ended with weights within 1e-5 of each other."""
    for one, other in zip(first.trials, second.trials, strict=True):
        expected, found = adapter_weights(one.adapter_path), adapter_weights(other.adapter_path)
        for name, tensor in expected.items():
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm()


def assert_same_bits(first: Outcome, second: Outcome, but: str | None = None) -> None:
    """Assert that two runs ended with the same adapters to the last bit, but for one trial."""
    expected = {trial.trial_id: trial for trial in first.trials if trial.trial_id != but}
    found = {trial.trial_id: trial for trial in second.trials if trial.trial_id != but}
    assert expected.keys() == found.keys()
    for trial_id, trial in expected.items():
        other = found[trial_id]
        assert (other.state, other.best_step) == (trial.state, trial.best_step)
        assert other.best_validation_loss == trial.best_validation_loss
        weights = adapter_weights(other.adapter_path)
        for name, tensor in adapter_weights(trial.adapter_path).items():
            assert torch.equal(weights[name], tensor), f"{trial_id} {name}"
