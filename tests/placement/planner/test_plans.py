"""What a plan promises, case by case."""

import dataclasses
from typing import Any

import alto_planner
import pytest
from alto_placement.planner import (
    ChangeKind,
    Choice,
    DuplicateRowError,
    Duration,
    GpuConflictError,
    InvalidRowError,
    Memory,
    Node,
    NodeState,
    Objective,
    Part,
    PreemptionReason,
    Reservation,
    ReservationConflictError,
    RunningTask,
    Sharing,
    Snapshot,
    TaskNeverFitsError,
    Tenant,
    UnknownNodeError,
    WaitingTask,
    WaitReason,
    check_can_ever_fit,
    plan,
)
from alto_placement.simulator import violations

NODE = Node("n0", "h100", 8)
OTHER = Node("n1", "h100", 8)


def task(task_id: str, gpus: int = 1, seconds: float = 100.0, **more: Any) -> WaitingTask:
    more.setdefault("arrived_s", 0.0)
    return WaitingTask(task_id, str(more.pop("tenant", "ada")), (Choice(gpus, Duration.certain(seconds)),), **more)


def running(task_id: str, node: str, gpus: range, end: float, **more: Any) -> RunningTask:
    return RunningTask(task_id, str(more.pop("tenant", "ada")), (Part(node, tuple(gpus)),), 0.0, end, end, **more)


def test_an_empty_queue_gives_an_empty_plan() -> None:
    answer = plan(Snapshot(5.0, [NODE]))
    assert len(answer.placements) == 0
    assert answer.gap == 0.0


def test_a_wide_task_takes_whole_nodes_and_a_remainder() -> None:
    answer = plan(Snapshot(0.0, [NODE, OTHER], [task("wide", 12)]))
    assert sorted(len(part.gpu_indices) for part in answer.placements[0].parts) == [4, 8]
    one_node = dataclasses.replace(task("wide").choices[0], gpus=12, one_node=True)
    refused = plan(Snapshot(0.0, [NODE, OTHER], [dataclasses.replace(task("wide"), choices=(one_node,))]))
    assert refused.unplaced == ("wide",)
    assert refused.explanations["wide"].reason is WaitReason.NEVER_FITS
    assert refused.explanations["wide"].largest_fit_gpus == 8


def test_of_several_choices_the_one_that_serves_the_cluster_is_taken() -> None:
    both = (Choice(1, Duration.certain(800.0)), Choice(8, Duration.certain(110.0)))
    alone = plan(Snapshot(0.0, [NODE], [WaitingTask("a", "ada", both, 0.0)]))
    assert alone.placements[0].choice == 1
    queue = [WaitingTask(f"t{i}", "ada", both, 0.0) for i in range(8)]
    crowd = plan(Snapshot(0.0, [NODE], queue, objective=Objective(completion=0.0)))
    assert crowd.makespan_s == 800.0
    assert not crowd.gap


def test_what_runs_stays_and_an_overdue_task_is_not_taken_for_gone() -> None:
    answer = plan(Snapshot(100.0, [NODE], [task("a", 8)], [running("r", "n0", range(8), 50.0)]))
    assert answer.placements[0].start_s > 100.0
    assert answer.explanations["a"].waits_for == ("r",)
    assert answer.explanations["a"].reason is WaitReason.GPUS_BUSY


def test_nothing_is_placed_on_a_node_that_takes_no_work() -> None:
    for state in (NodeState.CORDONED, NodeState.DRAINING, NodeState.LOST):
        answer = plan(Snapshot(0.0, [dataclasses.replace(NODE, state=state)], [task("a")]))
        assert answer.unplaced == ("a",)
    cordoned = plan(Snapshot(0.0, [dataclasses.replace(NODE, state=NodeState.CORDONED)], [task("a")]))
    assert cordoned.explanations["a"].reason is WaitReason.NO_NODE_READY


