"""The law of the executor: a trial among others becomes what PEFT makes of it alone, on the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alto_common.tuning import Evaluation, Objective, ObjectiveKind, Schedule, ScheduleKind, TrialConfig, TuningJob
from alto_training.executor.events import TrialProgress
from alto_training.executor.settings import Backend, ExecutorSettings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft_solo import train_alone
from tiny_jobs import MemoryDataset, adapter_weights, assert_same_bits, job, run, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# Below it an element whose gradient is all but zero takes a step as long as its rounding error decides.
WELL_CONDITIONED_EPSILON = 3e-4
BOUND = 1e-5


def assert_equal_to_solo(job: TuningJob, but: str | None = None, **options: Any) -> None:
    job = replace(job, evaluation=Evaluation(count=1))  # the best weights are then the last
    with tempfile.TemporaryDirectory() as workdir:
        outcome, events = run(job, Path(workdir), **options)
        weights = {
            trial.trial_id: adapter_weights(trial.adapter_path) for trial in outcome.trials if trial.trial_id != but
        }
    data = MemoryDataset(23, seed=1)
    for trial in job.trials:
        if trial.trial_id == but:
            continue
        alone = train_alone(tiny_llama(), data, trial.config, job.objective)
        losses = [
            event.train_loss
            for event in events
            if isinstance(event, TrialProgress) and event.trial_id == trial.trial_id
        ]
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        for side, letter in enumerate("AB"):
            # All A and all B of the trial, each as one vector: a single matrix may have gradients of mere rounding.
            expected = torch.cat([matrices[side].flatten() for matrices in alone.matrices.values()])
            ours = torch.cat(
                [
                    weights[trial.trial_id][f"base_model.model.{path}.lora_{letter}.weight"].flatten()
                    for path in alone.matrices
                ]
            )
            assert (ours - expected).norm() <= BOUND * expected.norm(), f"{trial.trial_id} {letter}"


def config(**changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "learning_rate": 2e-3,
        "batch_size": 3,
        "max_steps": 6,
        "max_length": 32,
        "adam_epsilon": WELL_CONDITIONED_EPSILON,
    }
    return TrialConfig(**(values | changes))


configs = st.builds(
    config,
    lora_rank=st.sampled_from([1, 2, 5, 8, 17]),
    lora_alpha=st.sampled_from([1.0, 8.0, 16.0]),
    use_rslora=st.booleans(),
    lora_dropout=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    target_modules=st.sampled_from(
        [("all-linear",), ("q_proj",), ("down_proj", "v_proj"), ("mlp.gate_proj", "o_proj")]
    ),
    layers=st.sampled_from([None, None, (1,)]),
    learning_rate=st.sampled_from([1e-4, 1e-3, 5e-3]),
    lora_plus_ratio=st.sampled_from([1.0, 4.0]),
    schedule=st.builds(
        Schedule,
        kind=st.sampled_from(ScheduleKind),
        warmup_fraction=st.sampled_from([0.0, 0.4]),
        final_fraction=st.sampled_from([0.0, 0.2]),
    ),
    batch_size=st.integers(1, 5),
    gradient_accumulation_steps=st.integers(1, 3),
    max_steps=st.integers(1, 6),
    max_length=st.sampled_from([7, 16, 32]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_grad_norm=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 3),
)


@pytest.mark.slow
@settings(
    max_examples=8,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # no shrinking: an example takes seconds
    suppress_health_check=list(HealthCheck),
)
@given(
    mix=st.lists(configs, min_size=2, max_size=4),
    slots=st.integers(1, 4),
    tokens_per_tick=st.sampled_from([16, 60, 200]),
    objective=st.sampled_from([Objective(), Objective(ObjectiveKind.DPO, dpo_beta=0.3)]),
)
def test_any_mix_of_trials_equals_each_alone(
    mix: list[TrialConfig], slots: int, tokens_per_tick: int, objective: Objective
) -> None:
    machine = ExecutorSettings(slots=slots, tokens_per_tick=tokens_per_tick, backend=Backend.REFERENCE)
    assert_equal_to_solo(job(*mix, objective=objective), settings=machine)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU, Backend.AUTO])
def test_every_back_end_equals_solo(backend: Backend) -> None:
    mix = [config(), config(lora_rank=7, lora_dropout=0.2, layers=(1,)), config(target_modules=("up_proj",), seed=1)]
    assert_equal_to_solo(job(*mix), settings=ExecutorSettings(tokens_per_tick=64, backend=backend))


def test_recomputed_activations_equal_solo_and_change_no_bit(tmp_path: Path) -> None:
    mix = job(config(lora_dropout=0.3), config(lora_rank=2, batch_size=1))
    recomputing = ExecutorSettings(tokens_per_tick=64, backend=Backend.REFERENCE, recompute=True)
    assert_equal_to_solo(mix, settings=recomputing)
    kept, _ = run(mix, tmp_path / "kept", settings=replace(recomputing, recompute=False))
    recomputed, _ = run(mix, tmp_path / "recomputed", settings=recomputing)
    assert_same_bits(kept, recomputed)


def test_epochs_read_the_dataset_as_often_as_asked_and_the_last_batch_may_be_short(tmp_path: Path) -> None:
    epochs = job(config(batch_size=5, epochs=1.5, max_steps=None))
    assert_equal_to_solo(epochs)
    outcome, _ = run(epochs, tmp_path)
    assert outcome.trials[0].total_steps == 7  # 23 rows x 1.5 = 34.5 rows, by fives
    assert outcome.trials[0].samples_trained == 35


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make memory that nobody has written not a number: who reads another's padding is found out."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@settings(
    max_examples=6,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    mix=st.lists(configs, min_size=2, max_size=3),
    place=st.integers(0, 2),
    rate=st.sampled_from([1e30, 1e12]),
    slots=st.integers(2, 4),
    tokens_per_tick=st.sampled_from([16, 60, 200]),
    backend=st.sampled_from([Backend.REFERENCE, Backend.CPU]),
)
def test_any_mix_around_a_neighbour_that_becomes_infinite_equals_each_alone(
    mix: list[TrialConfig], place: int, rate: float, slots: int, tokens_per_tick: int, backend: Backend
) -> None:
    place = min(place, len(mix))
    mix = [*mix[:place], config(learning_rate=rate, max_steps=6, batch_size=1, max_grad_norm=0.0), *mix[place:]]
    machine = ExecutorSettings(slots=slots, tokens_per_tick=tokens_per_tick, backend=backend)
    with poisoned_memory():
        assert_equal_to_solo(job(*mix), but=f"trial-{place}", settings=machine)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("objective", [Objective(), Objective(ObjectiveKind.DPO)])
def test_a_poisoned_neighbour_changes_no_bit_of_the_others(
    tmp_path: Path, objective: Objective, backend: Backend
) -> None:
    # The neighbour's weights are unusable after its first step; it ends at its second, poisoned or stopped there.
    from alto_training.executor.control import ControlQueue, StopTrial
    from alto_training.executor.events import Event

    once = {"objective": objective, "evaluation": Evaluation(count=1)}
    poisoned = [config(), config(learning_rate=1e30, seed=1), config(lora_rank=9, lora_dropout=0.1)]
    healthy = [poisoned[0], replace(poisoned[1], learning_rate=1e-3), poisoned[2]]
    control = ControlQueue()

    def stop_neighbour(event: Event) -> None:
        if isinstance(event, TrialProgress) and event.trial_id == "trial-1" and event.step == 2:
            control.put(StopTrial("trial-1"))

    machine = ExecutorSettings(tokens_per_tick=96, backend=backend)
    with poisoned_memory():
        first, _ = run(job(*poisoned, **once), tmp_path / "poisoned", settings=machine)
    second, _ = run(
        job(*healthy, **once), tmp_path / "healthy", settings=machine, events=stop_neighbour, control=control
    )
    ended = {trial.trial_id: trial for trial in first.trials}["trial-1"]
    assert (ended.state, ended.step) == ("stopped", 1)
    assert "lower learning rate" in ended.reason
    assert_same_bits(first, second, but="trial-1")


def test_a_trial_does_not_depend_on_what_its_neighbours_train(tmp_path: Path) -> None:
    # Same layout of every tick, other weights beside: not a bit may differ.
    first, _ = run(job(config(), config(seed=1, learning_rate=1e-4)), tmp_path / "first")
    second, _ = run(job(config(), config(seed=1, learning_rate=1e-2, use_rslora=True)), tmp_path / "second")
    assert_same_bits(first, second, but="trial-1")
