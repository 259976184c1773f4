from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor.backbone import Backbone
from alto_training.executor.budget import backbone_facts, calibration_key, choose_budget, free_memory_bytes
from alto_training.executor.calibration import calibrate
from alto_training.executor.events import TaskStarted
from alto_training.executor.memory_model import adapter_parameters, load_calibration, prior, save_calibration
from alto_training.executor.settings import ExecutorSettings
from tiny_jobs import job, run

CONFIG = TrialConfig(lora_rank=8, max_length=32, max_steps=2, batch_size=2)


def test_given_numbers_are_taken_and_no_more_slots_than_trials(backbone: Backbone) -> None:
    settings = ExecutorSettings(tokens_per_tick=77, slots=5)
    assert choose_budget(settings, backbone, [CONFIG] * 9, None).tokens_per_tick == 77
    assert choose_budget(settings, backbone, [CONFIG] * 9, None).slots == 5
    assert choose_budget(settings, backbone, [CONFIG] * 3, None).slots == 3


def test_plenty_of_memory_gives_every_trial_a_slot_and_a_tick_that_is_long_enough(backbone: Backbone) -> None:
    budget = choose_budget(ExecutorSettings(memory_limit_bytes=2**35), backbone, [CONFIG] * 40, None)
    assert (budget.tokens_per_tick, budget.slots) == (1024, 40)


def test_slots_shrink_with_memory_and_rank_but_one_is_always_left(backbone: Backbone) -> None:
    facts = backbone_facts(backbone)
    model = prior(facts, 4, 1e11)
    each = adapter_parameters(facts, CONFIG) * model.bytes_per_parameter
    tick = (model.bytes_per_token + 8 * model.bytes_per_token_rank) * 100
    limit = int(model.fixed_bytes + tick + 6.5 * each)
    settings = ExecutorSettings(memory_limit_bytes=limit, tokens_per_tick=100)
    assert choose_budget(settings, backbone, [CONFIG] * 40, None).slots == 6
    wider = [replace(CONFIG, lora_rank=16)] * 40
    assert choose_budget(settings, backbone, wider, None).slots < 6
    assert choose_budget(replace(settings, memory_limit_bytes=1), backbone, wider, None).slots == 1


def test_a_measured_cost_model_is_believed(backbone: Backbone, tmp_path: Path) -> None:
    settings = ExecutorSettings(memory_limit_bytes=2**30)
    costly = replace(prior(backbone_facts(backbone), 4, 1e11), bytes_per_token=2**20, fixed_bytes=0.0)
    save_calibration(tmp_path, calibration_key(settings, backbone), costly)
    assert choose_budget(settings, backbone, [CONFIG], tmp_path).tokens_per_tick == pytest.approx(1000, abs=24)


def test_a_run_says_how_many_slots_memory_gave_it(tmp_path: Path) -> None:
    task = job(*[replace(CONFIG, seed=seed) for seed in range(4)])
    outcome, events = run(task, tmp_path, settings=ExecutorSettings(memory_limit_bytes=1, tokens_per_tick=64))
    assert isinstance(events[0], TaskStarted)
    assert events[0].slots == 1
    assert {trial.state for trial in outcome.trials} == {"succeeded"}


def test_free_memory_is_told() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 2**20


def test_a_profile_is_measured_kept_and_believed(backbone: Backbone, tmp_path: Path) -> None:
    settings = ExecutorSettings(memory_limit_bytes=2**33)
    configs = [CONFIG, replace(CONFIG, lora_rank=64)]
    model = calibrate(settings, backbone, configs, most_tokens=512, folder=tmp_path)
    assert load_calibration(tmp_path, calibration_key(settings, backbone)) == model
    assert model.seconds_per_token > 0
    assert model.fixed_bytes > 0
    # Measured with these settings, not for others.
    assert load_calibration(tmp_path, calibration_key(replace(settings, recompute=True), backbone)) is None
    assert choose_budget(settings, backbone, configs, tmp_path).tokens_per_tick >= 1


def test_a_run_measures_once_where_it_is_asked_to(tmp_path: Path) -> None:
    settings = ExecutorSettings(calibrate=True, cache_dir=tmp_path / "cache")
    first, _ = run(job(CONFIG), tmp_path / "first", settings=settings)
    (kept,) = (tmp_path / "cache").glob("*.json")
    written = kept.stat().st_mtime_ns
    second, _ = run(job(CONFIG), tmp_path / "second", settings=settings)
    assert kept.stat().st_mtime_ns == written
    assert (first.state, second.state) == ("succeeded", "succeeded")
