"""Estimates: accurate after 50 measured ticks, honest intervals, early exits learned. Durations are synthetic."""

import random
import statistics

import pytest
from alto_placement.durations import DurationModel, Hardware, Prior, Work

NO_OVERHEAD = Prior(start_s=0.0, checkpoint_s=0.0)


def tick_s(draw: random.Random, speed: float, tokens: float, ranks: float, noise: float) -> float:
    return speed * (0.08 + 6e-5 * tokens + 2e-5 * ranks) * draw.lognormvariate(0.0, noise)


def one_run(seed: int) -> tuple[float, float, bool]:
    """Return the relative error, the noise and whether the 90 % interval covered, of one task without early exit."""
    draw = random.Random(seed)
    speed, noise = draw.uniform(0.2, 5.0), draw.uniform(0.02, 0.25)
    model, hardware = DurationModel(NO_OVERHEAD), Hardware("m", "gpu", 1)
    tokens, ranks = draw.uniform(500, 8000), draw.choice((8, 64, 256))
    for _ in range(50):
        profiled, width = tokens * draw.uniform(0.5, 1.5), ranks * draw.choice((0.5, 1.0, 2.0))
        model.observe_tick(hardware, profiled, width, tick_s(draw, speed, profiled, width, noise))
    ticks = draw.randrange(200, 2000)
    actual = sum(tick_s(draw, speed, tokens, ranks, noise) for _ in range(ticks))
    predicted = model.predict(hardware, Work(ticks, tokens, ranks), early_exit=False)
    return abs(predicted.expected_s / actual - 1.0), noise, predicted.low_s <= actual <= predicted.high_s


def test_fifty_profiled_steps_give_a_close_estimate() -> None:
    errors = [one_run(seed)[0] for seed in range(200)]
    assert statistics.fmean(errors) <= 0.05


def test_the_upper_bound_is_above_the_expectation_and_the_interval_around_it() -> None:
    model = DurationModel()
    for hardware in (Hardware("m", "gpu", 1), Hardware("m", "gpu", 4)):
        found = model.predict(hardware, Work(100, 4000, 64, 10_000, 5))
        assert 0 < found.low_s <= found.expected_s <= found.high_s
        assert found.expected_s <= found.upper_s


def test_an_outlier_moves_the_estimate_little() -> None:
    model, hardware = DurationModel(NO_OVERHEAD), Hardware("m", "gpu", 1)
    for _ in range(50):
        model.observe_tick(hardware, 4000, 64, 0.3)
    before = model.predict(hardware, Work(100, 4000, 64), early_exit=False).expected_s
    model.observe_tick(hardware, 4000, 64, 300.0)
    after = model.predict(hardware, Work(100, 4000, 64), early_exit=False).expected_s
    assert after == pytest.approx(before, rel=0.05)
    for nonsense in (float("nan"), float("inf"), -1.0, 0.0):
        model.observe_tick(hardware, 4000, 64, nonsense)
    assert model.predict(hardware, Work(100, 4000, 64), early_exit=False).expected_s == after


def test_early_exits_are_learned_for_each_tenant_and_shape() -> None:
    draw = random.Random(3)
    model, hardware = DurationModel(NO_OVERHEAD), Hardware("m", "gpu", 1)
    work = Work(1000, 4000, 64)
    full = model.predict(hardware, work, early_exit=False).expected_s
    for _ in range(100):
        model.observe_finished("ada", "grid", min(1.0, max(0.05, draw.gauss(0.25, 0.05))))
    learned = model.predict(hardware, work, "ada", "grid")
    assert learned.expected_s == pytest.approx(0.25 * full, rel=0.1)
    assert learned.upper_s >= full
    assert model.predict(hardware, work, "bo", "grid").expected_s == pytest.approx(0.5 * full)


def test_a_running_task_corrects_its_estimate_and_is_never_called_over() -> None:
    model, hardware, work = DurationModel(NO_OVERHEAD), Hardware("m", "gpu", 1), Work(1000, 4000, 64)
    predicted = model.predict(hardware, work).expected_s
    slow = model.remaining(hardware, work, 0.25, 4 * predicted)
    assert slow.expected_s > predicted
    late = model.remaining(hardware, work, 0.99, 10 * predicted)
    assert late.expected_s > 0
    assert model.remaining(hardware, work, 0.0, 0.0).expected_s == predicted
