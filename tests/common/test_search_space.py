"""Search spaces: every kind expands to the right trials, the same ones each time, and every fault has its field."""

import dataclasses
import math

import pytest
from alto_common.config_fields import CONFIG_FIELDS, FieldTypeError, with_field
from alto_common.search_space import (
    Dimension,
    ExplicitSearch,
    GridSearch,
    LogUniform,
    RandomSearch,
    SearchSpace,
    SearchSpaceError,
    Uniform,
    Values,
    expand,
)
from alto_common.tuning import Schedule, ScheduleKind, TrialConfig
from hypothesis import given
from hypothesis import strategies as st


def grid(base: TrialConfig | None = None, **fields: tuple[object, ...]) -> SearchSpace:
    dimensions = tuple(Dimension(name, Values(values)) for name, values in fields.items())
    return SearchSpace(GridSearch(dimensions), base or TrialConfig())


def draws(trials: int, seed: int = 0, **domains: Values | Uniform | LogUniform) -> SearchSpace:
    return SearchSpace(RandomSearch(tuple(Dimension(name, one) for name, one in domains.items()), trials, seed))


def faults(space: SearchSpace, **more: int) -> list[tuple[str, object, str]]:
    with pytest.raises(SearchSpaceError) as caught:
        expand(space, **more)
    return [(one.field, one.value, one.cure) for one in caught.value.violations]


def test_a_grid_is_every_combination_over_the_base_in_order() -> None:
    trials = expand(grid(TrialConfig(batch_size=2), learning_rate=(1e-4, 1e-3), lora_rank=(8, 16)))
    assert [trial.trial_id for trial in trials] == ["trial-001", "trial-002", "trial-003", "trial-004"]
    assert [(one.config.learning_rate, one.config.lora_rank) for one in trials] == [
        (1e-4, 8),
        (1e-4, 16),
        (1e-3, 8),
        (1e-3, 16),
    ]
    assert {one.config.batch_size for one in trials} == {2}


def test_every_field_of_a_configuration_may_vary() -> None:
    plain = {one.name for one in dataclasses.fields(TrialConfig)}
    nested = {f"schedule.{one.name}" for one in dataclasses.fields(Schedule)}
    assert set(CONFIG_FIELDS) == plain | nested
    default = TrialConfig()
    for name in plain:
        assert with_field(default, name, getattr(default, name)) == default


def test_loose_values_are_read_as_what_they_can_only_mean() -> None:
    (trial,) = expand(
        grid(
            lora_rank=(16.0,),
            learning_rate=("2e-4",),
            target_modules=(["q_proj", "v_proj"],),
            layers=([0.0, 2],),
            schedule=({"kind": "cosine", "final_fraction": 0.1},),
            max_steps=(None,),
            use_rslora=(True,),
        )
    )
    assert trial.config == TrialConfig(
        lora_rank=16,
        learning_rate=2e-4,
        target_modules=("q_proj", "v_proj"),
        layers=(0, 2),
        schedule=Schedule(ScheduleKind.COSINE, 0.0, 0.1),
        use_rslora=True,
    )
    assert isinstance(trial.config.lora_rank, int)
    (one, two) = expand(grid(**{"schedule.kind": ("linear", "cosine")}))
    assert (one.config.schedule.kind, two.config.schedule.kind) == (ScheduleKind.LINEAR, ScheduleKind.COSINE)


def test_equal_configurations_are_tried_once() -> None:
    assert len(expand(grid(lora_rank=(8, 8.0, 16), learning_rate=(1e-4, "1e-4")))) == 2
    config = TrialConfig()
    assert len(expand(SearchSpace(ExplicitSearch((config, config))))) == 1
    assert len(expand(draws(50, lora_rank=Values((4, 8))))) == 2


def test_names_stay_in_order_when_they_are_many() -> None:
    trials = expand(grid(seed=tuple(range(1000))))
    assert (trials[0].trial_id, trials[-1].trial_id) == ("trial-0001", "trial-1000")
    assert [one.trial_id for one in trials] == sorted(one.trial_id for one in trials)


def test_random_draws_are_the_same_for_the_same_seed_and_within_their_ranges() -> None:
    domains = {"learning_rate": LogUniform(1e-5, 1e-3), "lora_rank": LogUniform(4, 64), "lora_dropout": Uniform(0, 0.1)}
    trials = expand(draws(200, 7, **domains))
    assert trials == expand(draws(200, 7, **domains))
    assert trials != expand(draws(200, 8, **domains))
    rates = [one.config.learning_rate for one in trials]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.35 < sum(rate < 1e-4 for rate in rates) / len(rates) < 0.65, "the logarithm is uniform"
    assert all(isinstance(one.config.lora_rank, int) and 4 <= one.config.lora_rank <= 64 for one in trials)
    ranks = {one.config.lora_rank for one in expand(draws(200, lora_rank=Uniform(2, 4)))}
    assert ranks == {2, 3, 4}


