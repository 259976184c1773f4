"""How much work a whole search is, counted by hand."""

import dataclasses

import pytest
from alto_common.base_models import ModelFacts
from alto_common.cost_model import prior
from alto_common.search_load import Machine, Row, SearchLoad, expected_share, search_load
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig

MODULES = {"model.layers.0.q_proj": (64, 64), "model.layers.0.up_proj": (64, 192)}
FACTS = ModelFacts("Tiny", 64, 1, 100, 256, 500_000, 2_000_000, MODULES, False, 100, None, 0, None)
MACHINE = Machine(slots=2, tokens_per_tick=1000, evaluation_tokens_per_tick=2000, parked_beside=True)
NONE = EarlyExit(policy="none")
TRAIN = [Row(10, 4), Row(30, 20)]
VALIDATION = [Row(20, 10)]
FIVE_TIMES = Evaluation(count=5)


def of(
    *configs: TrialConfig,
    early_exit: EarlyExit = NONE,
    machine: Machine = MACHINE,
    evaluation: Evaluation = FIVE_TIMES,
    **changes: int,
) -> SearchLoad:
    trials = [Trial(f"trial-{number}", config) for number, config in enumerate(configs)]
    return search_load(FACTS, trials, TRAIN, 10, VALIDATION, 4, evaluation, early_exit, machine, **changes)


def test_tokens_of_all_steps_are_counted_as_they_are_cut() -> None:
    # 10 rows by fours are 3 steps, of 20 tokens a row on the mean; cut at 20 they have 15. 12 of them are targets.
    load = of(TrialConfig(batch_size=4, lora_rank=8), TrialConfig(batch_size=4, max_length=20, lora_rank=2))
    assert load.training.tokens == 10 * 20 + 10 * 15
    assert load.training.targets == 10 * 12 + 10 * (4 + 19) / 2
    assert load.training.squared_lengths == 10 * (100 + 900) / 2 + 10 * (100 + 400) / 2
    assert load.training.token_ranks == 8 * 200 + 2 * 150
    assert load.training.token_inputs == load.training.tokens
    assert load.training.stepped_parameters == 3 * (8 + 2) * (128 + 256)
    # Both at once in two slots, and all that is there fits a tick.
    assert load.training.ticks == 3
    # Five times four rows of 20 for each trial, and once for the base model.
    assert load.evaluation.tokens == (2 * 5 + 1) * 4 * 20
    assert load.largest_evaluation_tokens == 2 * 4 * 20


def test_trials_that_wait_their_turn_and_small_ticks_make_more_ticks() -> None:
    four = [TrialConfig(batch_size=2)] * 4
    assert of(*four).training.ticks == 4 * 5 / 2
    small = dataclasses.replace(MACHINE, tokens_per_tick=20)
    assert of(*four, machine=small).training.ticks == 4 * 200 / 20


def test_the_largest_tick_is_what_the_slots_have_or_the_budget_or_one_long_row() -> None:
    config = TrialConfig(batch_size=4, lora_rank=8)
    # Two batches of 4 rows with 20 +- 10 tokens; of 4.5 ticks the largest is 1.12 deviations above the mean.
    largest = of(config, config, config).largest_tick.tokens
    assert largest == pytest.approx(2 * 80 + 1.119 * (2 * 400) ** 0.5, rel=1e-3)
    budget = dataclasses.replace(MACHINE, tokens_per_tick=100)
    assert of(config, config, machine=budget).largest_tick.tokens == 100
    assert of(config, machine=dataclasses.replace(budget, tokens_per_tick=5)).largest_tick.tokens == 30


def test_adapters_that_wait_hold_nothing_and_those_that_are_parked_hold_all() -> None:
    each = 8 * (128 + 256)
    trials = [TrialConfig(lora_rank=8)] * 5
    assert of(*trials).held_parameters == 2 * each
    assert of(*trials, early_exit=EarlyExit("paper")).held_parameters == 5 * each
    beside = dataclasses.replace(MACHINE, parked_beside=False)
    assert of(*trials, early_exit=EarlyExit("paper"), machine=beside).held_parameters == 2 * each


def test_who_is_evaluated_at_the_end_alone_has_no_best_weights_while_it_trains() -> None:
    trials = [TrialConfig(lora_rank=8)] * 2
    assert of(*trials, evaluation=Evaluation(count=1)).held_parameters == pytest.approx(0.8 * 2 * 8 * (128 + 256))


def test_pairs_have_two_sequences_a_row_and_a_reference() -> None:
    config = TrialConfig(batch_size=4)
    single, pairs = of(config), of(config, sequences_per_row=2)
    assert pairs.training.tokens == 2 * single.training.tokens
    assert pairs.evaluation.tokens == (5 + 1 + 1) * 2 * 4 * 20 + 2 * 10 * 20


@pytest.mark.parametrize(
    ("early_exit", "trials", "share"),
    [
        (NONE, 8, 1.0),
        (EarlyExit(), 1, 1.0),
        (EarlyExit(warmup_fraction=0.05, keep_fraction=0.25), 8, 0.05 + 0.95 * 0.25),
        (EarlyExit(warmup_fraction=0.5, keep_fraction=0.01), 4, 0.5 + 0.5 * 0.25),
    ],
)
def test_the_share_that_early_exit_leaves(early_exit: EarlyExit, trials: int, share: float) -> None:
    assert expected_share(early_exit, trials) == pytest.approx(share)


def test_early_exit_shortens_the_expected_time_and_not_the_upper_bound() -> None:
    costs = prior(FACTS, 4, 1e10)
    trials = [TrialConfig(learning_rate=rate) for rate in (1e-4, 2e-4, 3e-4, 4e-4)]
    patient, quick = of(*trials), of(*trials, early_exit=EarlyExit(warmup_fraction=0.1, keep_fraction=0.25))
    assert patient.expected_seconds(costs) == patient.upper_seconds(costs) == quick.upper_seconds(costs)
    work = patient.upper_seconds(costs) - costs.start_seconds
    assert quick.expected_seconds(costs) == pytest.approx(costs.start_seconds + (0.1 + 0.9 / 4) * work)
    assert patient.peak_bytes(costs) > costs.fixed_bytes
