"""Attempts that fail: how often a task is tried again, and what becomes of a node on which everything fails."""

from dataclasses import replace

from alto.v1 import placement_pb2
from alto_placement import lifecycle, planner
from alto_placement.durations import Measured
from alto_placement.explanations import queue_words
from alto_placement.forecasts import Forecasts
from alto_placement.lifecycle import Reported, Rules
from alto_placement.policy import Policy
from alto_placement.snapshot import snapshot_of
from alto_placement.state import (
    ClusterState,
    Draft,
    FailureCause,
    Moment,
    NodeSpec,
    Outcome,
    Progress,
    Rest,
    TaskRow,
    TaskState,
    WorkSize,
)
from alto_placement.watches import PlanView, facts_of
from alto_placement.wire import node_to_wire

RULES = Rules(lease_s=1e9, max_failures=3, retry_delay_s=2.0, max_retry_delay_s=60.0)


class Cluster:
    """Placement's state on nodes of one GPU each, changed by its real operations and plans."""

    def __init__(self, *node_ids, tasks=1):
        self.state, self.now_s, self.names = ClusterState(), 0.0, 0
        for node_id in node_ids:
            self.commit(lifecycle.register, NodeSpec(node_id, "h100", 1), "first", self.now, RULES)
        for number in range(tasks):
            row = TaskRow(f"t{number}", "acme", b"", "llama", 1, "", WorkSize(steps=100), enqueued_s=1e9 + number)
            self.commit(lifecycle.enqueue, row)

    @property
    def now(self):
        return Moment(self.now_s, 1e9 + self.now_s)

    def commit(self, operation, *rest):
        draft = Draft(self.state)
        answer = operation(draft, *rest)
        self.state.apply(draft.changes())
        return answer

    def passes(self, seconds):
        self.now_s += seconds
        self.commit(lifecycle.expire, self.now, RULES)

    def starts(self):
        """Carry out the plan; return the assignments that begin."""
        snapshot, _ = snapshot_of(self.state, Forecasts(), Policy(), {}, self.now, 1)
        rows = [self.assign(one.task_id, one.parts[0].node_id) for one in planner.plan(snapshot).starting]
        return [row for row in rows if row is not None]

    def assign(self, task_id, node_id, gpu=0):
        self.names += 1
        return self.commit(lifecycle.assign, task_id, node_id, (gpu,), f"a{self.names}", self.now)

    def hears(self, node_id, row, fraction):
        reported = Reported(row.assignment_id, row.epoch, Progress(fraction, self.now_s, Measured(ticks=10)))
        self.commit(lifecycle.heartbeat, node_id, "first", [reported], self.now, RULES)

    def trains(self, row, fraction):
        self.state.progress[row.assignment_id] = Progress(fraction, self.now_s, Measured(ticks=10))

    def dies(self, node_id):
        """A node's process dies, and starts again."""
        self.names += 1
        self.commit(lifecycle.register, self.state.nodes[node_id].spec, f"start-{self.names}", self.now, RULES)

    def is_cut_off(self, node_id):
        """A node is not heard of for longer than its lease."""
        self.state.lease_end_s[node_id] = self.now_s
        self.passes(0.0)

    def leaves(self, node_id):
        """A node that has nothing ends in order."""
        incarnation = self.state.nodes[node_id].incarnation
        self.commit(lifecycle.heartbeat, node_id, incarnation, [], self.now, RULES, True)

    def is_back(self, node_id):
        self.commit(lifecycle.heartbeat, node_id, self.state.nodes[node_id].incarnation, [], self.now, RULES)

    def fails(self, row, why="it crashed", last=None):
        cause = FailureCause("TRAINING_FAILED", why)
        said = row.node_id, "first", row.assignment_id, row.epoch, Outcome.FAILED_RETRIABLE, cause, self.now, RULES
        self.commit(lifecycle.assignment_ended, *said, last)

    def task(self, task_id="t0"):
        return self.state.tasks[task_id]