def test_a_draining_node_is_left_at_the_next_checkpoint() -> None:
    draining = dataclasses.replace(NODE, state=NodeState.DRAINING)
    ends = (
        running("leaves", "n0", range(4), 900.0, checkpoint_within_s=20.0),
        running("stays", "n0", range(4, 8), 900.0),
    )
    answer = plan(Snapshot(100.0, [draining], [], ends))
    assert [(row.task_id, row.at_s, row.reason) for row in answer.preemptions] == [
        ("leaves", 120.0, PreemptionReason.NODE_DRAINS)
    ]


def test_priority_preempts_only_at_a_checkpoint_and_only_for_an_earlier_start() -> None:
    low = running("low", "n0", range(8), 10_000.0, checkpoint_within_s=10.0)
    urgent = task("urgent", 8, priority=5)
    ordered = plan(Snapshot(50.0, [NODE], [urgent], [low])).preemptions
    assert [(row.task_id, row.for_task_id, row.reason) for row in ordered] == [
        ("low", "urgent", PreemptionReason.PRIORITY)
    ]
    never = dataclasses.replace(low, checkpoint_within_s=None)
    assert not plan(Snapshot(50.0, [NODE], [urgent], [never])).preemptions
    soon_over = dataclasses.replace(low, expected_end_s=55.0)
    assert not plan(Snapshot(50.0, [NODE], [urgent], [soon_over])).preemptions
    asked_not_to = Objective(preempt=False)
    assert not plan(Snapshot(50.0, [NODE], [urgent], [low], objective=asked_not_to)).preemptions


def test_a_higher_priority_goes_first_even_when_it_is_wide() -> None:
    half = running("r", "n0", range(4), 50.0)
    narrow = [task(f"t{i}", 1, 1000.0) for i in range(20)]
    answer = plan(Snapshot(0.0, [NODE], [*narrow, task("wide", 8, priority=1)], [half]))
    placed = {row.task_id: row for row in answer.placements}
    assert placed["wide"].start_s == 50.0


def test_a_quota_holds_and_can_be_borrowed_and_claimed_back() -> None:
    tenants = [Tenant("ada", quota_gpus=4, cohort="lab"), Tenant("bo", quota_gpus=4, cohort="lab")]
    greedy = [task(f"a{i}", 1, tenant="ada") for i in range(8)]
    borrowed = plan(Snapshot(0.0, [NODE], greedy, tenants=tenants))
    assert len(borrowed.starting) == 8
    alone = [dataclasses.replace(tenant, cohort="") for tenant in tenants]
    capped = plan(Snapshot(0.0, [NODE], greedy, tenants=alone))
    assert len(capped.starting) == 4
    waiting = next(row.task_id for row in greedy if row.task_id not in {p.task_id for p in capped.starting})
    assert capped.explanations[waiting].reason is WaitReason.QUOTA
    holders = [running(f"r{i}", "n0", range(i, i + 1), 9000.0, checkpoint_within_s=5.0) for i in range(8)]
    claimed = plan(Snapshot(5.0, [NODE], [task("b", 2, tenant="bo")], holders, tenants=tenants))
    assert len(claimed.preemptions) == 2
    assert {row.reason for row in claimed.preemptions} == {PreemptionReason.QUOTA_RECLAIMED}


def test_tenants_take_turns_by_weighted_usage() -> None:
    tenants = [Tenant("ada", usage_gpu_s=1e6), Tenant("bo")]
    queue = [task("a", 8, tenant="ada"), task("b", 8, tenant="bo")]
    assert plan(Snapshot(0.0, [NODE], queue, tenants=tenants)).starting[0].task_id == "b"


