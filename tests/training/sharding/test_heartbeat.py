"""Signs of life of worker ranks."""

import time
from pathlib import Path

from alto_training.sharding.heartbeat import Heartbeats


def test_signs_of_life_during_long_work_do_not_count_as_steps(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path / "beats", 2)
    beats.beat(0)
    with beats.kept_up(0, interval_s=0.01):
        deadline = time.monotonic() + 5.0
        while beats.read() == (1, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beats.read()[0] > 1
    assert beats.read() == (1, 0)


def test_who_has_come_further_in_common_is_ahead_of_who_has_done_more_by_itself(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path / "beats", 2)
    for rank in (0, 1):
        beats.arrive(rank, 7)
    for _ in range(1000):
        beats.beat(0)  # it has much to do between two exchanges
    beats.arrive(1, 8)
    assert beats.read()[0] < beats.read()[1]
    beats.arrive(0, 8)
    assert beats.read()[0] == beats.read()[1]
