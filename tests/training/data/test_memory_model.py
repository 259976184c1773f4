"""The cost model: recovers what made the measurements, keeps to the prior where they say nothing, inverts itself."""

import dataclasses
import random
from pathlib import Path

import pytest
from alto_common.base_models import ModelFacts
from alto_common.tuning import TrialConfig
from alto_training.executor.memory_model import (
    CalibrationKey,
    CostModel,
    Load,
    Measurement,
    adapter_parameters,
    calibration_loads,
    fit,
    load_calibration,
    prior,
    save_calibration,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS = 4
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {"self_attn.q_proj": (64, 64), "mlp.up_proj": (64, 256), "mlp.down_proj": (256, 64)}.items()
}
FACTS = ModelFacts("Tiny", 64, LAYERS, 100, 256, 500_000, 2_000_000, MODULES, False, 100, None, 0, None)
TRUTH = CostModel(7e8, 90_000, 150, 21, 5_000, 0.004, 2e-5, 3e-4)
CONFIGS = [TrialConfig(lora_rank=rank) for rank in (4, 16, 64)]


def measure(truth: CostModel, loads: list[Load], noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    draw = random.Random(seed)
    found = []
    for load in loads:
        without = dataclasses.replace(load, tokens=0, token_ranks=0)
        blur = 1 + draw.uniform(-noise, noise)
        found.append(Measurement(load, truth.peak_bytes(load) * blur, truth.seconds(load) * (2 - blur)))
        evaluated = truth.peak_bytes(without, load.tokens) * blur
        found.append(Measurement(load, evaluated, 1.0, is_evaluation=True))
    return found


def start() -> CostModel:
    return prior(FACTS, 4, 5e10)


def test_adapter_parameters_are_rank_times_widths_of_the_targets() -> None:
    assert adapter_parameters(FACTS, TrialConfig(lora_rank=2, target_modules=("q_proj",))) == 2 * 128 * LAYERS
    assert adapter_parameters(FACTS, TrialConfig(lora_rank=1, target_modules=("mlp.up_proj",), layers=(0,))) == 320


def test_a_load_sums_over_adapters() -> None:
    load = Load.of(FACTS, [(CONFIGS[0], 10), (CONFIGS[1], 100)])
    assert (load.tokens, load.token_ranks, load.ranks) == (110, 4 * 10 + 16 * 100, 20)
    assert load.adapter_parameters == 20 * (128 + 320 + 320) * LAYERS


def test_a_profile_without_noise_is_explained() -> None:
    measurements = measure(TRUTH, calibration_loads(FACTS, 4096, CONFIGS))
    model = fit(start(), measurements)
    assert max(model.accuracy(measurements)) < 0.01
    assert max(start().accuracy(measurements)) > 0.1, "the prior alone does not"
    bigger = Load.of(FACTS, [(TrialConfig(lora_rank=128), 3000), (CONFIGS[0], 3000)])
    assert model.peak_bytes(bigger) == pytest.approx(TRUTH.peak_bytes(bigger), rel=0.03)
    assert model.seconds(bigger) == pytest.approx(TRUTH.seconds(bigger), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        CostModel,
        st.floats(1e8, 2e9),
        st.floats(1e4, 1e6),
        st.floats(1, 1e3),
        st.floats(16, 32),
        st.floats(1e2, 1e4),
        st.floats(1e-4, 1e-1),
        st.floats(1e-6, 1e-3),
        st.floats(1e-6, 1e-3),
    ),
    st.integers(0, 99),
)
def test_noisy_profiles_predict_within_ten_percent_in_memory_and_twenty_in_time(truth: CostModel, seed: int) -> None:
    loads = calibration_loads(FACTS, 4096, CONFIGS)
    model = fit(start(), measure(truth, loads, noise=0.02, seed=seed))
    between = Load.of(FACTS, [(CONFIGS[1], 1500), (CONFIGS[0], 1500)])
    assert model.peak_bytes(between, 3000) == pytest.approx(truth.peak_bytes(between, 3000), rel=0.1)
    assert model.seconds(between) == pytest.approx(truth.seconds(between), rel=0.2)
    assert min(dataclasses.astuple(model)) >= 0


def test_what_was_not_varied_stays_as_it_was() -> None:
    one = Load.of(FACTS, [(CONFIGS[1], 512)])
    model = fit(start(), [Measurement(one, start().peak_bytes(one), start().seconds(one))])
    for fitted, before in zip(dataclasses.astuple(model), dataclasses.astuple(start()), strict=True):
        assert fitted == pytest.approx(before, rel=1e-6)
    assert fit(start(), []) == start()


def test_no_coefficient_is_negative_even_where_the_numbers_ask_for_it() -> None:
    loads = [Load(tokens, 0, 8, 1000) for tokens in (100, 200, 400)]
    shrinking = [Measurement(load, 1e9 - 1e5 * load.tokens, 1.0 - 1e-3 * load.tokens) for load in loads]
    assert min(dataclasses.astuple(fit(start(), shrinking))) >= 0


def test_tokens_that_fit_do_and_one_more_does_not() -> None:
    load = Load.of(FACTS, [(config, 100) for config in CONFIGS])
    budget = 1.5e9
    tokens = TRUTH.tokens_that_fit(budget, load)
    mean_rank = load.token_ranks / load.tokens

    def at(count: int) -> float:
        return TRUTH.peak_bytes(dataclasses.replace(load, tokens=count, token_ranks=round(mean_rank * count)))

    assert at(tokens) <= budget + 1
    assert at(tokens + 1) > budget - 1
    assert TRUTH.tokens_that_fit(1e8, load) == 0


def test_slots_that_fit_hold_for_the_largest_adapters() -> None:
    sizes = [1_000_000, 3_000_000, 2_000_000, 4_000_000]
    left = 21.0 * 7_500_000
    budget = TRUTH.fixed_bytes + (TRUTH.bytes_per_token + 150 * 8) * 100 + left
    assert TRUTH.slots_that_fit(budget, 100, sizes, 8) == 2
    assert TRUTH.slots_that_fit(budget * 10, 100, sizes, 8) == 4
    assert TRUTH.slots_that_fit(0, 100, sizes, 8) == 0


def test_evaluation_counts_only_where_it_is_the_larger() -> None:
    load = Load.of(FACTS, [(CONFIGS[0], 100)])
    assert TRUTH.peak_bytes(load, 1) == TRUTH.peak_bytes(load)
    assert TRUTH.peak_bytes(load, 10_000) > TRUTH.peak_bytes(load)


def test_calibrations_are_kept_by_model_device_and_number_format(tmp_path: Path) -> None:
    key = CalibrationKey("m", "cpu", "float32", recompute=False)
    assert load_calibration(tmp_path, key) is None
    save_calibration(tmp_path, key, TRUTH)
    assert load_calibration(tmp_path, key) == TRUTH
    for other in ({"model": "n"}, {"device_kind": "H100"}, {"backbone_dtype": "bfloat16"}, {"recompute": True}):
        assert load_calibration(tmp_path, dataclasses.replace(key, **other)) is None  # type: ignore[arg-type]
    (tmp_path / key.file_name).write_text("{")
    assert load_calibration(tmp_path, key) is None
