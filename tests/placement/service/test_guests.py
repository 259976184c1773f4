"""Who joins whose executor: what the planner is shown of it, what becomes of the assignments, what is told of it."""

from dataclasses import replace

import pytest
from alto.v1 import tuning_pb2
from alto_placement import lifecycle, planner
from alto_placement.durations import Measured
from alto_placement.explanations import queue_words
from alto_placement.forecasts import Forecasts
from alto_placement.lifecycle import Rules
from alto_placement.links import StartOrder
from alto_placement.policy import Policy
from alto_placement.sharing import SharingRule, slowdowns
from alto_placement.snapshot import snapshot_of
from alto_placement.state import (
    ClusterState,
    Draft,
    Moment,
    NodeSpec,
    Outcome,
    Progress,
    StopReason,
    TaskRow,
    TaskState,
    WorkSize,
)
from alto_placement.watches import PlanView, facts_of
from alto_placement.wire import order_to_wire, task_to_wire

RULES = Rules(max_failures=3)
GIB = 2**30


def size(steps=1000, adapter_memory_bytes=GIB):
    return WorkSize(
        train_tokens=200 * steps,
        steps=steps,
        total_lora_rank=8,
        base_parameters=1_000_000_000,
        trials=1,
        longest_steps=steps,
        adapter_memory_bytes=adapter_memory_bytes,
    )


class Cluster:
    """Placement's state, changed by its real operations. One node of one GPU unless more are asked for."""

    def __init__(self, *tasks, gpus=1, kind="h100", rule=SharingRule.TENANT):
        self.state, self.forecasts, self.policy = ClusterState(), Forecasts(), Policy(sharing=rule)
        self.now, self.names = Moment(0.0, 1e9), 0
        self.commit(lifecycle.register, NodeSpec("node", kind, gpus, 80 * GIB), "first", self.now, RULES)
        for task in tasks:
            self.commit(lifecycle.enqueue, task)

    def commit(self, operation, *rest):
        draft = Draft(self.state)
        answer = operation(draft, *rest)
        self.state.apply(draft.changes())
        return answer

    def assign(self, task_id, gpus=(0,), host=""):
        self.names += 1
        return self.commit(lifecycle.assign, task_id, "node", gpus, f"a{self.names}", self.now, host)

    def trains(self, row, fraction=0.1, guest_memory_bytes=20 * GIB):
        measured = Measured(ticks=100, train_tokens=20_000, lora_rank_ticks=800, training_s=50.0)
        steps_left = round((1.0 - fraction) * self.state.tasks[row.task_id].size.longest_steps)
        progress = Progress(fraction, self.now.monotonic_s, measured, fraction, steps_left, guest_memory_bytes)
        self.state.progress[row.assignment_id] = progress
        guests = self.state.guests()
        shared = bool(row.host_assignment_id) or row.assignment_id in guests
        self.forecasts.heard(self.state.tasks[row.task_id], row, "h100", progress, self.now, shared)

    def ends(self, row, outcome):
        self.commit(
            lifecycle.assignment_ended, "node", "first", row.assignment_id, row.epoch, outcome, None, self.now, RULES
        )

    def snapshot(self):
        return snapshot_of(self.state, self.forecasts, self.policy, {}, self.now, 1)

    def plan(self):
        snapshot, left = self.snapshot()
        made = planner.plan(snapshot)
        return made, PlanView(1, self.now, self.state, facts_of(made, snapshot, left))


def task(task_id, tenant="acme", **changes):
    changes = {"size": size(), "gpus": 1, "gpu_kind": "", **changes}
    return TaskRow(task_id, tenant, b"", "llama", enqueued_s=1e9, **changes)


def hosting(*others, **settings):
    cluster = Cluster(task("host", size=size(20_000)), *others, **settings)
    host = cluster.assign("host")
    cluster.trains(host)
    return cluster, host


def joins(cluster):
    """Who joins whom by the plan."""
    return {one.task_id: one.host_task_id for one in cluster.plan()[0].starting}


