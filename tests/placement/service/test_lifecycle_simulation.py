"""Leases, epochs and assignments under every kind of trouble; and that the simulation notices a missing guard."""

import random
from dataclasses import replace

import pytest
from alto_placement import lifecycle
from alto_training.assignments import Assignments
from hypothesis import given, settings
from hypothesis import strategies as st

from .cluster_simulation import ROUGH_ACTIONS, WEIGHTED_ACTIONS, Admission, Cluster

STEPS = st.lists(st.tuples(st.sampled_from(WEIGHTED_ACTIONS), st.integers(0, 5)), max_size=150)


@settings(max_examples=150)
@given(STEPS)
def test_every_task_ends_once_whatever_happens(actions):
    Cluster().run(actions)


def long_run(seed, actions=800):
    """Actions that hypothesis would rarely make: long and without a pattern."""
    draws = random.Random(seed)
    kinds = ROUGH_ACTIONS if seed % 2 else WEIGHTED_ACTIONS
    return [(draws.choice(kinds), draws.randrange(6)) for _ in range(actions)]


@pytest.mark.parametrize("seed", range(60))
def test_long_runs(seed):
    Cluster().run(long_run(seed))


def is_noticed(seeds=40):
    for seed in range(seeds):
        try:
            Cluster().run(long_run(seed))
        except AssertionError:
            return True
    return False


def test_an_epoch_that_does_not_grow_is_noticed(monkeypatch):
    real = lifecycle.assign

    def assign(draft, task_id, *rest):
        row = real(draft, task_id, *rest)
        if row is not None:
            draft.put(type(row)(**{**{n: getattr(row, n) for n in row.__dataclass_fields__}, "epoch": 1}))
        return row

    monkeypatch.setattr(lifecycle, "assign", assign)
    assert is_noticed()


FROZEN_AND_BACK = [
    *[(action, 0) for action in ("connect", "hear", "read", "place", "heartbeat", "hear", "read", "read")],
    *[("work", 0), ("report", 0), ("work", 0), ("freeze", 0)],
    *[("connect", 1), ("hear", 1), ("read", 1), ("pass time", 3), ("pass time", 3), ("heartbeat", 1), ("hear", 1)],
    *[("pass time", 3), ("place", 0), ("place", 0), *[("read", 1)] * 4, ("work", 1), ("report", 1)],
    *[("thaw", 0), ("report", 0)],
]


def test_a_frozen_node_that_comes_back_is_refused():
    cluster = Cluster(tasks=1)
    for step in FROZEN_AND_BACK:
        cluster.act(*step)
    assert [epoch for epoch, _ in cluster.admission.story["task-0"]] == [1, 2]
    assert cluster.nodes[0].workers == {}
    cluster.run([])


def test_admission_without_fencing_is_noticed(monkeypatch):
    def report(self, task_id, epoch, what, worker):
        self.story.setdefault(task_id, []).append((epoch, what))
        return True

    monkeypatch.setattr(Admission, "report", report)
    with pytest.raises(AssertionError, match="a stale epoch was accepted"):
        Cluster(tasks=1).run(FROZEN_AND_BACK)


def test_a_restarted_node_that_keeps_its_assignments_is_noticed(monkeypatch):
    monkeypatch.setattr(lifecycle, "_lose_assignments", lambda draft, node_id, now, rules: [])
    assert is_noticed()


def test_a_node_that_takes_up_old_assignments_is_noticed(monkeypatch):
    real = Assignments.offer

    def offer(self, assignment_id, *rest):
        self._highest_epoch.clear()
        self.held.pop(assignment_id, None)
        return real(self, assignment_id, *rest)

    monkeypatch.setattr(Assignments, "offer", offer)
    assert is_noticed()


def test_an_end_that_is_forgotten_before_it_was_heard_is_noticed(monkeypatch):
    real = Assignments.next_turn

    def next_turn(self, now_s, first):
        turn = real(self, now_s, first)
        for notice in turn.notices:
            self.drop(notice.assignment_id)
        return turn

    monkeypatch.setattr(Assignments, "next_turn", next_turn)
    assert is_noticed()