def test_a_wait_is_bounded() -> None:
    # A wide task that smaller ones would overtake for ever.
    narrow = [task(f"t{i}", 1, 100.0, arrived_s=10_000.0) for i in range(100)]
    half = running("r", "n0", range(4), 10_050.0)
    objective = Objective(patience=2.0, min_patience_s=1000.0)
    answer = plan(Snapshot(10_000.0, [NODE], [*narrow, task("wide", 8, 200.0)], [half], objective=objective))
    placed = {row.task_id: row for row in answer.placements}
    assert placed["wide"].start_s == 10_050.0
    assert not violations(Snapshot(10_000.0, [NODE], [*narrow, task("wide", 8, 200.0)], [half]), answer)


def test_who_waited_longest_is_bounded_whatever_its_duration() -> None:
    # By its own duration the wide task might wait for 50,000 s.
    narrow = [task(f"t{i}", 1, 100.0, arrived_s=9_900.0) for i in range(40)]
    queue = [*narrow, task("wide", 8, 500.0)]
    half = running("r", "n0", range(4), 10_050.0)

    def planned(longest_wait_s: float) -> tuple[float, float | None]:
        objective = Objective(patience=100.0, longest_wait_s=longest_wait_s)
        snapshot = Snapshot(10_000.0, [NODE], queue, [half], objective=objective)
        answer = plan(snapshot)
        assert not violations(snapshot, answer)
        starts = {row.task_id: row.start_s for row in answer.placements}
        return starts["wide"], answer.explanations["wide"].deadline_s

    assert planned(1_500.0) == (10_050.0, pytest.approx(3_600.0))
    assert planned(5_000.0) == (10_050.0, pytest.approx(5_000.0))
    late, deadline_s = planned(20_000.0)
    assert late > 10_050.0
    assert deadline_s == pytest.approx(20_000.0)


@pytest.mark.parametrize(("longest_wait_s", "first"), [(200.0, "old"), (20_000.0, "small")])
def test_among_the_overdue_the_small_go_first_until_one_waited_too_long(longest_wait_s: float, first: str) -> None:
    queue = [task("old", 8, 900.0), task("small", 8, 100.0, arrived_s=9_900.0)]
    busy = running("r", "n0", range(1), 10_050.0)
    objective = Objective(patience=0.5, min_patience_s=60.0, longest_wait_s=longest_wait_s)
    answer = plan(Snapshot(10_000.0, [NODE], queue, [busy], objective=objective))
    assert min(answer.placements, key=lambda row: row.start_s).task_id == first


def test_a_task_that_lost_its_node_keeps_its_turn() -> None:
    # Newer, smaller tasks of the same priority would overtake it; with GPUs kept for it they cannot.
    newer = [task(f"t{i:02}", 1, 100.0, arrived_s=900.0) for i in range(40)]
    lost = task("lost", 8, 400.0, arrived_s=100.0)
    busy = [running("r", "n0", range(4), 1050.0), running("s", "n1", range(8), 5000.0)]

    def start_s(row: WaitingTask) -> float:
        answer = plan(Snapshot(1000.0, [NODE, OTHER], [*newer, row], busy, objective=Objective(patience=100.0)))
        assert not violations(Snapshot(1000.0, [NODE, OTHER], [*newer, row], busy), answer)
        return {place.task_id: place.start_s for place in answer.placements}["lost"]

    assert start_s(lost) > 1100.0
    assert start_s(dataclasses.replace(lost, begun=True)) == 1050.0
    # A higher priority still goes first.
    urgent = task("urgent", 8, 10.0, arrived_s=999.0, priority=1)
    both = Snapshot(1000.0, [NODE], [dataclasses.replace(lost, begun=True), urgent])
    assert plan(both).starting[0].task_id == "urgent"


def test_what_remains_of_a_task_counts_not_what_it_was() -> None:
    queue = [task("fresh", 8, 300.0), task("resumed", 8, 100.0)]
    assert plan(Snapshot(0.0, [NODE], queue)).starting[0].task_id == "resumed"


