"""The contract as a whole: each reason, and no request that ends in INTERNAL or UNKNOWN."""

import asyncio
import random

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import error_pb2, report_service_pb2
from alto_common.errors import reason_name
from alto_common.rpc.channel import bearer_metadata
from alto_common.rpc.status import CODES, reason_in
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .conftest import SERVICE_TOKEN
from .reporting import numbered, progressed, started

PUBLIC = messages.DESCRIPTOR.services_by_name["AdmissionService"].methods
REQUESTS_A_METHOD = 25
# Where each reason is provoked here, through the wire; the others belong to other services or to Failure alone.
PROVOKED = {
    "CREDENTIAL_INVALID": "test_access",
    "PERMISSION_DENIED": "test_access",
    "INVALID_FIELD": "test_tasks",
    "UNKNOWN_BASE_MODEL": "test_tasks",
    "DATASET_MALFORMED": "test_uploads",
    "DATASET_TOO_LARGE": "test_uploads",
    "SEARCH_SPACE_INVALID": "test_tasks",
    "CONFIGURATION_UNFIT": "test_tasks",
    "RESOURCE_NOT_FOUND": "test_access",
    "REQUEST_ID_REUSED": "test_tasks",
    "STATE_CONFLICT": "test_tasks",
    "ETAG_MISMATCH": "test_tasks",
    "PAGE_TOKEN_INVALID": "test_tasks",
    "RESUME_TOKEN_INVALID": "test_contract",
    "RESUME_TOKEN_TOO_OLD": "test_watch",
    "CONTENT_MISMATCH": "test_uploads",
    "OFFSET_MISMATCH": "test_uploads",
    "DATASET_IN_USE": "test_uploads",
    "QUOTA_EXCEEDED": "test_tasks",
    "EPOCH_STALE": "test_contract",
    "TASK_UNPLACEABLE": "test_placement_link",
    "UNAVAILABLE": "test_watch",
    "EXECUTION_FAILED": "test_placement_link",
}
ELSEWHERE = {"NON_FINITE": "nodes put it into Failure", "INTERNAL": "a bug; tests/common provokes one"}


def test_each_reason_is_mapped_and_provoked(request):
    names = {reason_name(value) for value in error_pb2.ErrorReason.values()} - {"UNSPECIFIED"}
    assert {reason_name(reason) for reason in CODES} == names
    assert set(PROVOKED) | set(ELSEWHERE) == names
    for reason, module in PROVOKED.items():
        source = (request.path.parent / f"{module}.py").read_text()
        assert f'"{reason}"' in source, f"{module} does not provoke {reason}"


async def test_another_tasks_resume_token(admission):
    client = await admission.client()
    one = await client.create()
    other = await client.create(one.spec.dataset_id)
    first = client.stream("WatchTuningTask", messages.WatchTuningTaskRequest(task_id=one.task_id))
    token = (await first.read()).resume_token
    first.cancel()
    for wrong in (token, "x"):
        request = messages.WatchTuningTaskRequest(task_id=other.task_id, resume_token=wrong)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stream("WatchTuningTask", request).read()
        assert (caught.value.code(), reason_in(caught.value)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "RESUME_TOKEN_INVALID",
        )


