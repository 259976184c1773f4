"""The order of gathers, with units that only note what is asked of them."""

import pytest
from alto_training.sharding.errors import LockStepError
from alto_training.sharding.gather_order import GatherOrder


class NotedUnit:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.gathered_bytes = 10
        self.shard_bytes = 5
        self._log = log

    def start(self) -> None:
        self._log.append(f"start {self.name}")

    def finish(self) -> None:
        self._log.append(f"finish {self.name}")

    def release(self) -> None:
        self._log.append(f"release {self.name}")


def make(layers: int, prefetch: int, in_lock_step: bool = True) -> tuple[GatherOrder, list[NotedUnit], list[str]]:
    log: list[str] = []
    units = [NotedUnit(name, log) for name in ("embedding", *(f"layer{number}" for number in range(layers)), "head")]
    return GatherOrder(units[:1], units[1:-1], units[-1], prefetch, in_lock_step=in_lock_step), units, log


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_every_gather_is_finished_and_released_and_counted(layers: int, prefetch: int) -> None:
    order, units, log = make(layers, prefetch)
    for training in (True, False, True):
        log.clear()
        order.walk(training)
        starts = [entry for entry in log if entry.startswith("start")]
        assert len(starts) == sum(entry.startswith("finish") for entry in log)
        assert len(starts) == sum(entry.startswith("release") for entry in log)
        assert order.gathered_bytes(training) == 10 * len(starts)
    assert order.shard_bytes == 5 * len(units)


def test_the_next_unit_is_under_way_before_this_one_is_waited_for() -> None:
    order, _, log = make(layers=2, prefetch=1)
    order.walk(training=False)
    assert log[:4] == ["start embedding", "start layer0", "finish embedding", "release embedding"]


def test_the_last_layer_stays_for_the_way_back() -> None:
    order, _, log = make(layers=2, prefetch=1)
    order.walk(training=True)
    assert log.count("start layer1") == 1
    assert log.count("start layer0") == 2


@pytest.mark.parametrize("training", [True, False])
def test_where_no_rank_waits_for_another_the_next_pass_begins_while_a_training_pass_ends(training: bool) -> None:
    order, _, log = make(layers=8, prefetch=2, in_lock_step=False)
    order.walk(training=True)
    assert log[-4:] == ["start embedding", "finish layer1", "release layer1", "finish layer0"]
    log.clear()
    order.walk(training)
    # The embedding is under way, and layer 0 still here.
    assert log[:4] == ["start layer1", "finish embedding", "release embedding", "start layer2"]


def test_what_stays_for_the_next_pass_is_not_counted_again() -> None:
    order, _, log = make(layers=8, prefetch=4, in_lock_step=False)
    order.walk(training=True)
    for _ in range(2):
        log.clear()
        order.walk(training=True)
        assert order.gathered_bytes(training=True) == 10 * sum(entry.startswith("start") for entry in log)
        # Of 8 + 8 layers two stay at the turn and two from pass to pass.
        assert order.gathered_bytes(training=True) == 10 * (1 + 8 + 1 + 8 - 4)


def test_a_rank_out_of_step_is_told_so() -> None:
    order, units, _ = make(layers=2, prefetch=1)
    order.begin(training=True)
    order.enter(units[0])
    order.leave(units[0])
    with pytest.raises(LockStepError, match=r"layer1 where layer0 was to be gathered"):
        order.enter(units[2])
    with pytest.raises(LockStepError, match=r"a new pass"):
        order.begin(training=False)


def test_where_no_rank_waits_for_another_a_pass_that_was_broken_off_is_forgotten() -> None:
    order, units, log = make(layers=3, prefetch=1, in_lock_step=False)
    order.begin(training=True)
    for unit in units[:2]:
        order.enter(unit)
        order.leave(unit)
    order.enter(units[2])  # layer1 is here, and layer2 under way
    log.clear()
    order.begin(training=False)
    assert sorted(log) == ["release layer1", "release layer2"]
    log.clear()
    order.walk(training=False)
    assert [entry for entry in log if entry.startswith("start")] == [f"start {unit.name}" for unit in units]


def test_in_lock_step_a_pass_that_was_broken_off_is_told_of() -> None:
    order, units, _ = make(layers=3, prefetch=1)
    order.begin(training=True)
    order.enter(units[0])
    with pytest.raises(LockStepError, match="a new pass"):
        order.begin(training=False)