def test_attempts_that_come_further_are_not_counted_against_a_task():
    cluster = Cluster("n1")
    for fraction in (0.2, 0.4, 0.6, 0.8):
        (row,) = cluster.starts()
        cluster.trains(row, fraction)
        cluster.fails(row)
        assert (cluster.task().failures, cluster.task().ended) == (1, None)
        cluster.passes(60.0)
    for failures in (2, 3):
        (row,) = cluster.starts()
        cluster.trains(row, 0.801)
        cluster.fails(row, f"crash {failures}")
        assert cluster.task().failures == failures
        cluster.passes(60.0)
    assert cluster.task().ended is TaskState.GIVEN_UP
    assert cluster.task().failure.message == (
        "given up after 3 attempts in a row that came no further, the last on n1: crash 3"
    )


def test_a_node_on_which_everything_fails_does_not_eat_up_the_queue():
    cluster = Cluster("well", "sick", tasks=6)
    done = 0
    for _ in range(200):
        for row in cluster.starts():
            if row.node_id == "sick":
                cluster.fails(row, "its disk is full")
            else:
                cluster.trains(row, 1.0)
        for row in list(cluster.state.on_node("well")):
            said = row.node_id, "first", row.assignment_id, row.epoch, Outcome.COMPLETED, None, cluster.now, RULES
            cluster.commit(lifecycle.assignment_ended, *said)
            done += 1
        cluster.passes(1.0)
    assert done == 6
    assert not any(task.ended is TaskState.GIVEN_UP for task in cluster.state.tasks.values())


def test_a_node_rests_longer_each_time_until_an_attempt_gets_to_its_first_tick():
    cluster = Cluster("n1", "n2", tasks=4)
    cluster.commit(lifecycle.cordon, "n2", True)
    cluster.fails(cluster.assign("t0", "n1"))
    assert not cluster.state.nodes["n1"].rests, "the only node that takes work does not rest"
    cluster.commit(lifecycle.cordon, "n2", False)
    for task_id, rest_s in (("t1", 4.0), ("t2", 8.0)):
        cluster.fails(cluster.assign(task_id, "n1"))
        cluster.passes(rest_s - 0.5)
        assert cluster.assign("t3", "n1") is None
        cluster.passes(1.0)
    row = cluster.assign("t3", "n1")
    cluster.trains(row, 0.01)
    cluster.fails(row)
    assert not cluster.state.nodes["n1"].rests
    assert "n1" not in cluster.state.rests


def test_who_waits_for_a_node_that_rests_is_told_so():
    cluster = Cluster("n1", "n2", tasks=2)
    first = cluster.starts()
    cluster.fails(next(row for row in first if row.node_id == "n1"))
    waiting = next(task for task in cluster.state.tasks.values() if not task.assignment_id)
    cluster.commit(lifecycle.cordon, "n2", True)
    snapshot, left = snapshot_of(cluster.state, Forecasts(), Policy(), {}, Moment(3.0, 1e9 + 3.0), 1)
    made = planner.plan(snapshot)
    view = PlanView(1, cluster.now, cluster.state, facts_of(made, snapshot, left))
    assert queue_words(waiting, made.explanations.get(waiting.task_id), view) == (
        "NO_NODE_READY",
        "No node that could hold it takes work now: n1 rests for a moment, because an attempt failed there at its "
        "start; n2 takes no more work.",
    )
    cluster.passes(0.5)
    assert not cluster.state.nodes["n1"].rests, "no other node is left that takes work"


def test_who_waits_for_others_is_told_of_a_node_that_rests():
    cluster = Cluster("n1", "n2", tasks=2)
    cluster.commit(lifecycle.register, NodeSpec("other", "a100", 1), "first", cluster.now, RULES)
    for task_id, kind in (("runs", "a100"), ("waits", "a100"), ("here", "h100")):
        cluster.commit(lifecycle.enqueue, replace(cluster.task(), task_id=task_id, gpu_kind=kind))
    cluster.assign("runs", "other")
    cluster.assign("t1", "n2")
    cluster.fails(cluster.assign("t0", "n1"), "its disk is full")
    snapshot, left = snapshot_of(cluster.state, Forecasts(), Policy(), {}, cluster.now, 1)
    made = planner.plan(snapshot)
    view = PlanView(1, cluster.now, cluster.state, facts_of(made, snapshot, left))
    words = {}
    for task_id in ("waits", "here"):
        reason, words[task_id] = queue_words(cluster.task(task_id), made.explanations.get(task_id), view)
        assert reason == "GPUS_BUSY"
    busy = "Every place that could hold it is in use."
    assert words["here"].startswith(f"{busy} n1 rests for a moment, because an attempt failed there at its start.")
    assert "rests" not in words["waits"]
    message = node_to_wire(cluster.state.nodes["n1"], view)
    assert (message.state, message.rest.failures) == (placement_pb2.NODE_STATE_RESTING, 1)
    assert message.rest.message == "its disk is full"
    assert message.rest.until_time.ToSeconds() == 1e9 + RULES.delay_s(2)
    assert not node_to_wire(cluster.state.nodes["n2"], view).HasField("rest")


