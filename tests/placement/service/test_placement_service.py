"""PlacementService over a real socket: what callers see, and the conversation with a node."""

import asyncio
import threading
import time

import grpc
import pytest
from alto.v1 import event_pb2, placement_pb2, placement_service_pb2, placement_service_pb2_grpc, tuning_pb2
from alto_admission.placement_client import PlacementClient
from alto_client import OperatorClient
from alto_common.rpc.authentication import Scope
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_common.rpc.interceptor import MAX_MESSAGE_BYTES
from alto_common.rpc.status import reason_in
from alto_placement import engine, servicer
from alto_placement.policy import ObjectiveWeights, TenantShare
from alto_placement.server import PlacementServer
from alto_placement.servicer import SCOPES
from alto_placement.wire import plan_parts
from grpc_health.v1 import health_pb2, health_pb2_grpc

METADATA = bearer_metadata("secret")
wire = placement_service_pb2


# For tests of what silence does: nodes here heartbeat when a test has them do it, and else are never lost.
SHORT_LEASE = pytest.mark.parametrize("lease_s", [0.8])


def work(task_id="task"):
    return placement_pb2.TuningWork(task_id=task_id, base_model="tiny", artifact_folder=f"tasks/{task_id}")


async def enqueue(stub, task_id="task", gpus=1, **fields):
    request = wire.EnqueueTaskRequest(
        tenant="acme", work=work(task_id), resources=tuning_pb2.Resources(gpus=gpus), **fields
    )
    return (await stub.EnqueueTask(request, metadata=METADATA, timeout=10)).task


class TestNode:
    """A node that says what a test tells it to."""

    __test__ = False

    def __init__(self, stub, node_id="node-a", incarnation="start-1", gpus=1):
        self.stub, self.node_id, self.incarnation, self.gpus = stub, node_id, incarnation, gpus
        self.up = asyncio.Queue()
        self.call = None

    async def register(self):
        node = placement_pb2.Node(node_id=self.node_id, gpu_kind="cpu", gpus=self.gpus)
        request = wire.RegisterNodeRequest(node=node, incarnation=self.incarnation)
        return await self.stub.RegisterNode(request, metadata=METADATA, timeout=10)

    async def connect(self, *listed):
        await self.register()
        self.call = self.stub.NodeSession(self._requests(), metadata=METADATA)
        self.heartbeat(*listed)
        return self

    async def _requests(self):
        while True:
            yield await self.up.get()

    def heartbeat(self, *listed, leaving=False):
        statuses = [
            wire.AssignmentStatus(assignment_id=a.assignment_id, task_id=a.work.task_id, epoch=a.epoch) for a in listed
        ]
        self.up.put_nowait(
            wire.NodeSessionRequest(
                node_id=self.node_id,
                incarnation=self.incarnation,
                heartbeat=wire.NodeHeartbeat(assignments=statuses, leaving=leaving),
            )
        )

    def ended(self, assignment, outcome, message=""):
        cause = tuning_pb2.Failure(reason="EXECUTION_FAILED", message=message) if message else None
        notice = wire.AssignmentEnded(
            assignment_id=assignment.assignment_id, epoch=assignment.epoch, outcome=outcome, failure=cause
        )
        self.up.put_nowait(
            wire.NodeSessionRequest(node_id=self.node_id, incarnation=self.incarnation, assignment_ended=notice)
        )

    async def hears(self, kind):
        """The next message of a kind, passing over others."""
        while True:
            message = await asyncio.wait_for(self.call.read(), 10)
            assert message is not grpc.aio.EOF
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)


async def plan_of(stub):
    return (await stub.GetPlan(wire.GetPlanRequest(), metadata=METADATA, timeout=10)).plan


async def watched(stub, condition):
    """The first plan of a watch that meets a condition."""
    async with asyncio.timeout(10):
        async for response in stub.WatchPlan(wire.WatchPlanRequest(), metadata=METADATA):
            if condition(response.plan):
                return response.plan


