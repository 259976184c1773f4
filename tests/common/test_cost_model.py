"""The cost model: recovers what made the measurements, keeps to the prior where they say nothing, inverts itself."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from alto_common.base_models import ModelFacts
from alto_common.calibrations import CalibrationKey, load_calibration, save_calibration, shape_of
from alto_common.cost_model import CostModel, Load, Measurement, adapter_parameters, adapter_shape, fit, prior
from alto_common.tuning import TrialConfig
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS = 4
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {"self_attn.q_proj": (64, 64), "mlp.up_proj": (64, 256), "mlp.down_proj": (256, 64)}.items()
}
FACTS = ModelFacts("Tiny", 64, LAYERS, 100, 256, 500_000, 2_000_000, MODULES, False, 100, None, 0, None)
TRUTH = CostModel(
    loading_bytes=6e8,
    fixed_bytes=7e8,
    bytes_per_token=90_000,
    bytes_per_token_input=30_000,
    bytes_per_token_rank=150,
    bytes_per_parameter=21,
    bytes_per_evaluation_token=5_000,
    start_seconds=5.0,
    base_seconds=0.004,
    seconds_per_token=2e-5,
    seconds_per_target=1e-5,
    seconds_per_squared_length=1e-7,
    seconds_per_token_rank=2e-7,
    seconds_per_stepped_parameter=3e-9,
    evaluation_share=0.4,
)
CONFIGS = [TrialConfig(lora_rank=rank) for rank in (4, 16, 64)]
PARTIAL = TrialConfig(lora_rank=16, target_modules=("q_proj",))


def parameters(*configs: TrialConfig) -> float:
    return sum(adapter_parameters(FACTS, config) for config in configs)


def measure(truth: CostModel, noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    """Return what a profile sees of ticks that vary in all that counts."""
    draw = random.Random(seed)
    ticks = [
        ((CONFIGS[0],), 1024, 128, 0.5),
        ((CONFIGS[0],), 4096, 128, 0.5),
        ((CONFIGS[0],), 2048, 1024, 0.5),
        ((CONFIGS[0],), 2048, 128, 1.0),
        ((PARTIAL,), 2048, 128, 0.5),
        (tuple(CONFIGS), 1024, 128, 0.5),
        (tuple(CONFIGS), 3072, 128, 0.5),
    ]
    found = []
    for configs, tokens, length, targets in ticks:
        load = Load.of(FACTS, [(config, tokens / len(configs)) for config in configs], length, targets)
        held = parameters(*configs)
        blur = 1 + draw.uniform(-noise, noise)
        found.append(Measurement(load, held, truth.peak_bytes(load, held) * blur, truth.seconds(load) * (2 - blur)))
        found.append(
            Measurement(
                load,
                held,
                truth.peak_bytes(Load(), held, load.tokens) * blur,
                truth.evaluation_seconds(load) * (2 - blur),
                is_evaluation=True,
            )
        )
    return found


def start() -> CostModel:
    return dataclasses.replace(prior(FACTS, 4, 5e10), loading_bytes=TRUTH.loading_bytes)


def test_adapter_parameters_are_rank_times_widths_of_the_targets() -> None:
    assert adapter_parameters(FACTS, TrialConfig(lora_rank=2, target_modules=("q_proj",))) == 2 * 128 * LAYERS
    assert adapter_parameters(FACTS, TrialConfig(lora_rank=1, target_modules=("mlp.up_proj",), layers=(0,))) == 320


def test_an_adapter_of_some_layers_counts_by_its_share() -> None:
    whole, some = adapter_shape(FACTS, CONFIGS[1]), adapter_shape(FACTS, PARTIAL)
    assert (whole.effective_rank, whole.input_share) == (16, 1)
    assert some.effective_rank == 16 * 128 / (128 + 320 + 320)
    assert some.input_share == 64 / (64 + 64 + 256)


def test_a_load_sums_over_adapters_and_loads_add_up() -> None:
    load = Load.of(FACTS, [(CONFIGS[0], 10), (CONFIGS[1], 100)], mean_length=5, target_share=0.5)
    assert (load.ticks, load.tokens, load.targets, load.squared_lengths) == (1, 110, 55, 550)
    assert load.token_ranks == 4 * 10 + 16 * 100
    assert load.stepped_parameters == 20 * (128 + 320 + 320) * LAYERS
    both = load + load
    assert both == load.scaled(2)
    assert TRUTH.seconds(both) == pytest.approx(2 * TRUTH.seconds(load))


def test_a_profile_without_noise_is_explained() -> None:
    measurements = measure(TRUTH)
    model = fit(start(), measurements)
    assert max(model.accuracy(measurements)) < 0.02
    assert max(start().accuracy(measurements)) > 0.1, "the prior alone does not"
    bigger = Load.of(FACTS, [(TrialConfig(lora_rank=128), 3000), (CONFIGS[0], 3000)])
    assert model.peak_bytes(bigger, 1e6) == pytest.approx(TRUTH.peak_bytes(bigger, 1e6), rel=0.03)
    assert model.seconds(bigger) == pytest.approx(TRUTH.seconds(bigger), rel=0.05)
    assert model.evaluation_share == pytest.approx(TRUTH.evaluation_share, rel=0.02)


@settings(max_examples=40)
@given(
    st.builds(
        dataclasses.replace,
        st.just(TRUTH),
        fixed_bytes=st.floats(6.5e8, 2e9),
        bytes_per_token=st.floats(1e4, 1e6),
        bytes_per_token_rank=st.floats(1, 1e3),
        bytes_per_parameter=st.floats(16, 32),
        bytes_per_evaluation_token=st.floats(1e2, 1e4),
        base_seconds=st.floats(1e-4, 1e-1),
        seconds_per_token=st.floats(1e-6, 1e-3),
        seconds_per_token_rank=st.floats(1e-9, 1e-6),
    ),
    st.integers(0, 99),
)
def test_noisy_profiles_predict_within_ten_percent_in_memory_and_twenty_in_time(truth: CostModel, seed: int) -> None:
    model = fit(start(), measure(truth, noise=0.02, seed=seed))
    between = Load.of(FACTS, [(CONFIGS[1], 1500), (CONFIGS[0], 1500)])
    held = parameters(CONFIGS[1], CONFIGS[0])
    assert model.peak_bytes(between, held, 3000) == pytest.approx(truth.peak_bytes(between, held, 3000), rel=0.1)
    assert model.seconds(between) == pytest.approx(truth.seconds(between), rel=0.2)
    assert min(dataclasses.astuple(model)) >= 0


def test_what_was_not_varied_stays_as_it_was() -> None:
    prior_model = dataclasses.replace(start(), loading_bytes=0.0)
    one = Load.of(FACTS, [(CONFIGS[1], 512)])
    model = fit(prior_model, [Measurement(one, 1e5, prior_model.peak_bytes(one, 1e5), prior_model.seconds(one))])
    for fitted, before in zip(dataclasses.astuple(model), dataclasses.astuple(prior_model), strict=True):
        assert fitted == pytest.approx(before, rel=1e-6)
    assert fit(prior_model, []) == prior_model


def test_no_coefficient_is_negative_even_where_the_numbers_ask_for_it() -> None:
    loads = [Load(ticks=1, tokens=tokens, stepped_parameters=1000) for tokens in (100, 200, 400)]
    shrinking = [Measurement(load, 1000, 1e9 - 1e5 * load.tokens, 1.0 - 1e-3 * load.tokens) for load in loads]
    assert min(dataclasses.astuple(fit(start(), shrinking))) >= 0


def test_loading_may_be_the_peak() -> None:
    small = dataclasses.replace(TRUTH, loading_bytes=9e8)
    assert small.peak_bytes(Load(), 0) == 9e8


def test_tokens_that_fit_do_and_one_more_does_not() -> None:
    one = Load.of(FACTS, [(config, 1.0) for config in CONFIGS])
    held = parameters(*CONFIGS)
    budget = 1.5e9
    tokens = TRUTH.tokens_that_fit(budget, one, held)

    def at(count: int) -> float:
        return TRUTH.peak_bytes(one.scaled(count / one.tokens), held)

    assert at(tokens) <= budget + 1
    assert at(tokens + 1) > budget - 1
    assert TRUTH.tokens_that_fit(1e8, one, held) == 0


def test_slots_that_fit_hold_for_the_largest_adapters() -> None:
    sizes = [1_000_000, 3_000_000, 2_000_000, 4_000_000]
    tick = Load.of(FACTS, [(TrialConfig(lora_rank=8), 100)])
    budget = TRUTH.peak_bytes(tick, 0) + 21.0 * 7_500_000
    assert TRUTH.slots_that_fit(budget, tick, sizes) == 2
    assert TRUTH.slots_that_fit(budget * 10, tick, sizes) == 4
    assert TRUTH.slots_that_fit(0, tick, sizes) == 0


def test_evaluation_counts_only_where_it_is_the_larger() -> None:
    load = Load.of(FACTS, [(CONFIGS[0], 100)])
    assert TRUTH.peak_bytes(load, 0, 1) == TRUTH.peak_bytes(load, 0)
    assert TRUTH.peak_bytes(load, 0, 10_000) > TRUTH.peak_bytes(load, 0)


def test_calibrations_are_kept_by_shape_device_and_way_to_compute(tmp_path: Path) -> None:
    key = CalibrationKey(shape_of(FACTS), "cpu", 1, "float32", recompute=False, backend="auto")
    assert load_calibration(tmp_path, key) is None
    save_calibration(tmp_path, key, TRUTH)
    assert load_calibration(tmp_path, key) == TRUTH
    others = (
        {"model_shape": shape_of(dataclasses.replace(FACTS, vocabulary=101))},
        {"device_kind": "H100"},
        {"threads": 2},
        {"backbone_dtype": "bfloat16"},
        {"recompute": True},
        {"backend": "reference"},
    )
    for other in others:
        assert load_calibration(tmp_path, dataclasses.replace(key, **other)) is None  # type: ignore[arg-type]
    (tmp_path / key.file_name).write_text("{")
    assert load_calibration(tmp_path, key) is None


@pytest.mark.parametrize("value", [None, "3", float("nan"), -1.0])
def test_a_calibration_with_a_value_that_cannot_be_is_measured_again(tmp_path: Path, value: object) -> None:
    key = CalibrationKey(shape_of(FACTS), "cpu", 1, "float32", recompute=False, backend="auto")
    save_calibration(tmp_path, key, TRUTH)
    content = json.loads((tmp_path / key.file_name).read_text())
    content["model"]["bytes_per_token"] = value
    (tmp_path / key.file_name).write_text(json.dumps(content))
    assert load_calibration(tmp_path, key) is None