def test_a_reservation_is_kept_and_short_tasks_use_the_time_before() -> None:
    kept = Reservation("service", Part("n0", tuple(range(8))), 100.0, 200.0)
    answer = plan(Snapshot(0.0, [NODE], [task("short", 8, 90.0), task("long", 8, 150.0)], [], [kept]))
    placed = {row.task_id: row.start_s for row in answer.placements}
    assert placed == {"short": 0.0, "long": 200.0}


def test_a_task_joins_an_executor_over_the_same_backbone_when_that_pays() -> None:
    host = running("host", "n0", range(8), 5000.0, backbone="llama", sharing=Sharing(10, 0.5), free_memory_bytes=100)
    guest = task("guest", 8, 300.0, backbone="llama", sharing=Sharing(20, 0.4))
    answer = plan(Snapshot(0.0, [NODE], [guest], [host]))
    assert answer.starting[0].host_task_id == "host"
    assert answer.starting[0].end_s == 300.0
    assert answer.explanations["guest"].reason is WaitReason.JOINS_EXECUTOR
    assert answer.explanations["guest"].shares_with == ("host",)
    assert not violations(Snapshot(0.0, [NODE], [guest], [host]), answer)
    for refused in (
        dataclasses.replace(guest, sharing=Sharing(200, 0.4)),
        dataclasses.replace(guest, backbone="qwen"),
        dataclasses.replace(guest, sharing=None),
        dataclasses.replace(guest, choices=(Choice(8, Duration.certain(300.0), "a100"),)),
    ):
        assert not plan(Snapshot(0.0, [NODE], [refused], [host])).starting


def test_guests_that_would_slow_each_other_too_much_stay_alone() -> None:
    def host(share: float) -> RunningTask:
        sharing = Sharing(10, share)
        return running("host", "n0", range(8), 5000.0, backbone="llama", sharing=sharing, free_memory_bytes=100)

    guest = task("guest", 8, 3000.0, backbone="llama", sharing=Sharing(20, 0.9))
    free = Snapshot(0.0, [NODE, OTHER], [guest], [host(0.5)])
    assert plan(free).starting[0].host_task_id == ""
    saturated = Snapshot(0.0, [NODE], [dataclasses.replace(guest, sharing=Sharing(20, 1.0))], [host(1.0)])
    assert not plan(saturated).starting


def test_others_are_explained_and_a_search_repeated_beside_a_task_that_joins() -> None:
    host = running("host", "n0", range(8), 900.0, backbone="llama", sharing=Sharing(10, 0.4), free_memory_bytes=100)
    here = running("guest0", "n0", range(8), 900.0, sharing=Sharing(10, 0.1), guest_of="host")
    guest = task("guest", 8, 300.0, backbone="llama", sharing=Sharing(20, 0.4))
    others = [task(f"t{i}", 4, 200.0 + i) for i in range(12)]
    snapshot = Snapshot(0.0, [NODE, OTHER], [guest, *others], [host, here])
    answer = plan(snapshot, budget_s=0.02)
    assert answer.explanations["guest"].shares_with == ("host", "guest0")
    assert {answer.explanations[row.task_id].reason for row in others} >= {WaitReason.STARTS_NOW}
    assert tuple(plan(snapshot, effort=answer.effort).placements) == tuple(answer.placements)


@pytest.mark.parametrize("effort", [None, (10, 10, 10, 0)], ids=["fast", "searched"])
def test_a_task_for_one_node_is_never_put_on_two_smaller_ones(effort: tuple[int, ...] | None) -> None:
    nodes = [Node("big", "h100", 8), Node("small0", "h100", 4), Node("small1", "h100", 4)]
    choices = [Choice(8, Duration.certain(600.0 + 60.0 * index), one_node=True) for index in range(4)]
    waiting = [WaitingTask(f"t{index}", "ada", (choice,), 0.0) for index, choice in enumerate(choices)]
    snapshot = Snapshot(0.0, nodes, waiting)
    answer = plan(snapshot, effort=effort)
    assert not violations(snapshot, answer)
    assert {tuple(part.node_id for part in placed.parts) for placed in answer.placements} == {("big",)}


