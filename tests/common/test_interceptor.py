"""What stands around every call, over a real server and real sockets."""

from contextlib import asynccontextmanager

import grpc
import pytest
from alto.v1 import admission_service_pb2, placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from alto_common.errors import DomainError, not_found
from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import Scope, ServiceTokenAuthenticator
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_common.rpc.interceptor import MAX_MESSAGE_BYTES, validate
from alto_common.rpc.server import Server
from alto_common.rpc.status import reason_in
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

SERVICE = "alto.v1.PlacementService"
ALLOWED = {f"/{SERVICE}/{name}": Scope.SERVICE for name in ("DequeueTask", "GetPlan", "WatchPlan", "NodeSession")}


class Placement(placement_service_pb2_grpc.PlacementServiceServicer):
    async def DequeueTask(self, request, context):
        raise not_found("task", request.task_id)

    async def GetPlan(self, request, context):
        raise RuntimeError("secret of the server")

    async def WatchPlan(self, request, context):
        yield placement_service_pb2.WatchPlanResponse(plan=placement_pb2.Plan(revision=1))
        raise not_found("plan", "2")

    async def NodeSession(self, requests, context):
        async for _ in requests:
            yield placement_service_pb2.NodeSessionResponse()

    async def ListNodes(self, request, context):
        return placement_service_pb2.ListNodesResponse()


class Wordy(placement_service_pb2_grpc.PlacementServiceServicer):
    """Its responses are a little too large."""

    plan = placement_pb2.Plan(tasks=[placement_pb2.PlannedTask(task_id="t" * MAX_MESSAGE_BYTES)])

    async def GetPlan(self, request, context):
        return placement_service_pb2.GetPlanResponse(plan=self.plan)

    async def WatchPlan(self, request, context):
        yield placement_service_pb2.WatchPlanResponse(plan=self.plan)


@asynccontextmanager
async def serving(servicer, monitoring=None):
    server = Server("127.0.0.1:0", ServiceTokenAuthenticator("right"), ALLOWED, [SERVICE], monitoring=monitoring)
    placement_service_pb2_grpc.add_PlacementServiceServicer_to_server(servicer, server.grpc)
    await server.start()
    try:
        async with service_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel
    finally:
        await server.stop(0)


@pytest.fixture
async def channel():
    async with serving(Placement()) as channel:
        yield channel


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def stub_of(channel):
    return placement_service_pb2_grpc.PlacementServiceStub(channel)


@pytest.mark.parametrize("metadata", [(), bearer_metadata("wrong"), (("authorization", "right"),)])
async def test_a_call_without_the_right_credential_is_refused(channel, metadata):
    request = placement_service_pb2.DequeueTaskRequest(task_id="t")
    error = await failure(stub_of(channel).DequeueTask(request, metadata=metadata))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID")


async def test_a_method_that_no_table_names_is_denied(channel):
    request = placement_service_pb2.ListNodesRequest()
    error = await failure(stub_of(channel).ListNodes(request, metadata=bearer_metadata("right")))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_a_broken_rule_names_its_field(channel):
    request = placement_service_pb2.DequeueTaskRequest(task_id="")
    error = await failure(stub_of(channel).DequeueTask(request, metadata=bearer_metadata("right")))
    assert reason_in(error) == "INVALID_FIELD"
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in rpc_status.from_call(error).details)
    assert bad_request.field_violations[0].field == "task_id"


async def test_a_request_that_cannot_be_read_is_refused_once_the_caller_is_known(channel):
    call = channel.unary_unary(f"/{SERVICE}/DequeueTask")
    error = await failure(call(b"\x0a\x02\xff\xfe", metadata=bearer_metadata("wrong")))
    assert reason_in(error) == "CREDENTIAL_INVALID"
    error = await failure(call(b"\x0a\x02\xff\xfe", metadata=bearer_metadata("right")))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "UTF-8" in error.details()


async def test_a_request_that_is_too_large_hears_how_large_one_may_be(channel):
    request = placement_service_pb2.DequeueTaskRequest(task_id="t" * 4 * 1024 * 1024)
    error = await failure(stub_of(channel).DequeueTask(request, metadata=bearer_metadata("wrong")))
    assert reason_in(error) == "CREDENTIAL_INVALID"
    error = await failure(stub_of(channel).DequeueTask(request, metadata=bearer_metadata("right")))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "request = '4,194,309 bytes': send at most 4,194,304 bytes in one message" in error.details()


def test_a_large_request_is_refused_at_its_first_broken_rule():
    request = admission_service_pb2.ListTuningTasksRequest(states=[99] * 200_000)
    with pytest.raises(DomainError) as caught:
        validate(request)
    assert [violation.field for violation in caught.value.violations] == ["states"]


async def test_a_domain_error_becomes_its_status(channel):
    request = placement_service_pb2.DequeueTaskRequest(task_id="t1")
    error = await failure(stub_of(channel).DequeueTask(request, metadata=bearer_metadata("right")))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


async def test_a_bug_is_internal_and_tells_no_secret(channel):
    request = placement_service_pb2.GetPlanRequest()
    error = await failure(stub_of(channel).GetPlan(request, metadata=bearer_metadata("right")))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in error.details()


async def test_a_stream_ends_with_the_status_of_its_error(channel):
    call = stub_of(channel).WatchPlan(placement_service_pb2.WatchPlanRequest(), metadata=bearer_metadata("right"))
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in call:
            received.append(response.plan.revision)
    assert received == [1]
    assert reason_in(caught.value) == "RESOURCE_NOT_FOUND"


async def test_every_message_of_a_stream_is_validated(channel):
    call = stub_of(channel).NodeSession(metadata=bearer_metadata("right"))
    beat = placement_service_pb2.NodeHeartbeat()
    await call.write(placement_service_pb2.NodeSessionRequest(node_id="n", heartbeat=beat))
    assert await call.read() == placement_service_pb2.NodeSessionResponse()
    await call.write(placement_service_pb2.NodeSessionRequest(node_id="", heartbeat=beat))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
        await call
    assert reason_in(caught.value) == "INVALID_FIELD"


async def test_a_response_that_is_too_large_is_an_error_of_ours_and_counted_as_one():
    monitoring = Monitoring()
    async with serving(Wordy(), monitoring) as channel:
        metadata = bearer_metadata("right")
        plan = stub_of(channel).GetPlan(placement_service_pb2.GetPlanRequest(), metadata=metadata)
        watch = stub_of(channel).WatchPlan(placement_service_pb2.WatchPlanRequest(), metadata=metadata)
        for error in (await failure(plan), await failure(anext(aiter(watch)))):
            assert (error.code(), reason_in(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    for method in ("GetPlan", "WatchPlan"):
        labels = {"method": method, "code": "INTERNAL"}
        assert monitoring.registry.get_sample_value("alto_calls_total", labels) == 1


async def test_health_needs_no_credential_and_begins_not_serving(channel):
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    response = await health_pb2_grpc.HealthStub(channel).Check(request)
    assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