def test_an_operator_or_a_restart_ends_a_rest():
    cluster = Cluster("n1", "n2")
    (row,) = cluster.starts()
    cluster.fails(row)
    assert cluster.state.nodes[row.node_id].rests
    cluster.commit(lifecycle.cordon, row.node_id, False)
    assert not cluster.state.nodes[row.node_id].rests


def test_no_node_rests_for_one_that_could_not_hold_the_task():
    cluster = Cluster("n1", "n2")
    cluster.commit(lifecycle.register, NodeSpec("n2", "cpu", 1), "second", cluster.now, RULES)
    cluster.commit(lifecycle.enqueue, replace(cluster.task(), task_id="kind", gpu_kind="h100"))
    cluster.fails(cluster.assign("kind", "n1"))
    assert not cluster.state.nodes["n1"].rests


def test_attempts_begun_before_do_not_speak_for_a_node_that_rests():
    cluster = Cluster("n1", "n2", tasks=3)
    cluster.commit(lifecycle.register, NodeSpec("n1", "h100", 2), "first", cluster.now, RULES)
    old = cluster.assign("t0", "n1")
    cluster.trains(old, 0.3)
    cluster.passes(1.0)
    cluster.fails(cluster.assign("t1", "n1", gpu=1))
    cluster.fails(old)
    assert cluster.state.nodes["n1"].rests
    cluster.passes(10.0)
    late = cluster.assign("t2", "n1")
    cluster.hears("n1", late, 0.01)
    assert "n1" not in cluster.state.rests, "its first tick does"


def test_the_end_itself_tells_how_far_an_attempt_came():
    cluster = Cluster("n1", "n2")
    row = cluster.assign("t0", "n1")
    cluster.fails(row, last=Progress(0.2, 0.0, Measured(ticks=1)))
    assert not cluster.state.nodes["n1"].rests
    assert cluster.task().fraction_done == 0.2


def test_what_counts_is_the_furthest_that_a_task_ever_came():
    cluster = Cluster("n1", "n2")
    for node_id, fraction, failures in (("n1", 0.3, 1), ("n2", 0.1, 2), ("n1", 0.3, 3)):
        row = cluster.assign("t0", node_id)
        cluster.trains(row, fraction)
        cluster.fails(row)
        assert cluster.task().failures == failures
        cluster.passes(100.0)
    assert cluster.task().ended is TaskState.GIVEN_UP
    preempted = Cluster("n1")
    for fraction in (0.1, 0.5, 0.9):
        row = preempted.assign("t0", "n1")
        preempted.trains(row, fraction)
        said = "n1", "first", row.assignment_id, row.epoch, Outcome.STOPPED, None, preempted.now, RULES
        preempted.commit(lifecycle.assignment_ended, *said)
        row = preempted.assign("t0", "n1")
        preempted.trains(row, fraction)
        preempted.fails(row)
        assert (preempted.task().failures, preempted.task().ended) == (1, None)
        preempted.passes(100.0)


def test_a_node_may_fail_for_days():
    cluster = Cluster("n1", "n2")
    cluster.state.rests["n1"] = Rest(10_000, 0.0, 0.0, "")
    cluster.fails(cluster.assign("t0", "n1"))
    assert cluster.state.rests["n1"] == Rest(10_001, 1e9, 60.0, "it crashed")


def test_a_rest_whose_end_was_forgotten_is_over():
    cluster = Cluster("n1", "n2")
    cluster.fails(cluster.assign("t0", "n1"))
    cluster.state.rests.clear()
    cluster.passes(0.1)
    assert not cluster.state.nodes["n1"].rests


def test_a_task_that_takes_its_nodes_down_is_given_up():
    cluster = Cluster("n1", "n2", "n3")
    for failures in (1, 2, 3):
        (row,) = cluster.starts()
        cluster.trains(row, 0.001 * failures)
        cluster.dies(row.node_id)
        assert cluster.task().failures == failures
    assert cluster.task().ended is TaskState.GIVEN_UP
    assert cluster.task().failure.message == (
        f"given up after 3 attempts in a row that came no further, the last on {row.node_id}: "
        "its node was lost while it trained the task"
    )


