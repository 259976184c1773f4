"""Estimates: accurate after 50 measured ticks, honest intervals, early exits learned. Ticks are synthetic here;
`benchmarks/durations.py` measures the same over real ones.
"""

import json
import random
import statistics

import pytest
from alto_placement.durations import DurationModel, Hardware, Measured, Work
from alto_placement.forecasts import Forecasts
from alto_placement.state import AssignmentRow, Moment, Outcome, Progress, TaskRow, WorkSize
from alto_placement.wire import duration, timestamp

GPU = Hardware("m", "gpu", 1)


def measured(ticks=1.0, tokens=4000.0, ranks=64.0, seconds=0.3, **more):
    return Measured(ticks, tokens * ticks, ranks * ticks, seconds * ticks, **more)


def tick_s(draw, speed, tokens, ranks, noise):
    return speed * (0.08 + 6e-5 * tokens + 2e-5 * ranks) * draw.lognormvariate(0.0, noise)


def one_run(seed):
    """Return the relative error of one task without early exit, whose first 50 ticks were of all kinds."""
    draw = random.Random(seed)
    speed, noise = draw.uniform(0.2, 5.0), draw.uniform(0.02, 0.25)
    model = DurationModel()
    tokens, ranks = draw.uniform(500, 8000), draw.choice((8, 64, 256))
    for _ in range(50):
        profiled, width = tokens * draw.uniform(0.5, 1.5), ranks * draw.choice((0.5, 1.0, 2.0))
        model.observe(GPU, measured(1, profiled, width, tick_s(draw, speed, profiled, width, noise)))
    model.model(GPU).start_s = 0.0
    ticks = draw.randrange(200, 2000)
    actual = sum(tick_s(draw, speed, tokens, ranks, noise) for _ in range(ticks))
    predicted = model.predict(GPU, Work(ticks * tokens, ticks, ranks * ticks))
    return abs(predicted.expected_s / actual - 1.0)


def test_fifty_profiled_steps_give_a_close_estimate():
    assert statistics.fmean(one_run(seed) for seed in range(200)) <= 0.05


def test_windows_of_many_ticks_teach_as_well_as_single_ones():
    draw = random.Random(1)
    model = DurationModel()
    for _ in range(30):
        kinds = [(draw.uniform(500, 4000), draw.choice((8, 64, 256))) for _ in range(10)]
        seconds = sum(tick_s(draw, 1.0, tokens, ranks, 0.05) for tokens, ranks in kinds)
        tokens, ranks = (sum(kind[i] for kind in kinds) for i in (0, 1))
        model.observe(GPU, Measured(10, tokens, ranks, seconds))
    predicted = model.model(GPU).training.seconds((100.0, 100 * 2000.0, 100 * 64.0))
    assert predicted == pytest.approx(100 * (0.08 + 0.12 + 0.00128), rel=0.05)


def test_the_upper_bound_is_above_the_expectation_and_the_interval_around_it():
    model = DurationModel()
    for hardware in (GPU, Hardware("m", "gpu", 4, 10**9)):
        found = model.predict(hardware, Work(400_000, 100, 6400, 10_000), prior_share=0.5)
        assert 0 < found.low_s <= found.expected_s <= found.high_s
        assert found.expected_s <= found.upper_s


def test_a_million_ticks_of_every_kind_do_not_unsettle_it():
    """What was forgotten and what is never seen apart must not make the sums meaningless."""
    draw = random.Random(7)
    model = DurationModel()
    for number in range(5000):
        ticks = draw.choice((1, 10, 200, 5000))
        same = number % 1000 < 900
        tokens, ranks = (1000.0, 64.0) if same else (draw.uniform(10, 8000), draw.choice((0.0, 8.0, 1024.0)))
        seconds = draw.choice((1.0, 1.0, 1.0, 1e-3, 50.0)) * tick_s(draw, 1.0, tokens, ranks, 0.3)
        model.observe(GPU, measured(ticks, tokens, ranks, seconds))
        assert 0 < model.model(GPU).training.uncertainty((1.0, tokens, ranks)) < 1
    for _ in range(300):
        model.observe(GPU, measured(10, 1000.0, 64.0, tick_s(draw, 1.0, 1000.0, 64.0, 0.05)))
    assert model.model(GPU).training.seconds((1.0, 1000.0, 64.0)) == pytest.approx(0.141, rel=0.1)