def play(steps, tasks=1):
    cluster = Cluster(tasks=tasks)
    for step in steps:
        cluster.act(*step)
    return cluster


def meeting(number):
    """A node connects and gets its lease."""
    return [("connect", number), ("hear", number), ("read", number)]


# A node trains and is cut off; the other one is heard of all the time, and is given the task when the lease is over.
CUT_OFF = [
    *meeting(0),
    ("place", 0),
    ("read", 0),
    ("break", 0),
    *[*meeting(1), ("pass time", 3)] * 3,
    *meeting(1),
    ("place", 0),
    *[("read", 1)] * 3,
]


def test_a_lease_that_nodes_do_not_heed_is_noticed(monkeypatch):
    assert live_epochs(play(CUT_OFF)) == [2]
    monkeypatch.setattr(Assignments, "near_lease_end", lambda self, now_s: [])
    assert live_epochs(play(CUT_OFF)) == [2]
    monkeypatch.setattr(Assignments, "without_lease", lambda self, now_s: [])
    with pytest.raises(AssertionError, match="trained twice at once"):
        play(CUT_OFF)


# Placement gives a node a task while the node is told to end: what it does not list is another's at once.
LEFT_BEFORE_IT_BEGAN = [
    *meeting(0),
    ("place", 0),
    *meeting(1),
    ("leave", 0),
    ("hear", 0),
    ("place", 0),
    *[("read", 1)] * 3,
]


def test_what_a_leaving_node_has_not_begun_goes_to_another_at_once():
    cluster = play(LEFT_BEFORE_IT_BEGAN)
    assert [cluster.state.nodes[f"node-{i}"].state for i in (0, 1)] == ["left", "ready"]
    assert (live_epochs(cluster), len(cluster.nodes[1].workers)) == ([2], 1)


def test_a_leaving_node_that_took_up_more_is_noticed(monkeypatch):
    real = Assignments.offer

    def offer(self, *assignment):
        leaving, self.leaving = self.leaving, False
        held = real(self, *assignment)
        self.leaving = leaving
        return held

    monkeypatch.setattr(Assignments, "offer", offer)
    with pytest.raises(AssertionError, match="trained twice at once"):
        play([*LEFT_BEFORE_IT_BEGAN, *[("read", 0)] * 3])


# A node restarts and trains; then its first start's registration comes again.
LATE_REGISTRATION = [*meeting(0), ("kill node", 0), *meeting(0), ("place", 0), ("read", 0), ("late registration", 0)]


def live_epochs(cluster):
    return [row.epoch for row in cluster.store.assignments.values() if row.outcome is None]


def test_a_late_registration_of_a_dead_process_ends_nothing(monkeypatch):
    assert live_epochs(play(LATE_REGISTRATION)) == [1]
    real = lifecycle.register

    def register(draft, *rest):
        draft.put(replace(real(draft, *rest), superseded=()))

    monkeypatch.setattr(lifecycle, "register", register)
    assert live_epochs(play(LATE_REGISTRATION)) == []


WAITED_TOO_LONG = [
    ("connect", 1),
    ("place", 0),
    *[("pass time", 3)] * 4,
    *meeting(0),
    ("place", 0),
    *[("read", 0)] * 3,
    # What was sent to it before its lease ran out is still in the stream.
    *[("read", 1)] * 3,
]


def test_an_offer_that_waited_for_longer_than_the_lease_is_not_taken_up(monkeypatch):
    cluster = play(WAITED_TOO_LONG)
    assert [len(node.workers) for node in cluster.nodes] == [1, 0]
    real = Assignments.offer

    def offer(self, *assignment_and_now):
        self.lease_end_s = float("inf")
        return real(self, *assignment_and_now)

    monkeypatch.setattr(Assignments, "offer", offer)
    with pytest.raises(AssertionError, match="trained twice at once"):
        play(WAITED_TOO_LONG)
