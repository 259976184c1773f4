"""How much work a search is, counted by hand."""

import pytest
from alto_admission.domain.work_size import Rows, peak_memory_bytes, search_size, split_rows
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig

from .conftest import FACTS


@pytest.mark.parametrize(
    ("rows", "validation", "fraction", "expected"),
    [
        (100, None, 0.1, (90, 10)),
        (2, None, 0.1, (1, 1)),
        (3, None, 0.5, (1, 2)),
        (1, 5, 0.1, (1, 5)),
        (100, 7, 0.5, (100, 7)),
    ],
)
def test_rows_are_divided_as_the_node_divides_them(rows, validation, fraction, expected):
    assert split_rows(rows, validation, fraction) == expected


def test_samples_follow_epochs_or_steps():
    assert TrialConfig(epochs=1.5).total_samples(10) == 15
    assert TrialConfig(max_steps=3, batch_size=4, gradient_accumulation_steps=2).total_samples(10) == 24


def test_the_size_of_a_search():
    rows = Rows(train=10, validation=4, token_lengths=(10, 30))
    trials = [Trial("a", TrialConfig(max_length=20, batch_size=4)), Trial("b", TrialConfig(epochs=2, lora_rank=8))]
    size = search_size(trials, rows, Evaluation(count=5, max_examples=2), EarlyExit())
    # Of the two lengths, a cut at 20 leaves a mean of 15, and none leaves 20.
    assert (size.steps, size.samples) == (3 + 3, 10 + 20)
    assert size.train_tokens == 10 * 15 + 20 * 20
    assert size.evaluation_tokens == 5 * 2 * (15 + 20)
    assert size.total_lora_rank == 24


def test_memory_grows_with_what_is_trained_and_is_that_of_the_device():
    rows = Rows(train=100, validation=8, token_lengths=(10, 30))

    def peak(trials, gpu_kind="cpu"):
        return peak_memory_bytes(trials, FACTS, rows, Evaluation(), EarlyExit(), gpu_kind)

    small = [Trial("a", TrialConfig(lora_rank=2, max_length=64, batch_size=512))]
    more = [*small, Trial("b", TrialConfig(lora_rank=4, max_length=64, batch_size=512))]
    # Both layers' q_proj and k_proj: two of 48 + 48 and two of 48 + 24, in twenty bytes a weight; the ticks are full.
    assert peak(more) - peak(small) >= 4 * (2 * 96 + 2 * 72) * 20
    assert peak(small) > 4 * FACTS.parameters
    assert peak(small, "NVIDIA H100 80GB HBM3") != peak(small)