def test_short_tasks_go_before_long_ones_wherever_the_makespan_leaves_room() -> None:
    """The first packing puts all thirty on the only GPU that is free of long ones: ends of 1 to 30 s."""
    long = [task("long", 1, 100.0), task("long1", 1, 85.0), task("long2", 1, 85.0)]
    short = [task(f"short{i}", 1, 1.0) for i in range(30)]
    snapshot = Snapshot(0.0, [Node("n0", "h100", 4)], [*long, *short], objective=Objective(makespan=10.0))
    answer = plan(snapshot, effort=(0, 100, 0, 0))
    assert not violations(snapshot, answer)
    assert answer.makespan_s == 100.0
    # Ten on each of three GPUs: 3 x 55 s, and the long ones end at 100, 95 and 95.
    assert answer.mean_completion_s == pytest.approx((3 * 55 + 100 + 95 + 95) / 33, rel=0.01)


def test_an_explanation_says_what_would_help() -> None:
    holder = running("r", "n0", range(6), 500.0)
    answer = plan(Snapshot(0.0, [NODE], [task("a", 4)], [holder]))
    explanation = answer.explanations["a"]
    assert explanation.reason is WaitReason.GPUS_BUSY
    assert explanation.predicted_start_s == 500.0
    changes = {change.kind: change.amount for change in explanation.changes}
    assert changes[ChangeKind.FEWER_GPUS] == 2
    assert changes[ChangeKind.MORE_GPUS] == 2


def test_fragmentation_is_told_from_busy_gpus() -> None:
    holders = [running("r0", "n0", range(5), 500.0), running("r1", "n1", range(5), 600.0)]
    answer = plan(Snapshot(0.0, [NODE, OTHER], [task("a", 4)], holders))
    assert answer.explanations["a"].reason is WaitReason.FRAGMENTED


def test_admission_refuses_what_never_fits() -> None:
    with pytest.raises(TaskNeverFitsError) as caught:
        check_can_ever_fit(task("a", 99), [NODE, OTHER])
    assert caught.value.largest_fit_gpus == 16
    check_can_ever_fit(task("a", 16), [NODE, OTHER])


@pytest.mark.parametrize(
    ("snapshot", "error", "subject"),
    [
        (Snapshot(0.0, [NODE, NODE]), DuplicateRowError, "n0"),
        (Snapshot(0.0, [NODE], [task("a"), task("a")]), DuplicateRowError, "a"),
        (Snapshot(0.0, [NODE], [task("a")], [running("a", "n0", range(1), 9.0)]), DuplicateRowError, "a"),
        (Snapshot(0.0, [NODE], [], [running("r", "gone", range(1), 9.0)]), UnknownNodeError, "r"),
        (Snapshot(0.0, [NODE], [], [running("r", "n0", range(9), 9.0)]), UnknownNodeError, "r"),
        (
            Snapshot(0.0, [NODE], [], [running("r", "n0", range(2), 9.0), running("s", "n0", range(2), 9.0)]),
            GpuConflictError,
            "s",
        ),
        (
            Snapshot(
                0.0,
                [NODE],
                reservations=[
                    Reservation("k", Part("n0", (0, 1)), 5.0, 9.0),
                    Reservation("l", Part("n0", (1,)), 8.0, 12.0),
                ],
            ),
            ReservationConflictError,
            "l",
        ),
        (Snapshot(0.0, [NODE], [task("a", 1, -1.0)]), InvalidRowError, "a"),
        (Snapshot(0.0, [NODE], [task("a", 1, float("inf"))]), InvalidRowError, "a"),
        (Snapshot(0.0, [NODE], [task("a", 0)]), InvalidRowError, "a"),
        (Snapshot(0.0, [Node("big", "h100", 65)]), InvalidRowError, "big"),
        (Snapshot(float("nan"), [NODE]), InvalidRowError, "snapshot"),
        (Snapshot(0.0, [NODE], tenants=[Tenant("ada", weight=0.0)]), InvalidRowError, "ada"),
    ],
)
def test_a_snapshot_that_contradicts_itself_is_refused(
    snapshot: Snapshot, error: type[Exception], subject: str
) -> None:
    with pytest.raises(error) as caught:
        plan(snapshot)
    assert getattr(caught.value, "subject", None) == subject