def test_draws_do_not_change_between_versions() -> None:
    """Pin the sequence: a task created yesterday must expand to the same trials today."""
    (first, second) = expand(draws(2, 1, learning_rate=LogUniform(1e-5, 1e-3), lora_rank=Values((8, 16, 32))))
    assert first.config.learning_rate == pytest.approx(1e-5 * 100**0.13436424411240122)
    assert (first.config.lora_rank, second.config.lora_rank) == (8, 16)


@given(low=st.floats(1e-8, 1.0), factor=st.floats(1.0, 1e4), seed=st.integers(0, 2**32), log=st.booleans())
def test_every_draw_is_a_sound_configuration(low: float, factor: float, seed: int, log: bool) -> None:
    domain = LogUniform(low, low * factor) if log else Uniform(low, low * factor)
    for trial in expand(draws(5, seed, learning_rate=domain)):
        assert low <= trial.config.learning_rate <= low * factor
        assert trial.config.violations() == []


D = "search_space.grid.dimensions"
R = "search_space.random.dimensions"


@pytest.mark.parametrize(
    ("space", "field", "cure"),
    [
        (SearchSpace(ExplicitSearch(())), "search_space.explicit.configs", "empty"),
        (grid(), D, "empty"),
        (grid(lora_rank=()), f"{D}[0].values.values", "empty"),
        (draws(5), R, "empty"),
        (draws(0, lora_rank=Values((8,))), "search_space.random.trials", "at least 1"),
        (grid(lorarank=(8,)), f"{D}[0].field", "lora_rank"),
        (grid(lora_rank=(8, "wide")), f"{D}[0].values.values[1]", "whole number"),
        (grid(lora_rank=(8, 8.5)), f"{D}[0].values.values[1]", "whole number"),
        (grid(lora_rank=(True,)), f"{D}[0].values.values[0]", "whole number"),
        (grid(lora_rank=(0,)), f"{D}[0].values.values[0]", "from 1 to 256"),
        (grid(learning_rate=(1e-4, -1e-4)), f"{D}[0].values.values[1]", "above 0"),
        (grid(learning_rate=(math.nan,)), f"{D}[0].values.values[0]", "above 0"),
        (grid(learning_rate=("fast",)), f"{D}[0].values.values[0]", "a number"),
        (grid(use_rslora=(1,)), f"{D}[0].values.values[0]", "true or false"),
        (grid(target_modules=([],)), f"{D}[0].values.values[0]", "q_proj"),
        (grid(schedule=({"shape": 1},)), f"{D}[0].values.values[0]", "warmup_fraction"),
        (grid(**{"schedule.warmup_fraction": (2.0,)}), f"{D}[0].values.values[0]", "[0, 1]"),
        (grid(TrialConfig(batch_size=0), lora_rank=(8,)), "search_space.base.batch_size", "whole number"),
        (SearchSpace(GridSearch((Dimension("lora_rank", Uniform(1, 2)),))), f"{D}[0].uniform", "list them"),
        (SearchSpace(GridSearch((Dimension("seed", Values((1,))),) * 2)), f"{D}[1].field", "once"),
        (draws(5, use_rslora=Uniform(0, 1)), f"{R}[0].uniform", "no number"),
        (draws(5, learning_rate=Uniform(1, 0)), f"{R}[0].uniform", "lower one first"),
        (draws(5, learning_rate=Uniform(0, math.inf)), f"{R}[0].uniform", "finite"),
        (draws(5, learning_rate=Uniform(0, 1)), f"{R}[0].uniform.low", "above 0"),
        (draws(5, weight_decay=LogUniform(0, 1)), f"{R}[0].log_uniform.low", "above 0"),
        (draws(5, lora_rank=Uniform(1, 512)), f"{R}[0].uniform.high", "1 to 256"),
    ],
)
def test_a_fault_names_its_field_and_the_cure(space: SearchSpace, field: str, cure: str) -> None:
    ((found, _, found_cure),) = faults(space)
    assert found == field
    assert cure in found_cure


def test_an_explicit_configuration_is_judged_under_its_index() -> None:
    space = SearchSpace(ExplicitSearch((TrialConfig(), TrialConfig(lora_rank=0, learning_rate=-1.0))))
    assert [one[0] for one in faults(space)] == [
        "search_space.explicit.configs[1].lora_rank",
        "search_space.explicit.configs[1].learning_rate",
    ]


def test_the_number_of_trials_is_bounded_before_any_is_made() -> None:
    huge = grid(seed=tuple(range(1000)), lora_rank=tuple(range(1, 257)), max_steps=tuple(range(1, 1000)))
    ((field, value, cure),) = faults(huge)
    assert (field, value) == (D, "255,744,000 combinations")
    assert "1,000" in cure
    assert faults(grid(seed=(1, 2, 3)), max_trials=2)[0][0] == D
    assert faults(draws(3, max_steps=Uniform(1, 9)), max_trials=2)[0][0] == "search_space.random.trials"
    assert faults(SearchSpace(ExplicitSearch((TrialConfig(),) * 3)), max_trials=2)[0][1] == 3


def test_a_wrong_type_says_what_would_do() -> None:
    with pytest.raises(FieldTypeError, match="constant, linear, cosine"):
        with_field(TrialConfig(), "schedule.kind", "exponential")