def test_an_outlier_moves_the_estimate_little():
    model, work = DurationModel(), Work(400_000, 100, 6400)
    for _ in range(50):
        model.observe(GPU, measured())
    before = model.predict(GPU, work).expected_s
    model.observe(GPU, measured(seconds=300.0))
    after = model.predict(GPU, work).expected_s
    assert after == pytest.approx(before, rel=0.05)
    for nonsense in (float("nan"), float("inf"), -1.0, 0.0):
        model.observe(GPU, measured(seconds=nonsense))
    assert model.predict(GPU, work).expected_s == after


def test_early_exits_are_learned_for_each_tenant_and_shape():
    draw = random.Random(3)
    model, work = DurationModel(), Work(4_000_000, 1000, 64_000)
    model.model(GPU).start_s = 0.0
    full = model.predict(GPU, work).expected_s
    for _ in range(100):
        model.shares.observe("ada", "grid", min(1.0, max(0.05, draw.gauss(0.25, 0.05))))
    learned = model.predict(GPU, work, "ada", "grid", 0.5)
    assert learned.expected_s == pytest.approx(0.25 * full, rel=0.1)
    assert learned.upper_s >= full
    assert model.predict(GPU, work, "ada", "another shape", 0.5).expected_s == pytest.approx(0.5 * full)
    # Somebody without a history of this shape is taken to be like the others.
    assert model.predict(GPU, work, "bo", "grid", 0.5).expected_s == pytest.approx(learned.expected_s)


def test_the_interval_of_shares_covers_nine_of_ten_that_come_next():
    draw = random.Random(5)
    covered = total = 0
    for _ in range(40):
        model, spread = DurationModel(), draw.uniform(0.03, 0.15)
        for number in range(100):
            share = min(1.0, max(0.02, draw.gauss(0.4, spread)))
            if number >= 30:
                found = model.shares.expect("ada", "grid", 0.5)
                covered += found.low <= share <= found.high
                total += 1
            model.shares.observe("ada", "grid", share)
    assert 0.87 <= covered / total <= 0.93


def test_a_running_task_corrects_its_estimate_and_is_never_called_over():
    model, work = DurationModel(), Work(4_000_000, 1000, 64_000)
    model.observe(GPU, measured(50))
    left = Work(3_000_000, 750, 48_000)
    pace = model.remaining(GPU, work, left, measured(250))
    slow = model.remaining(GPU, work, left, measured(250, seconds=0.9))
    assert slow.expected_s > 2 * pace.expected_s
    late = model.remaining(GPU, work, Work(0, 0), measured(2000), trained_share=1.0)
    assert late.expected_s > 0


def test_exits_that_have_happened_shorten_what_is_left():
    model, work = DurationModel(), Work(4_000_000, 1000, 64_000)
    model.observe(GPU, measured(50))
    done = measured(250)
    before = model.remaining(GPU, work, Work(3_000_000, 750, 48_000), done)
    after = model.remaining(GPU, work, Work(600_000, 750, 9_600), done)
    assert after.upper_s < 0.6 * before.upper_s


def test_where_nobody_exits_all_that_the_node_says_is_left_is_expected():
    """Admission's estimate of the whole was too low: what was done counts for more than its samples say."""
    model, work = DurationModel(), Work(4_000_000, 1000, 64_000)
    for share in (0.98, 1.0, 1.02):
        model.shares.observe("ada", "none", share)
        model.trained.observe("ada", "none", 1.0)
    model.observe(GPU, measured(50))
    done = measured(600)
    left = model.remaining(GPU, work, Work(2_000_000, 500, 32_000), done, 0.5, "ada", "none")
    assert left.expected_s == pytest.approx(500 * 0.3, rel=0.05)


def test_hardware_that_was_never_measured_is_guessed_from_what_is_like_it():
    model, work = DurationModel(), Work(4_000_000, 1000, 64_000)
    known = Hardware("m", "gpu", 1, 10**9)
    for _ in range(50):
        model.observe(known, measured(seconds=4.0))
    measured_s = model.predict(known, work).expected_s
    assert model.predict(Hardware("m", "gpu", 2, 10**9), work).expected_s == pytest.approx(measured_s / 2, rel=0.3)
    # Another backbone of the same size, on the same kind of GPU, is not expected to run as on paper.
    assert model.predict(Hardware("other", "gpu", 1, 10**9), work).expected_s == pytest.approx(measured_s, rel=0.3)


