"""The operator's policy is checked before anything runs on it; what people read of time never jumps."""

import json
from datetime import UTC, datetime

import pytest
from alto_placement.clock import SteadyClock
from alto_placement.settings import PlacementSettings


def settings(monkeypatch, **values):
    monkeypatch.setenv("ALTO_PLACEMENT_SERVICE_TOKEN", "secret")
    for name, value in values.items():
        monkeypatch.setenv(f"ALTO_PLACEMENT_{name.upper()}", json.dumps(value))
    return PlacementSettings.load()


def reservation(name, start, end, gpus=(0,), node="n1"):
    day = "2026-11-25T{:02}:00:00Z".format
    return {
        "reservation_id": name,
        "node_id": node,
        "gpu_indices": gpus,
        "start_time": day(start),
        "end_time": day(end),
    }


def test_the_policy_is_read_from_the_environment(monkeypatch):
    policy = settings(
        monkeypatch,
        tenants={"ada": {"weight": 2, "quota_gpus": 4, "cohort": "lab"}},
        objective={"makespan": 0.5, "preempt": False},
        reservations=[reservation("upgrade", 10, 12, (1, 0))],
    ).policy
    assert (policy.tenants[0].tenant, policy.tenants[0].weight, policy.tenants[0].quota_gpus) == ("ada", 2, 4)
    assert (policy.objective.makespan, policy.objective.preempt) == (0.5, False)
    assert policy.reservations[0].part.gpu_indices == (0, 1)
    assert policy.reservations[0].start_s == datetime(2026, 11, 25, 10, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reservations": [reservation("a", 10, 12), reservation("b", 11, 13)]}, "'a' and 'b' keep GPU 0 of node 'n1'"),
        ({"reservations": [reservation("a", 10, 12), reservation("a", 14, 15)]}, "two reservations are called 'a'"),
        ({"reservations": [reservation("a", 12, 10)]}, "ends before it starts"),
        ({"reservations": [reservation("a", 10, 12, (-1,))]}, "begin at 0"),
        ({"tenants": {"ada": {"weight": 0}}}, "greater than 0"),
        ({"tenants": {"ada": {"quota": 4}}}, "quota"),
        ({"objective": {"fairness": 2}}, "less than or equal to 1"),
        ({"lease_s": 15, "heartbeat_s": 10}, "HEARTBEAT_S is 10 with leases of 15 s: give at most a third"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_the_start(monkeypatch, values, words):
    with pytest.raises(ValueError, match="(?s)" + words.replace("(", r"\(")):
        settings(monkeypatch, **values)


def test_reservations_one_after_the_other_or_on_other_gpus_agree(monkeypatch):
    found = settings(
        monkeypatch,
        reservations=[
            reservation("a", 10, 12),
            reservation("b", 12, 13),
            reservation("c", 10, 12, (1,)),
            reservation("d", 10, 12, node="n2"),
        ],
    )
    assert len(found.policy.reservations) == 4


class Clocks:
    monotonic_s, wall_s = 100.0, 1e9

    def pass_time(self, seconds, jump_s=0.0):
        self.monotonic_s += seconds
        self.wall_s += seconds + jump_s


def test_a_clock_that_is_set_back_or_forth_moves_the_present_slowly():
    clocks = Clocks()
    now = SteadyClock(lambda: clocks.monotonic_s, lambda: clocks.wall_s)
    clocks.pass_time(10)
    assert now().wall_s == pytest.approx(1e9 + 10)
    for jump_s in (86_400.0, -200_000.0):
        before = now()
        clocks.pass_time(10, jump_s)
        after = now()
        assert after.monotonic_s - before.monotonic_s == pytest.approx(10)
        assert after.wall_s - before.wall_s == pytest.approx(10, abs=0.51)
        assert after.wall_s > before.wall_s


def test_a_small_error_of_the_clock_is_made_good():
    clocks = Clocks()
    now = SteadyClock(lambda: clocks.monotonic_s, lambda: clocks.wall_s)
    clocks.pass_time(1, jump_s=2.0)
    for _ in range(100):
        clocks.pass_time(1)
        now()
    assert now().wall_s == pytest.approx(clocks.wall_s)