def test_nodes_that_die_do_not_end_a_task_that_comes_further():
    cluster = Cluster("n1")
    for number, fraction in enumerate((0.1, 0.1, 0.3, 0.3, 0.5, 0.5, 0.7)):
        (row,) = cluster.starts()
        cluster.trains(row, fraction)
        cluster.dies("n1")
        assert cluster.task().failures == 1 + number % 2
    assert cluster.task().ended is None


def test_a_node_that_is_killed_again_and_again_does_not_end_a_search_of_a_week():
    cluster = Cluster("n1")
    for number in range(1, 6):
        (row,) = cluster.starts()
        cluster.passes(lifecycle.LASTED_S)
        cluster.trains(row, 0.0009 * number)
        cluster.dies("n1")
        assert (cluster.task().failures, cluster.task().ended) == (1, None)
    for failures in (2, 3):
        (row,) = cluster.starts()
        cluster.passes(lifecycle.LASTED_S)
        cluster.trains(row, 0.0009 * 5)
        cluster.dies("n1")
        assert cluster.task().failures == failures
    assert cluster.task().ended is TaskState.GIVEN_UP, "what takes its node down at one place is given up all the same"


def test_nodes_that_were_only_cut_off_do_not_count_against_their_tasks():
    cluster = Cluster("n1")
    for _ in range(5):
        (row,) = cluster.starts()
        cluster.trains(row, 0.1)
        cluster.is_cut_off("n1")
        assert cluster.task().failures == 1
        cluster.is_back("n1")
        assert (cluster.task().failures, cluster.task().ended) == (0, None)
    (row,) = cluster.starts()
    cluster.trains(row, 0.1)
    cluster.is_cut_off("n1")
    cluster.dies("n1")
    cluster.is_cut_off("n1")
    cluster.is_back("n1")
    assert cluster.task().failures == 1, "that it died stays counted"


def test_what_a_lost_node_had_not_begun_or_was_to_let_go_of_is_not_counted():
    cluster = Cluster("n1")
    cluster.starts()
    cluster.dies("n1")
    (row,) = cluster.starts()
    cluster.trains(row, 0.1)
    cluster.commit(lifecycle.drain, "n1")
    cluster.dies("n1")
    assert (cluster.task().failures, cluster.task().attempts) == (0, 2)


def test_a_node_that_joined_long_ago_is_not_forgotten_when_it_is_lost_at_a_restart_of_placement():
    cluster = Cluster("n1")
    cluster.commit(lifecycle.cordon, "n1", True)
    cluster.now_s = 3 * RULES.keep_lost_s
    cluster.is_back("n1")
    cluster.state = ClusterState(nodes=cluster.state.nodes, tasks=cluster.state.tasks)
    cluster.is_cut_off("n1")
    assert cluster.state.nodes["n1"].lost
    cluster.passes(RULES.keep_lost_s)
    assert cluster.commit(lifecycle.forget_lost, cluster.now, RULES) == ()
    cluster.passes(1.0)
    assert cluster.commit(lifecycle.forget_lost, cluster.now, RULES) == ("n1",)


def test_nodes_that_were_lost_or_left_long_ago_are_forgotten():
    cluster = Cluster("lost", "left", "here")
    row = cluster.assign("t0", "lost")
    cluster.trains(row, 0.1)
    cluster.is_cut_off("lost")
    cluster.leaves("left")
    cluster.passes(RULES.keep_lost_s)
    assert cluster.commit(lifecycle.forget_lost, cluster.now, RULES) == ()
    cluster.passes(1.0)
    assert cluster.commit(lifecycle.forget_lost, cluster.now, RULES) == ("lost", "left")
    assert list(cluster.state.nodes) == list(cluster.state.lease_end_s) == list(cluster.state.last_seen_s) == ["here"]
    assert cluster.state.lost_with == {}
    (row,) = cluster.starts()
    assert (row.task_id, row.node_id) == ("t0", "here")
    # It comes back as any that joins.
    cluster.commit(lifecycle.register, NodeSpec("lost", "h100", 1), "first", cluster.now, RULES)
    assert cluster.state.nodes["lost"].state == "ready"