SIZE = WorkSize(train_tokens=400_000, steps=200, total_lora_rank=64, trials=2, longest_steps=100, shape="grid")
TASK = TaskRow("task", "ada", b"", "m", 1, "", SIZE, 0.0, epoch=1, attempts=1)
ROW = AssignmentRow("assignment", "task", 1, "node", "start", (0,), 0.0)


def progress(done, fraction=0.5):
    return Progress(fraction, 0.0, done, fraction, 50)


def test_what_was_learned_survives_as_records():
    forecasts = Forecasts()
    forecasts.begun(TASK, ROW, "cpu")
    for ticks in (20, 40, 100):
        forecasts.heard(TASK, ROW, "cpu", progress(measured(ticks)), Moment(0.0, 100.0))
    ended = AssignmentRow(*[getattr(ROW, n) for n in ("assignment_id", "task_id", "epoch", "node_id", "incarnation")],
                          (0,), 0.0, None, Outcome.COMPLETED)  # fmt: skip
    forecasts.ended(TASK, ended, "cpu")
    records = json.loads(json.dumps(dict(forecasts.changed())))
    assert forecasts.changed() == {}
    again = Forecasts()
    again.load(records)
    assert again.whole(TASK, "cpu") == forecasts.whole(TASK, "cpu") != Forecasts().whole(TASK, "cpu")
    assert again.model.trained == forecasts.model.trained != Forecasts().model.trained
    assert "measured" in again.basis("m", "cpu", 1)
    assert "never measured" in again.basis("m", "gpu", 1)


def test_a_task_that_is_moved_to_a_node_without_its_checkpoint_is_expected_to_begin_anew():
    half = TaskRow("task", "ada", b"", "m", 1, "", SIZE, 0.0, fraction_done=0.5, ran_on="node")
    forecasts = Forecasts()
    whole = forecasts.rest(half, "cpu", can_resume=False).expected_s
    assert forecasts.rest(half, "cpu", can_resume=True).expected_s < 0.7 * whole


def test_a_task_that_has_done_everything_but_not_said_so_has_a_moment_left():
    # Its node died between the last step and the last word.
    done = TaskRow("task", "ada", b"", "m", 1, "", SIZE, 0.0, fraction_done=1.0, ran_on="node", attempts=1)
    left = Forecasts().rest(done, "cpu", can_resume=True)
    assert 0.0 < left.low_s <= left.expected_s <= left.upper_s


def test_a_run_that_began_anew_in_its_worker_teaches_nothing_negative():
    forecasts = Forecasts()
    forecasts.begun(TASK, ROW, "cpu")
    slow = measured(5, evaluation_tokens=0.0, checkpoint_s=40.0)
    for done in (slow, measured(7, evaluation_tokens=0.0, checkpoint_s=0.5)):
        forecasts.heard(TASK, ROW, "cpu", progress(done), Moment(0.0, 100.0))
    assert measured(7, checkpoint_s=0.5).since(slow) == measured(7, checkpoint_s=0.5)
    assert forecasts.whole(TASK, "cpu").low_s > 0.0


@pytest.mark.parametrize("damage", [{"gone": 1}, {"training": {"scale": [float("nan"), 1, 1]}}])
def test_a_damaged_record_is_learned_again_and_keeps_nobody_from_starting(damage):
    forecasts = Forecasts()
    forecasts.begun(TASK, ROW, "cpu")
    forecasts.heard(TASK, ROW, "cpu", progress(measured(60)), Moment(0.0, 100.0))
    records = dict(forecasts.changed())
    (name,) = (name for name in records if name.startswith('["hardware"'))
    again = Forecasts()
    again.load({**records, name: {**records[name], **damage}})
    assert "never measured" in again.basis("m", "cpu", 1)


def test_what_could_not_be_kept_is_given_out_again():
    forecasts = Forecasts()
    forecasts.begun(TASK, ROW, "cpu")
    forecasts.heard(TASK, ROW, "cpu", progress(measured(60)), Moment(0.0, 100.0))
    records = dict(forecasts.changed())
    assert records
    forecasts.not_kept()
    assert forecasts.changed() == records


def test_times_beyond_what_messages_hold_are_told_as_the_last_there_is():
    assert timestamp(3e14).ToDatetime().year == 9999
    assert duration(1e15).seconds == 315_576_000_000
