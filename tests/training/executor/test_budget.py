from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from alto_common.base_models import ModelFacts
from alto_common.calibrations import load_calibration, save_calibration
from alto_common.cost_model import CostModel, Load, adapter_parameters
from alto_common.tuning import TrialConfig
from alto_training.executor.backbone import Backbone
from alto_training.executor.budget import (
    Budget,
    backbone_bytes,
    backbone_facts,
    calibration_key,
    choose_budget,
    free_memory_bytes,
    known_costs,
    prior_costs,
)
from alto_training.executor.calibration import calibrate
from alto_training.executor.events import TaskStarted
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from tiny_jobs import job, run

CONFIG = TrialConfig(lora_rank=8, max_length=32, max_steps=2, batch_size=2)


def budget_of(settings: ExecutorSettings, backbone: Backbone, configs: list[TrialConfig]) -> Budget:
    facts = backbone_facts(backbone)
    costs = known_costs(settings, facts) or prior_costs(settings, facts)
    return choose_budget(settings, facts, costs, configs)


def test_given_numbers_are_taken_and_no_more_slots_than_trials(backbone: Backbone) -> None:
    settings = ExecutorSettings(tokens_per_tick=77, slots=5)
    assert budget_of(settings, backbone, [CONFIG] * 9).tokens_per_tick == 77
    assert budget_of(settings, backbone, [CONFIG] * 9).slots == 5
    assert budget_of(settings, backbone, [CONFIG] * 3).slots == 3


def test_plenty_of_memory_gives_every_trial_a_slot_and_a_tick_that_is_long_enough(backbone: Backbone) -> None:
    budget = budget_of(ExecutorSettings(memory_limit_bytes=2**35), backbone, [CONFIG] * 40)
    assert (budget.tokens_per_tick, budget.slots) == (1024, 40)


def test_slots_shrink_with_memory_and_rank_but_one_is_always_left(backbone: Backbone) -> None:
    facts = backbone_facts(backbone)
    settings = ExecutorSettings(tokens_per_tick=100)
    model = prior_costs(settings, facts)
    each = adapter_parameters(facts, CONFIG) * model.bytes_per_parameter
    limit = int(model.peak_bytes(Load.of(facts, [(CONFIG, 100)]), 0) + 6.5 * each)
    settings = replace(settings, memory_limit_bytes=limit)
    assert budget_of(settings, backbone, [CONFIG] * 40).slots == 6
    wider = [replace(CONFIG, lora_rank=16)] * 40
    assert budget_of(settings, backbone, wider).slots < 6
    assert budget_of(replace(settings, memory_limit_bytes=1), backbone, wider).slots == 1


def test_a_narrow_backbone_on_a_gpu_has_larger_ticks_but_not_at_the_cost_of_slots(backbone: Backbone) -> None:
    settings = ExecutorSettings(device="cuda")
    facts = replace(backbone_facts(backbone), hidden_size=576)
    costs = replace(prior_costs(settings, facts), bytes_per_token=1e6)

    def budget_within(limit: float, facts: ModelFacts = facts) -> Budget:
        return choose_budget(replace(settings, memory_limit_bytes=int(limit)), facts, costs, [CONFIG] * 32)

    assert budget_within(2**40) == replace(budget_within(2**40), tokens_per_tick=32768, slots=32)
    assert budget_within(2**40, replace(facts, hidden_size=4096)).tokens_per_tick == 8192
    each = adapter_parameters(facts, CONFIG) * costs.bytes_per_parameter
    room = costs.peak_bytes(Load.of(facts, [(CONFIG, 16384)]), 0)
    assert (budget_within(room + 32.5 * each).tokens_per_tick, budget_within(room + 32.5 * each).slots) == (16384, 32)
    assert (budget_within(room + 31.5 * each).tokens_per_tick, budget_within(room + 31.5 * each).slots) == (8192, 32)


def test_ticks_shrink_with_memory_in_steps_that_a_little_more_or_less_free_memory_does_not_move(
    backbone: Backbone,
) -> None:
    facts = backbone_facts(backbone)
    model = prior_costs(ExecutorSettings(), facts)
    limit = int(model.peak_bytes(Load.of(facts, [(CONFIG, 700)]), adapter_parameters(facts, CONFIG)))
    budgets = [
        budget_of(ExecutorSettings(memory_limit_bytes=int(limit * share)), backbone, [CONFIG]).tokens_per_tick
        for share in (0.999, 1.0, 1.001)
    ]
    assert budgets == [512] * 3