def test_a_kind_of_gpu_that_no_node_has_is_told_from_a_busy_one() -> None:
    unknown = WaitingTask("a", "ada", (Choice(1, Duration.certain(10.0), gpu_kind="tpu"),), 0.0)
    answer = plan(Snapshot(0.0, [NODE], [unknown]))
    assert answer.unplaced == ("a",)
    assert answer.explanations["a"].reason is WaitReason.NEVER_FITS
    with pytest.raises(TaskNeverFitsError) as caught:
        check_can_ever_fit(unknown, [NODE])
    assert caught.value.largest_fit_gpus == 0


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0 * 365])
def test_a_clock_that_jumps_changes_what_is_late_but_breaks_nothing(jump_s: float) -> None:
    memory = Memory()
    queue = [task(f"t{i}", 4, 50.0, arrived_s=1000.0) for i in range(6)]
    busy = [running("r", "n0", range(4), 1500.0)]
    for now_s in (1000.0, 1000.0 + jump_s, 1001.0):
        snapshot = Snapshot(now_s, [NODE], queue, busy)
        answer = plan(snapshot, memory=memory)
        assert not violations(snapshot, answer)
        assert len(answer.placements) == 6


def test_after_a_refused_snapshot_the_next_good_one_is_planned_as_if_nothing_had_been() -> None:
    memory = Memory()
    queue = [task(f"t{i}", 4, 50.0) for i in range(6)]
    busy = [running("r", "n0", range(4), 100.0)]
    good = Snapshot(0.0, [NODE], queue, busy, epoch=1)
    before = plan(good, memory=memory)
    for bad in (
        dataclasses.replace(good, waiting=[*queue, queue[0]]),  # an event that was applied twice
        dataclasses.replace(good, running=[*busy, busy[0]]),
        dataclasses.replace(good, waiting=[*queue, task("r")]),  # a start whose event came late
        dataclasses.replace(good, waiting=[*queue, task("t3", 2, 10.0)]),
    ):
        with pytest.raises(DuplicateRowError):
            plan(bad, memory=memory)
        # The plan made before is whole and stays readable, and the same snapshot gives it again.
        assert len(before.placements) == 6
        assert tuple(plan(good, memory=memory).placements) == tuple(before.placements)


def test_tasks_are_matched_anew_when_nodes_have_other_memories() -> None:
    memory = Memory()
    needs = [Choice(1, Duration.certain(10.0), memory_bytes=gib) for gib in (0, 30, 40, 41, 80, 81)]
    queue = [WaitingTask(f"t{i}", "ada", (choice,), 0.0) for i, choice in enumerate(needs)]
    for gib, without_place in ((40, 3), (80, 1), (81, 0), (0, 0), (20, 5), (40, 3)):
        snapshot = Snapshot(0.0, [Node("n0", "h100", 8, memory_bytes=gib)], queue)
        answer = plan(snapshot, memory=memory)
        assert answer.unplaced == tuple(f"t{i}" for i in range(6 - without_place, 6))
        assert not violations(snapshot, answer)
    both = Snapshot(0.0, [Node("n0", "h100", 2, memory_bytes=40), Node("n1", "h100", 8, memory_bytes=80)], queue)
    assert plan(both, memory=memory).unplaced == ("t5",)