def test_a_small_task_joins_the_executor_of_its_base_model_and_holds_no_gpu():
    cluster, host = hosting(task("guest"))
    assert joins(cluster) == {"guest": "host"}
    made, view = cluster.plan()
    reason, sentence = queue_words(cluster.state.tasks["guest"], made.explanations["guest"], view)
    assert (reason, sentence) == (
        "JOINS_EXECUTOR",
        "It is about to share host's executor: both are over the same base model.",
    )
    row = cluster.assign("guest", made.starting[0].parts[0].gpu_indices, "host")
    assert (row.gpu_indices, row.host_assignment_id) == ((), host.assignment_id)
    assert row.epoch > 0
    sent = order_to_wire(StartOrder(row, replace(cluster.state.tasks["guest"], work=b"")), 10.0).assignment
    assert (list(sent.gpu_indices), sent.host_assignment_id) == ([], host.assignment_id)
    assert cluster.state.free_gpus("node") == set()
    _, view = cluster.plan()
    told = task_to_wire(cluster.state.tasks["guest"], view)
    assert (told.forecast.is_guest, told.forecast.host_task_id, list(told.gpu_indices)) == (True, "host", [])
    assert list(task_to_wire(cluster.state.tasks["host"], view).forecast.guest_task_ids) == ["guest"]
    assert isinstance(told.forecast, tuning_pb2.TaskForecast)


@pytest.mark.parametrize(
    ("guest", "settings"),
    [
        (task("guest", tenant="other"), {}),
        (task("guest"), {"rule": SharingRule.OFF}),
        (replace(task("guest"), base_model="qwen"), {}),
        (task("guest", size=size(adapter_memory_bytes=21 * GIB)), {}),
        (task("guest", size=size(adapter_memory_bytes=0)), {}),
        (task("guest", gpu_kind="a100"), {}),
        (task("guest", gpus=2), {"gpus": 2}),
        (task("guest", alone=True), {}),
        (task("guest", held=True), {}),
    ],
    ids=["tenant", "off", "base model", "memory", "unknown memory", "kind", "wide", "alone", "held"],
)
def test_who_does_not_join(guest, settings):
    cluster, _ = hosting(guest, **settings)
    assert "guest" not in {name for name, host in joins(cluster).items() if host}


def test_tenants_share_where_the_operator_says_so_and_names_stay_with_their_tenant():
    cluster, _ = hosting(task("guest", tenant="other"), rule=SharingRule.ALL)
    assert joins(cluster) == {"guest": "host"}
    made, view = cluster.plan()
    _, sentence = queue_words(cluster.state.tasks["guest"], made.explanations["guest"], view)
    assert "host's" not in sentence


def test_an_executor_offers_what_it_says_less_what_is_on_its_way():
    cluster, host = hosting(task("first", size=size(adapter_memory_bytes=15 * GIB)), task("second", size=size(5000)))
    assert joins(cluster)
    first = cluster.assign("first", (), "host")
    (row,) = [one for one in cluster.snapshot()[0].running if one.task_id == "host"]
    assert row.free_memory_bytes == 5 * GIB
    cluster.trains(first, guest_memory_bytes=0)
    cluster.trains(host, guest_memory_bytes=6 * GIB)
    (row,) = [one for one in cluster.snapshot()[0].running if one.task_id == "host"]
    assert row.free_memory_bytes == 6 * GIB
    # Nobody joins an executor that is about to end, one that a guest lives in, or one that has not said anything yet.
    cluster.commit(lifecycle.preempt, "host", StopReason.PREEMPTED)
    assert all(one.free_memory_bytes == 0 for one in cluster.snapshot()[0].running)
    cluster.state.progress.clear()
    assert all(one.free_memory_bytes == 0 for one in cluster.snapshot()[0].running)


def test_an_assignment_is_made_only_while_the_host_is_there_to_stay():
    cluster, host = hosting(task("guest"), task("other"))
    assert cluster.assign("other", (), "guest") is None, "it is not trained"
    guest = cluster.assign("guest", (), "host")
    assert cluster.assign("guest", (), "host") is None, "it is there already"
    assert cluster.assign("other", (), "guest") is None, "a guest is no host"
    cluster.commit(lifecycle.dequeue, "host", cluster.now)
    assert cluster.assign("other", (), "host") is None, "its host is being cancelled"
    cluster.ends(host, Outcome.STOPPED)
    assert cluster.assign("other", (), "host") is None, "its host has ended"
    # Until its node says so the guest is on its way out; it holds nothing, and its GPU may be given away.
    assert cluster.state.task_state(cluster.state.tasks["guest"]) is TaskState.ASSIGNED
    assert joins(cluster) == {"other": ""}
    cluster.ends(guest, Outcome.STOPPED)
    waiting = cluster.state.tasks["guest"]
    assert cluster.state.task_state(waiting) is TaskState.WAITING
    assert (waiting.failures, waiting.alone, waiting.keeps_turn, waiting.ran_on) == (0, False, False, "node")