def test_a_measured_cost_model_is_believed(backbone: Backbone, tmp_path: Path) -> None:
    settings = ExecutorSettings(memory_limit_bytes=2**30, calibrations=tmp_path)
    facts = backbone_facts(backbone)
    costly = replace(prior_costs(settings, facts), bytes_per_token=2.0**21, fixed_bytes=0.0)
    save_calibration(tmp_path, calibration_key(settings, facts), costly)
    assert budget_of(settings, backbone, [CONFIG]).tokens_per_tick == 256  # 511 fit


def test_a_run_says_how_many_slots_memory_gave_it(tmp_path: Path) -> None:
    task = job(*[replace(CONFIG, seed=seed) for seed in range(4)])
    outcome, events = run(task, tmp_path, settings=ExecutorSettings(memory_limit_bytes=1, tokens_per_tick=64))
    assert isinstance(events[0], TaskStarted)
    assert events[0].slots == 1
    assert {trial.state for trial in outcome.trials} == {"succeeded"}


def test_free_memory_is_told() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 2**20


def test_a_profile_is_measured_kept_and_believed(backbone: Backbone, tmp_path: Path) -> None:
    settings = ExecutorSettings(memory_limit_bytes=2**33, calibrations=tmp_path)
    facts = backbone_facts(backbone)
    model = calibrate(settings, backbone, most_tokens=512, folder=tmp_path, start_seconds=3.5)
    assert load_calibration(tmp_path, calibration_key(settings, facts)) == model
    assert isinstance(model, CostModel)
    assert model.seconds(Load.of(facts, [(CONFIG, 512)])) > model.seconds(Load.of(facts, [(CONFIG, 16)])) > 0
    assert model.fixed_bytes > 0
    assert model.start_seconds == 3.5
    # Measured with these settings, not for others.
    for other in ({"recompute": True}, {"threads": 7}):
        assert load_calibration(tmp_path, calibration_key(replace(settings, **other), facts)) is None  # type: ignore[arg-type]
    assert budget_of(settings, backbone, [CONFIG]).tokens_per_tick >= 1


def test_a_run_measures_once_where_it_is_asked_to(tmp_path: Path) -> None:
    settings = ExecutorSettings(calibrate=True, cache_dir=tmp_path / "cache")
    first, _ = run(job(CONFIG), tmp_path / "first", settings=settings)
    (kept,) = (tmp_path / "cache").glob("*.json")
    written = kept.stat().st_mtime_ns
    second, _ = run(job(CONFIG), tmp_path / "second", settings=settings)
    assert kept.stat().st_mtime_ns == written
    assert (first.state, second.state) == ("succeeded", "succeeded")


def test_a_backbone_in_four_bits_counts_as_such_and_its_loading_peak_is_over(backbone: Backbone) -> None:
    facts = backbone_facts(backbone)
    settings = ExecutorSettings(backbone_dtype=BackboneDtype.NF4, tokens_per_tick=64)
    dense, small = backbone_bytes(ExecutorSettings(), facts), backbone_bytes(settings, facts)
    linear = sum(width_in * width_out for width_in, width_out in facts.linear_modules.values())
    assert small == dense - linear * (4 - 4.5 / 8)
    # Measured costs: the peak of loading holds the dense weights, the run the small ones.
    costs = replace(prior_costs(settings, facts), loading_bytes=dense + 2.0**32, fixed_bytes=small)
    each = adapter_parameters(facts, CONFIG) * costs.bytes_per_parameter
    limit = int(replace(costs, loading_bytes=0.0).peak_bytes(Load.of(facts, [(CONFIG, 64)]), 0.0) + 3.5 * each)
    budget = choose_budget(replace(settings, memory_limit_bytes=limit), facts, costs, [CONFIG] * 9)
    assert budget.slots == 3


def test_a_folder_that_cannot_be_written_costs_no_run_its_life(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    model = calibrate(ExecutorSettings(), backbone, most_tokens=64, folder=tmp_path / "taken")
    assert isinstance(model, CostModel)