def test_memories_that_nodes_do_not_tell_apart_give_one_plan() -> None:
    # Shapes are gone through for every task that starts: thousands of them must not be told apart for nothing.
    nodes = [Node("n0", "h100", 8, memory_bytes=80_000), Node("n1", "h100", 8, memory_bytes=40_000)]
    sizes = [(1 + i % 8, 10.0 + i % 17, 1 + i % 80_000) for i in range(0, 400_000, 997)]

    def queue(step: int) -> list[WaitingTask]:
        rows = []
        for i, (gpus, seconds, least) in enumerate(sizes):
            choice = Choice(gpus, Duration.certain(seconds), memory_bytes=-(-least // step) * step)
            rows.append(WaitingTask(f"t{i:03}", "ada", (choice,), -float(i)))
        return rows

    each, rounded = (Snapshot(0.0, nodes, queue(step), objective=Objective(patience=1.0)) for step in (1, 40_000))
    assert tuple(plan(each).placements) == tuple(plan(rounded).placements)


def test_tenants_of_the_past_do_not_weigh_in() -> None:
    # Turns between equals, and shares of the whole, must not depend on whom a memory met before, or in which order.
    memory = Memory()
    tenants = [Tenant("ada", usage_gpu_s=50.0), Tenant("bo", usage_gpu_s=100.0)]
    earlier = [task("z", tenant="zoe"), task("a", tenant="ada"), task("b", tenant="bo")]
    plan(Snapshot(0.0, [NODE], earlier), memory=memory)
    queue = [task(f"t{i}", 8, 10.0, tenant=name) for i, name in enumerate(("bo", "ada", "bo", "ada"))]
    for rows in ([], tenants):
        snapshot = Snapshot(0.0, [NODE], queue, tenants=rows)
        assert tuple(plan(snapshot, memory=memory).placements) == tuple(plan(snapshot).placements)
        read = alto_planner.Reader()
        read.read(Snapshot(0.0, [NODE], earlier))
        with_past = alto_planner.solve(read.read(snapshot), 0.0, 0)
        assert with_past.value == alto_planner.solve(alto_planner.Reader().read(snapshot), 0.0, 0).value


def test_nobody_is_preempted_for_a_task_that_could_not_start_then() -> None:
    node = Node("n0", "h100", 2)
    urgent = task("urgent", seconds=3600.0, priority=5, tenant="ada")
    own = running("own", "n0", range(1), 9000.0, tenant="ada", priority=5, checkpoint_within_s=30.0)
    victim = running("victim", "n0", range(1, 2), 9000.0, tenant="bob", checkpoint_within_s=30.0)
    other = running("other", "n0", range(1), 9000.0, tenant="bob", checkpoint_within_s=30.0)
    at_quota = [Tenant("ada", quota_gpus=1), Tenant("bob")]
    assert not plan(Snapshot(1000.0, [node], [urgent], [own, victim], tenants=at_quota)).preemptions
    reserved = [Reservation("r", Part("n0", (0, 1)), 1600.0, 5000.0)]
    assert not plan(Snapshot(1000.0, [node], [urgent], [other, victim], reservations=reserved)).preemptions
    assert len(plan(Snapshot(1000.0, [node], [urgent], [other, victim])).preemptions) == 1


def test_no_more_is_reclaimed_than_was_lent() -> None:
    tenants = [Tenant("ada", quota_gpus=2, cohort="lab"), Tenant("bob", quota_gpus=2, cohort="lab")]
    held = [
        running(f"a{gpu}", "n0", range(gpu, gpu + 1), 9000.0, tenant="ada", checkpoint_within_s=30.0)
        for gpu in range(4)
    ]
    waiting = [task(f"b{i}", seconds=3600.0, tenant="bob") for i in range(3)]
    answer = plan(Snapshot(1000.0, [Node("n0", "h100", 4)], waiting, held, tenants=tenants))
    assert len(answer.preemptions) == 2