def test_a_shared_executor_that_breaks_down_is_nobodys_failure_and_happens_once():
    cluster, host = hosting(task("guest"))
    guest = cluster.assign("guest", (), "host")
    cluster.trains(guest)
    for row in (guest, host):
        cluster.ends(row, Outcome.UNSHARED)
    for task_id in ("host", "guest"):
        row = cluster.state.tasks[task_id]
        assert (row.attempts, row.failures, row.alone, row.ended) == (1, 0, True, None)
    assert cluster.state.tasks["host"].keeps_turn
    assert not cluster.state.tasks["guest"].keeps_turn
    host = cluster.assign("host")
    cluster.trains(host)
    assert cluster.assign("guest", (), "host") is None
    assert joins(cluster) == {}
    # Alone, whose fault it is counts; and a node cannot say "shared" for ever.
    for outcome in (Outcome.FAILED_RETRIABLE, Outcome.UNSHARED, Outcome.FAILED_RETRIABLE):
        cluster.ends(host, outcome)
        cluster.now = Moment(cluster.now.monotonic_s + 100, cluster.now.wall_s + 100)
        host = cluster.assign("host") or host
    assert cluster.state.tasks["host"].failures == 3
    assert cluster.state.tasks["host"].ended is TaskState.GIVEN_UP


@pytest.mark.parametrize("how", ["lost", "restarted", "narrower"])
def test_a_guest_is_lost_with_its_node(how):
    cluster, _ = hosting(task("guest"))
    cluster.assign("guest", (), "host")
    if how == "lost":
        cluster.now = Moment(1000.0, 1e9 + 1000)
        cluster.commit(lifecycle.expire, cluster.now, RULES)
    elif how == "restarted":
        cluster.commit(lifecycle.register, NodeSpec("node", "h100", 1, 0), "second", cluster.now, RULES)
    else:
        cluster.commit(lifecycle.register, NodeSpec("node", "h100", 0, 0), "first", cluster.now, RULES)
    assert not cluster.state.assignments
    assert cluster.state.task_state(cluster.state.tasks["guest"]) is TaskState.WAITING


def test_a_full_executor_slows_down_who_is_in_it_and_an_empty_one_does_not():
    cluster, host = hosting(task("guest"))
    alone_s = cluster.snapshot()[1]["host"].expected_s
    guest = cluster.assign("guest", (), "host")
    cluster.trains(guest)
    found = slowdowns(cluster.state.guests(), cluster.state, cluster.forecasts)
    share = cluster.forecasts.throughput_share(cluster.state.tasks["host"], "h100")
    assert 0 < share < 0.5, "ticks of 200 tokens, of the 8,192 that a GPU takes"
    assert found == {host.assignment_id: 1.0, guest.assignment_id: 1.0}
    full = replace(size(20_000), train_tokens=20_000 * 8192)
    for task_id in ("host", "guest"):
        cluster.state.tasks[task_id] = replace(cluster.state.tasks[task_id], size=full)
    found = slowdowns(cluster.state.guests(), cluster.state, cluster.forecasts)
    assert found[host.assignment_id] == found[guest.assignment_id] == pytest.approx(2.0, rel=0.01)
    assert cluster.snapshot()[1]["host"].expected_s > alone_s


def test_what_a_guest_did_is_learned_from_once():
    cluster, host = hosting(task("guest", size=replace(size(), shape="paper")))
    guest = cluster.assign("guest", (), "host")
    model = next(iter(cluster.forecasts.model.hardware.values()))
    ticks, start_s = model.training.ticks, model.start_s
    cluster.trains(guest, fraction=0.25)
    assert model.training.ticks == ticks
    row = replace(guest, outcome=Outcome.COMPLETED, ended_s=1e9)
    cluster.forecasts.ended(cluster.state.tasks["guest"], row, "h100")
    assert (model.training.ticks, model.start_s, len(model.run_errors)) == (ticks, start_s, 0)
    # Of the share of its samples that were trained, though: it is its own.
    assert cluster.forecasts.model.shares.expect("acme", "paper", 1.0).expected < 0.95
    assert host.assignment_id in cluster.state.assignments


def test_an_executor_that_is_about_to_end_takes_nobody_in():
    cluster, host = hosting(task("guest"))
    assert joins(cluster) == {"guest": "host"}
    cluster.trains(host, fraction=0.9999)
    assert joins(cluster) == {}