def state_of(plan, task_id="task"):
    return next((task.state for task in plan.tasks if task.task_id == task_id), None)


async def test_every_method_has_a_scope():
    service = wire.DESCRIPTOR.services_by_name["PlacementService"]
    assert set(SCOPES) == {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert set(SCOPES.values()) == {Scope.SERVICE}


async def test_a_wrong_token_is_refused(stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetPlan(wire.GetPlanRequest(), metadata=bearer_metadata("guess"), timeout=10)
    assert reason_in(caught.value) == "CREDENTIAL_INVALID"


async def test_health_says_serving(placement):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{placement.server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(100):
            answer = await health.Check(health_pb2.HealthCheckRequest(service="alto.v1.PlacementService"), timeout=5)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(0.05)
        pytest.fail("never SERVING")


async def test_the_same_task_again_changes_nothing(stub):
    first = await enqueue(stub, priority=5)
    again = await enqueue(stub, priority=9)
    assert (first.task_id, first.state) == ("task", placement_pb2.PLACEMENT_STATE_WAITING)
    assert len((await plan_of(stub)).tasks) == 1
    assert again.state == placement_pb2.PLACEMENT_STATE_WAITING
    assert again.queue.reason == "NO_NODE_READY"


@SHORT_LEASE
async def test_a_task_that_no_node_can_ever_hold_is_refused(lease_s, stub):
    await TestNode(stub, gpus=2).register()
    await asyncio.sleep(lease_s)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await enqueue(stub, gpus=3)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_in(caught.value) == "TASK_UNPLACEABLE"
    with pytest.raises(grpc.aio.AioRpcError):
        request = wire.EstimateTaskRequest(base_model="tiny", resources=tuning_pb2.Resources(gpus=3))
        await stub.EstimateTask(request, metadata=METADATA, timeout=10)


async def test_nothing_is_refused_while_nodes_are_still_joining(stub):
    await TestNode(stub, gpus=2).register()
    assert (await enqueue(stub, gpus=3)).state == placement_pb2.PLACEMENT_STATE_WAITING
    await watched(stub, lambda plan: queue_of(plan, "task").reason == "NEVER_FITS")
    wider = await TestNode(stub, "node-b", gpus=4).connect()
    assert (await wider.hears("assignment")).work.task_id == "task"
    wider.call.cancel()


async def test_an_estimate_says_what_it_rests_on(stub):
    size = wire.WorkSize(train_tokens=1_000_000, base_parameters=135_000_000, expected_share=0.5)
    answer = await stub.EstimateTask(
        wire.EstimateTaskRequest(base_model="tiny", size=size), metadata=METADATA, timeout=10
    )
    assert 0 < answer.duration.expected.ToSeconds() < answer.duration.upper.ToSeconds()
    assert "measured" in answer.basis
    assert answer.gpu_kind == ""  # no node is known yet


async def test_an_estimate_says_which_kind_it_is_for(stub):
    await TestNode(stub).register()
    size = wire.WorkSize(train_tokens=1_000_000, base_parameters=135_000_000, expected_share=0.5)
    request = wire.EstimateTaskRequest(base_model="tiny", size=size)
    answer = await stub.EstimateTask(request, metadata=METADATA, timeout=10)
    plan = await plan_of(stub)
    assert answer.gpu_kind == plan.nodes[0].gpu_kind != ""


async def test_an_assignment_is_repeated_until_it_is_listed_and_over_when_told_so(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    first = await node.hears("assignment")
    assert (list(first.gpu_indices), first.work) == ([0], work())
    node.heartbeat()
    assert await node.hears("assignment") == first
    node.heartbeat(first)
    await node.hears("lease_renewed")
    assert state_of(await plan_of(stub)) == placement_pb2.PLACEMENT_STATE_ASSIGNED
    node.ended(first, placement_pb2.ASSIGNMENT_OUTCOME_COMPLETED)
    plan = await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_FINISHED)
    assert plan.nodes[0].gpus_in_use == 0
    assert state_of(await plan_of(stub)) is None
    assert (await enqueue(stub)).state == placement_pb2.PLACEMENT_STATE_FINISHED


@SHORT_LEASE
async def test_a_silent_node_is_lost_and_told_so_when_it_comes_back(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    first = await node.hears("assignment")
    lost = await watched(stub, lambda plan: plan.nodes[0].state == placement_pb2.NODE_STATE_LOST)
    assert state_of(lost) == placement_pb2.PLACEMENT_STATE_WAITING
    node.heartbeat(first)
    stop = await node.hears("assignment_stop")
    assert (stop.assignment_id, stop.reason) == (first.assignment_id, placement_pb2.STOP_REASON_SUPERSEDED)
    node.heartbeat()
    assert (await node.hears("assignment")).epoch == first.epoch + 1


async def test_a_restarted_node_gets_its_task_again_under_a_higher_epoch(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    first = await node.hears("assignment")
    restarted = await TestNode(stub, incarnation="start-2").connect()
    assert (await restarted.hears("assignment")).epoch == first.epoch + 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.register()
    assert reason_in(caught.value) == "STATE_CONFLICT"


async def test_a_task_that_keeps_failing_is_given_up_with_the_reason(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    epochs = []
    for attempt in (1, 2, 3):
        assignment = await node.hears("assignment")
        epochs.append(assignment.epoch)
        node.heartbeat(assignment)
        node.ended(assignment, placement_pb2.ASSIGNMENT_OUTCOME_FAILED_RETRIABLE, f"crash {attempt}")
        node.heartbeat()
    plan = await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_GIVEN_UP)
    task = plan.tasks[0]
    sentence = "given up after 3 attempts in a row that came no further, the last on node-a: crash 3"
    assert (task.failure.message, task.attempts) == (sentence, 3)
    assert epochs == [epochs[0], epochs[0] + 1, epochs[0] + 2]
    # A watcher that connects later hears of it too.
    await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_GIVEN_UP)


async def test_a_task_with_which_its_node_dies_again_and_again_is_given_up(stub):
    await enqueue(stub)
    for start in (1, 2, 3, 4):
        node = await TestNode(stub, incarnation=f"start-{start}").connect()
        if start < 4:
            assignment = await node.hears("assignment")
            # One answer may still be that to the first heartbeat: with the second this one has been heard.
            for _ in range(2):
                node.heartbeat(assignment)
                await node.hears("lease_renewed")
    plan = await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_GIVEN_UP)
    assert (plan.tasks[0].failure.reason, plan.tasks[0].attempts) == ("EXECUTION_FAILED", 3)
    assert plan.tasks[0].failure.message == (
        "given up after 3 attempts in a row that came no further, the last on node-a: "
        "its node was lost while it trained the task"
    )
    node.call.cancel()


async def test_pausing_stops_holds_and_lets_go(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    node.heartbeat(assignment)
    held = await stub.UpdateTask(wire.UpdateTaskRequest(task_id="task", held=True), metadata=METADATA, timeout=10)
    assert held.task.state == placement_pb2.PLACEMENT_STATE_STOPPING
    assert (await node.hears("assignment_stop")).reason == placement_pb2.STOP_REASON_PAUSED
    node.ended(assignment, placement_pb2.ASSIGNMENT_OUTCOME_STOPPED)
    node.heartbeat()
    await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_HELD)
    await stub.UpdateTask(wire.UpdateTaskRequest(task_id="task", held=False), metadata=METADATA, timeout=10)
    assert (await node.hears("assignment")).epoch == assignment.epoch + 1


async def test_trials_are_stopped_on_the_node_and_in_later_assignments(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    node.heartbeat(assignment)
    update = wire.UpdateTaskRequest(task_id="task", stop_trial_ids=["trial-1"])
    await stub.UpdateTask(update, metadata=METADATA, timeout=10)
    assert list((await node.hears("trials_stop")).trial_ids) == ["trial-1"]
    restarted = await TestNode(stub, incarnation="start-2").connect()
    assert list((await restarted.hears("assignment")).stopped_trial_ids) == ["trial-1"]


async def test_a_drained_node_gives_back_what_it_has_and_takes_no_more(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    node.heartbeat(assignment)
    await stub.DrainNode(wire.DrainNodeRequest(node_id="node-a"), metadata=METADATA, timeout=10)
    assert (await node.hears("assignment_stop")).reason == placement_pb2.STOP_REASON_DRAINED
    node.ended(assignment, placement_pb2.ASSIGNMENT_OUTCOME_STOPPED)
    node.heartbeat()
    plan = await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_WAITING)
    assert plan.nodes[0].state == placement_pb2.NODE_STATE_DRAINING
    other = await TestNode(stub, "node-b").connect()
    assert (await other.hears("assignment")).epoch == assignment.epoch + 1


async def test_a_node_that_is_leaving_gives_back_what_it_has_and_what_it_has_not_begun(stub):
    node = await TestNode(stub, gpus=2).connect()
    await enqueue(stub)
    begun = await node.hears("assignment")
    node.heartbeat(begun)
    await enqueue(stub, "given")
    await node.hears("assignment")
    node.heartbeat(begun, leaving=True)
    assert (await node.hears("assignment_stop")).reason == placement_pb2.STOP_REASON_DRAINED
    plan = await watched(stub, lambda plan: plan.nodes[0].state == placement_pb2.NODE_STATE_LEAVING)
    assert state_of(plan) == placement_pb2.PLACEMENT_STATE_STOPPING
    await watched(stub, lambda plan: "node-a is being stopped" in queue_of(plan, "given").explanation)
    other = await TestNode(stub, "node-b").connect()
    assert (await other.hears("assignment")).work.task_id == "given"
    node.ended(begun, placement_pb2.ASSIGNMENT_OUTCOME_STOPPED)
    node.heartbeat(leaving=True)
    plan = await watched(stub, lambda plan: plan.nodes[0].state == placement_pb2.NODE_STATE_LEFT)
    assert plan.nodes[0].gpus_in_use == 0
    # The same process may have been cut off meanwhile; another one takes work again.
    node = await TestNode(stub, incarnation="start-2").connect()
    assert (await node.hears("assignment")).work.task_id == "task"
    node.call.cancel()
    other.call.cancel()


async def test_cancelling_reaches_the_node_and_a_waiting_task_ends_at_once(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    node.heartbeat(assignment)
    await enqueue(stub, "other")
    for task_id in ("task", "other", "unknown"):
        await stub.DequeueTask(wire.DequeueTaskRequest(task_id=task_id), metadata=METADATA, timeout=10)
    assert (await node.hears("assignment_stop")).reason == placement_pb2.STOP_REASON_CANCELLED
    plan = await plan_of(stub)
    assert state_of(plan) == placement_pb2.PLACEMENT_STATE_STOPPING
    assert state_of(plan, "other") is None


async def test_a_restarted_placement_knows_everything_and_gives_nothing_away_twice(settings, stub, placement):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    node.heartbeat(assignment)
    await node.hears("lease_renewed")
    await placement.stop()
    again = PlacementServer(settings)
    await again.start()
    try:
        async with service_channel(f"127.0.0.1:{again.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            node = await TestNode(stub).connect(assignment)
            await node.hears("lease_renewed")
            plan = await plan_of(stub)
            assert plan.tasks[0].epoch == assignment.epoch
            assert state_of(plan) == placement_pb2.PLACEMENT_STATE_ASSIGNED
            node.ended(assignment, placement_pb2.ASSIGNMENT_OUTCOME_COMPLETED)
            await watched(stub, lambda plan: state_of(plan) == placement_pb2.PLACEMENT_STATE_FINISHED)
            node.call.cancel()
    finally:
        await again.stop()


async def test_a_placement_that_lost_its_database_gives_out_no_old_epoch(settings, stub, placement, tmp_path):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    assignment = await node.hears("assignment")
    await placement.stop()
    await asyncio.sleep(1.1)
    empty = settings.model_copy(update={"database_url": f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"})
    again = PlacementServer(empty)
    await again.start()
    try:
        async with service_channel(f"127.0.0.1:{again.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            node = await TestNode(stub).connect(assignment)
            assert (await node.hears("assignment_stop")).reason == placement_pb2.STOP_REASON_SUPERSEDED
            await enqueue(stub)
            assert (await node.hears("assignment")).epoch > assignment.epoch
            node.call.cancel()
    finally:
        await again.stop()


def status_of(assignment, ticks, seconds_a_tick, fraction_done, steps_left):
    measured = event_pb2.MeasuredWork(
        ticks=ticks,
        train_tokens=1000 * ticks,
        lora_rank_ticks=8 * ticks,
        training_seconds=seconds_a_tick * ticks,
        share_trained=fraction_done,
        longest_steps_left=steps_left,
    )
    return wire.AssignmentStatus(
        assignment_id=assignment.assignment_id,
        task_id=assignment.work.task_id,
        epoch=assignment.epoch,
        fraction_done=fraction_done,
        measured=measured,
    )


def heard(node, assignment, *figures):
    heartbeat = wire.NodeHeartbeat(assignments=[status_of(assignment, *figures)])
    node.up.put_nowait(wire.NodeSessionRequest(node_id=node.node_id, incarnation=node.incarnation, heartbeat=heartbeat))


SIZE = wire.WorkSize(
    train_tokens=1_000_000, steps=1000, longest_steps=1000, trials=1, total_lora_rank=8, expected_share=1, shape="none"
)


def left_s(plan, task_id="task"):
    task = next(task for task in plan.tasks if task.task_id == task_id)
    return (task.forecast.end_time.ToDatetime() - plan.time.ToDatetime()).total_seconds()


@pytest.fixture
def settings_without_refresh(settings):
    """So that only events make plans."""
    return settings.model_copy(update={"refresh_s": 3600.0})


async def test_a_new_estimate_and_an_early_exit_make_new_plans(settings_without_refresh):
    placement = PlacementServer(settings_without_refresh)
    await placement.start()
    try:
        async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            node = await TestNode(stub).connect()
            await enqueue(stub, size=SIZE)
            assignment = await node.hears("assignment")
            await enqueue(stub, "next", size=SIZE)
            # A second a tick, 900 ticks left.
            heard(node, assignment, 100, 1.0, 0.1, 900)
            plan = await watched(stub, lambda plan: 700 < left_s(plan) < 1100 and state_of(plan, "next"))
            queue = next(task for task in plan.tasks if task.task_id == "next").queue
            assert queue.predicted_start_time.ToDatetime() >= plan.tasks[0].forecast.end_time.ToDatetime()
            # Its trials have exited but for a tenth of the work: the end is near, and the next one's start.
            heard(node, assignment, 150, 1.0, 0.9, 100)
            await watched(stub, lambda plan: left_s(plan) < 200 and left_s(plan, "next") < 1500)
            node.call.cancel()
    finally:
        await placement.stop()


async def test_what_was_learned_survives_a_restart(settings, stub, placement):
    node = await TestNode(stub).connect()
    await enqueue(stub, size=SIZE)
    assignment = await node.hears("assignment")
    request = wire.EstimateTaskRequest(tenant="acme", base_model="tiny", size=SIZE)
    assert "never measured" in (await stub.EstimateTask(request, metadata=METADATA, timeout=10)).basis
    for ticks in (50, 100, 200):
        heard(node, assignment, ticks, 0.5, ticks / 1000, 1000 - ticks)
        await node.hears("lease_renewed")
    before = await stub.EstimateTask(request, metadata=METADATA, timeout=10)
    assert "measured for tiny" in before.basis
    assert 400 < before.duration.expected.ToSeconds() < 600
    await placement.stop()
    again = PlacementServer(settings)
    await again.start()
    try:
        async with service_channel(f"127.0.0.1:{again.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            assert await stub.EstimateTask(request, metadata=METADATA, timeout=10) == before
    finally:
        await again.stop()


async def test_early_exits_are_learned_from_where_a_task_stood_at_its_end(stub):
    node = await TestNode(stub).connect()
    size = wire.WorkSize()
    size.MergeFrom(SIZE)
    size.shape, size.expected_share = "grid", 0.9
    request = wire.EstimateTaskRequest(tenant="acme", base_model="tiny", size=size)
    for number in range(4):
        await enqueue(stub, f"task-{number}", size=size)
        assignment = await node.hears("assignment")
        # One heartbeat early on; the end says that 0.6 of the work was done when all trials had exited.
        heard(node, assignment, 50, 0.5, 0.05, 950)
        await node.hears("lease_renewed")
        notice = wire.AssignmentEnded(
            assignment_id=assignment.assignment_id,
            epoch=assignment.epoch,
            outcome=placement_pb2.ASSIGNMENT_OUTCOME_COMPLETED,
            status=status_of(assignment, 600, 0.5, 1.0, 0),
        )
        node.up.put_nowait(
            wire.NodeSessionRequest(node_id=node.node_id, incarnation=node.incarnation, assignment_ended=notice)
        )
        node.heartbeat()
        await node.hears("lease_renewed")
    expected = (await stub.EstimateTask(request, metadata=METADATA, timeout=10)).duration.expected.ToSeconds()
    # 500 s in full: 0.9 of them before anything was known, and 0.6 is what was seen, as often as the prior counts.
    assert 0.7 * 500 < expected < 0.85 * 500
    node.call.cancel()


async def test_a_quota_is_told_and_kept(settings):
    limited = settings.model_copy(update={"tenants": {"acme": TenantShare(quota_gpus=1)}})
    placement = PlacementServer(limited)
    await placement.start()
    try:
        async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            node = await TestNode(stub, gpus=2).connect()
            await enqueue(stub)
            node.heartbeat(await node.hears("assignment"))
            await enqueue(stub, "second")
            plan = await watched(stub, lambda plan: queue_of(plan, "second").reason == "QUOTA")
            second = next(task for task in plan.tasks if task.task_id == "second")
            assert second.queue.explanation.startswith("acme holds 1 GPU and may hold 1.")
            assert tuning_pb2.FORECAST_CHANGE_KIND_MORE_QUOTA in [change.kind for change in second.forecast.changes]
            node.call.cancel()
    finally:
        await placement.stop()


async def test_a_wait_is_bounded_by_what_first_come_first_served_would_cause(settings):
    """By its own duration alone the second would be first in line after a thousand times that."""
    patient = settings.model_copy(
        update={"objective": ObjectiveWeights(patience=1000, min_patience_s=0, wait_patience=2)}
    )
    placement = PlacementServer(patient)
    await placement.start()
    try:
        async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
            stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
            node = await TestNode(stub).connect()
            await enqueue(stub)
            node.heartbeat(await node.hears("assignment"))
            await enqueue(stub, "second")

            def bounded_s(plan):
                second = next((task for task in plan.tasks if task.task_id == "second"), None)
                if second is None or not second.forecast.HasField("first_in_line_time"):
                    return 0.0
                return second.forecast.first_in_line_time.ToSeconds() - time.time()

            request = wire.EstimateTaskRequest(tenant="acme", base_model="tiny")
            alone_s = (await stub.EstimateTask(request, metadata=METADATA, timeout=10)).duration.expected.ToSeconds()
            plan = await watched(stub, lambda plan: bounded_s(plan) > 0)
            assert 0.5 * alone_s < bounded_s(plan) < 2.5 * alone_s
            node.call.cancel()
    finally:
        await placement.stop()


def queue_of(plan, task_id):
    return next((task.queue for task in plan.tasks if task.task_id == task_id), tuning_pb2.QueueStatus())


@SHORT_LEASE
async def test_a_lost_kind_of_gpu_is_told_by_its_node(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    await node.hears("assignment")
    plan = await watched(stub, lambda plan: queue_of(plan, "task").reason == "NO_NODE_READY")
    assert "node-a has not been heard of lately" in queue_of(plan, "task").explanation
    node.call.cancel()


async def test_a_node_that_left_long_ago_is_forgotten(settings):
    soon = settings.model_copy(update={"keep_lost_s": 0.3})
    placement = PlacementServer(soon)
    await placement.start()
    async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        node = await TestNode(stub).connect()
        await enqueue(stub)
        node.heartbeat(await node.hears("assignment"))
        node.heartbeat(leaving=True)
        await watched(stub, lambda plan: not plan.nodes)
        node.call.cancel()
    await placement.stop()
    again = PlacementServer(settings)
    await again.start()
    async with service_channel(f"127.0.0.1:{again.server.port}") as channel:
        plan = await plan_of(placement_service_pb2_grpc.PlacementServiceStub(channel))
        assert (list(plan.nodes), [task.task_id for task in plan.tasks]) == ([], ["task"])
    await again.stop()


@SHORT_LEASE
async def test_a_task_whose_node_died_goes_before_newer_and_smaller_ones(stub):
    node = await TestNode(stub).connect()
    await enqueue(stub, "long", size=SIZE)
    assert (await node.hears("assignment")).work.task_id == "long"
    for name in ("small", "smaller"):
        await enqueue(stub, name, size=wire.WorkSize(train_tokens=1000, steps=10, longest_steps=10, trials=1))
    await watched(stub, lambda plan: plan.nodes[0].state == placement_pb2.NODE_STATE_LOST)
    other = await TestNode(stub, "node-b").connect()
    assert (await other.hears("assignment")).work.task_id == "long"
    node.call.cancel()
    other.call.cancel()


async def test_orders_that_leave_long_tasks_waiting_are_thought_over(settings, monkeypatch):
    settings = settings.model_copy(update={"decision_budget_s": 0.6})
    plans = []  # of each snapshot: it, how many tasks its first plan starts, and the budgets of all its plans
    made = engine.planner.plan

    def noted(snapshot, budget_s, memory):
        plan = made(snapshot, budget_s=budget_s, memory=memory)
        if not plans or plans[-1][0] is not snapshot:
            plans.append((snapshot, len(plan.starting), []))
        plans[-1][2].append(budget_s)
        return plan

    monkeypatch.setattr(engine.planner, "plan", noted)
    size = wire.WorkSize(train_tokens=2_000_000_000, base_parameters=8_000_000_000, trials=1)
    placement = PlacementServer(settings)
    await placement.start()
    async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        for index, gpus in enumerate((3, 3, 5, 2)):
            await enqueue(stub, f"task-{index}", gpus=gpus, size=size)
        node = await TestNode(stub, gpus=8).connect()
        await node.hears("assignment")
        node.call.cancel()
    await placement.stop()
    thought_over = [budgets for snapshot, starting, budgets in plans if 0 < starting < len(snapshot.waiting)]
    assert [0.05, 0.6] in thought_over
    for snapshot, starting, budgets in plans:
        if starting in (0, len(snapshot.waiting)):
            assert budgets == [0.05]


async def test_the_message_of_a_plan_is_made_beside_the_loop_from_one_moment(stub, monkeypatch):
    await enqueue(stub)
    made, began, go_on = servicer.plan_to_wire, threading.Event(), threading.Event()

    def slowly(view):
        began.set()
        assert go_on.wait(10)
        return made(view)

    monkeypatch.setattr(servicer, "plan_to_wire", slowly)
    asked = asyncio.create_task(plan_of(stub))
    assert await asyncio.to_thread(began.wait, 10)
    await enqueue(stub, "another")  # answered while the message is being made
    go_on.set()
    assert [task.task_id for task in (await asked).tasks] == ["task"]


async def test_a_plan_that_no_message_holds_comes_in_several(placement, stub, monkeypatch):
    monkeypatch.setattr(servicer, "PART_BYTES", 200)
    names = [f"task-{index}" for index in range(9)]
    for name in (*names, "ended"):
        await enqueue(stub, name)
    await stub.DequeueTask(wire.DequeueTaskRequest(task_id="ended"), metadata=METADATA, timeout=10)
    parts = []
    async with asyncio.timeout(10):
        async for response in stub.WatchPlan(wire.WatchPlanRequest(), metadata=METADATA):
            parts.append(response)
            if not response.continues:
                break
    assert len(parts) > 2
    assert {part.plan.revision for part in parts} == {parts[0].plan.revision}
    assert [task.task_id for part in parts for task in part.plan.tasks] == [*names, "ended"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plan_of(stub)
    assert reason_in(caught.value) == "STATE_CONFLICT"
    assert "9 tasks" in caught.value.details()
    address = f"127.0.0.1:{placement.server.port}"

    def operators():
        with OperatorClient(address, "secret") as client:
            return client.plan()

    admissions = PlacementClient(address, "secret")
    for plan, listed in (
        (await asyncio.to_thread(operators), names),
        (await anext(admissions.plans()), [*names, "ended"]),
    ):
        assert [task.task_id for task in plan.tasks] == listed
        assert plan.HasField("makespan")
    await admissions.close()


def test_every_part_of_a_long_plan_fits_a_message():
    queue = {"reason": "GPUS_BUSY", "explanation": "Every place that could hold it is in use. " * 4}
    tasks = [placement_pb2.PlannedTask(task_id=f"task-{index:05}", tenant="a", queue=queue) for index in range(30_000)]
    nodes = [placement_pb2.Node(node_id=f"node-{index}", gpu_kind="h100", gpus=8) for index in range(2_000)]
    times = {"time": {"seconds": 9}, "makespan": {"seconds": 60}, "makespan_lower_bound": {"seconds": 50}}
    plan = placement_pb2.Plan(revision=7, tasks=tasks, nodes=nodes, **times)
    assert plan.ByteSize() > MAX_MESSAGE_BYTES
    merged = placement_pb2.Plan()
    for part in plan_parts(plan, servicer.PART_BYTES):
        assert wire.WatchPlanResponse(plan=part, continues=True).ByteSize() < MAX_MESSAGE_BYTES
        merged.MergeFrom(part)
    assert merged == plan
    assert list(plan_parts(plan, plan.ByteSize())) == [plan]


async def test_the_last_good_plan_stays_when_none_can_be_made(settings, placement, stub, monkeypatch):
    node = await TestNode(stub).connect()
    await enqueue(stub)
    node.heartbeat(await node.hears("assignment"))
    await watched(stub, lambda plan: plan.tasks and plan.tasks[0].HasField("forecast"))

    def broken(*arguments, **options):
        raise engine.planner.SnapshotError("task", "contradicts itself")

    monkeypatch.setattr(engine.planner, "plan", broken)
    node.heartbeat()
    await enqueue(stub, "another")
    async with asyncio.timeout(10):
        while placement.engine.is_alive:
            await asyncio.sleep(0.02)
    good = await plan_of(stub)
    assert good.tasks[0].HasField("forecast")
    assert queue_of(good, "another").reason == "PLANNING"
    await asyncio.sleep(2 * settings.refresh_s)
    assert (await plan_of(stub)).tasks[0].forecast == good.tasks[0].forecast
    monkeypatch.undo()
    await watched(stub, lambda plan: queue_of(plan, "another").reason == "GPUS_BUSY")
    assert placement.engine.is_alive
    node.call.cancel()