async def test_reports_are_fenced_and_idempotent(admission):
    client = await admission.client()
    task = await client.create()
    events = [started(), progressed(0.1), progressed(0.2)]
    assert await admission.report(numbered(task.task_id, 2, events)) == 3
    assert await admission.report(numbered(task.task_id, 2, events)) == 3
    assert await admission.report(numbered(task.task_id, 2, [progressed(0.3)], first=4)) == 4

    async def reason(requests):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admission.report(requests)
        return caught.value.code(), reason_in(caught.value)

    invalid = grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"
    assert await reason(numbered(task.task_id, 1, events)) == (grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_STALE")
    assert await reason(numbered("gone", 1, events)) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert await reason(numbered(task.task_id, 2, events, first=9)) == invalid
    assert await reason([*numbered(task.task_id, 3, events), *numbered("other", 3, events)]) == invalid
    assert await reason(numbered(task.task_id, 2**64 - 1, events)) == invalid
    assert await admission.report([]) == 0


async def test_a_stream_that_stays_open_is_kept_as_it_comes(admission):
    client = await admission.client()
    task = await client.create()
    call = admission.reports.ReportEvents(metadata=bearer_metadata(SERVICE_TOKEN))
    for request in numbered(task.task_id, 1, [started(), progressed(0.5)]):
        await call.write(request)
    async with asyncio.timeout(10):
        while (await admission.server.tasks.get(task.task_id)).fraction_done != 0.5:
            await asyncio.sleep(0.02)
    await call.done_writing()
    assert (await call).acknowledged_sequence == 2


def anything(descriptor, chance, depth=0):
    """A message of this kind with random content, sound or not."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if chance.random() < 0.3 or (depth > 4 and field.message_type):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue
        values = [_value(field, chance, depth) for _ in range(chance.randint(1, 3))]
        if field.is_repeated:
            target = getattr(message, field.name)
            target.extend(value for value in values if value is not None)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(values[0])
        else:
            setattr(message, field.name, values[0])
    return message


def _value(field, chance, depth):
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return anything(field.message_type, chance, depth + 1)
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return chance.randbytes(chance.choice([0, 1, 50]))
            return chance.choice(["", "a", "a\1b", "tiny-llama", "../..", "lora_rank", "ü" * 70, "paper", "x" * 2000])
        case FieldDescriptor.CPPTYPE_BOOL:
            return chance.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return chance.choice([0.0, 0.1, 1.0, -1.0, 1e300, float("nan"), float("inf"), 16.0])
        case FieldDescriptor.CPPTYPE_ENUM:
            return chance.choice([0, 1, 2, 99])
        case FieldDescriptor.CPPTYPE_UINT64:
            return chance.choice([0, 1, 10, 2**63, 2**64 - 1])
        case FieldDescriptor.CPPTYPE_UINT32:
            return chance.choice([0, 1, 2, 10, 2**32 - 1])
        case _:
            return chance.choice([0, 1, -1, 2**31 - 1])


async def test_no_request_is_a_bug(admission):
    """Random requests, most of them unsound: every failure has a reason, and none is INTERNAL or UNKNOWN."""
    client = await admission.client()
    task = await client.create()
    chance = random.Random(1)
    for method in PUBLIC:
        for _ in range(REQUESTS_A_METHOD):
            request = anything(method.input_type, chance)
            if chance.random() < 0.7:
                for name, value in (("task_id", task.task_id), ("trial_id", "trial-001")):
                    if name in method.input_type.fields_by_name:
                        setattr(request, name, value)
            if "spec" in method.input_type.fields_by_name and chance.random() < 0.7:
                request.spec.base_model, request.spec.dataset_id = "tiny-llama", task.spec.dataset_id
                request.spec.validation_dataset_id = ""
            await call_without_a_bug(client, method, request)


async def call_without_a_bug(client, method, request):
    sent = iter([request]) if method.client_streaming else request
    call = getattr(client.stub, method.name)(sent, metadata=client.metadata, timeout=20)
    try:
        if method.server_streaming:
            await call.read()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        bugs = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
        if error.code() in bugs or reason_in(error) is None:
            raise AssertionError(f"{method.name} of {request} failed as {error}") from error
    finally:
        call.cancel()


async def test_reports_of_anything_are_no_bug(admission):
    client = await admission.client()
    task = await client.create()
    chance = random.Random(7)
    sequence = 1
    for _ in range(150):
        request = anything(report_service_pb2.ReportEventsRequest.DESCRIPTOR, chance)
        request.task_id, request.epoch, request.sequence = task.task_id, 1, sequence
        try:
            sequence = await admission.report([request]) + 1
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                raise AssertionError(f"{request} failed as {error}") from error


async def test_health_follows_the_database(admission):
    stub = health_pb2_grpc.HealthStub(admission.public)
    request = health_pb2.HealthCheckRequest(service="alto.v1.AdmissionService")

    async def becomes(status):
        async with asyncio.timeout(15):
            while (await stub.Check(request)).status != status:
                await asyncio.sleep(0.05)

    await becomes(health_pb2.HealthCheckResponse.SERVING)
    async with admission.server.database.transaction() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    await becomes(health_pb2.HealthCheckResponse.NOT_SERVING)
