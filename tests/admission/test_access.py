"""Who may call what: every method, with no credential, a wrong one, one of too little scope, another tenant's."""

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import admission_service_pb2_grpc, report_service_pb2
from alto_admission.access import ADMISSION_SERVICE, REPORT_SERVICE, SERVICE_SCOPES, TENANT_SCOPES
from alto_admission.server import clock_us
from alto_common.rpc.authentication import Scope
from alto_common.rpc.channel import bearer_metadata
from alto_common.rpc.status import reason_in

from .conftest import ROWS, SERVICE_TOKEN, Client, spec_of, upload_messages
from .reporting import Node, numbered

PUBLIC = messages.DESCRIPTOR.services_by_name["AdmissionService"].methods
INTERNAL = report_service_pb2.DESCRIPTOR.services_by_name["ReportService"].methods
# Methods whose requests name something that belongs to a tenant; the others only ever see the caller's own.
NAMING = {
    "task_id": {method.name for method in PUBLIC if "task_id" in method.input_type.fields_by_name},
    "dataset_id": {method.name for method in PUBLIC if "dataset_id" in method.input_type.fields_by_name},
    "spec": {method.name for method in PUBLIC if "spec" in method.input_type.fields_by_name},
}


def test_every_method_is_in_the_table_and_nothing_else():
    assert set(TENANT_SCOPES) == {f"/{ADMISSION_SERVICE}/{method.name}" for method in PUBLIC}
    assert set(SERVICE_SCOPES) == {f"/{REPORT_SERVICE}/{method.name}" for method in INTERNAL}
    assert set(TENANT_SCOPES.values()) == {Scope.READ, Scope.WRITE}


def request_of(method, names):
    """A sound request that names these things."""
    values = {field.name: names[field.name] for field in method.input_type.fields if field.name in names}
    return getattr(messages, method.input_type.name)(**values)


async def outcome(client, method, request):
    """The code and reason of a call; (OK, None) when it goes through."""
    behaviour = getattr(client.stub, method.name)
    if method.client_streaming:
        header = {"request_id": "u", "file_name": "f.jsonl", "size_bytes": len(ROWS), "sha256": "0" * 64}
        request = upload_messages(header, ROWS)
    call = behaviour(request, metadata=client.metadata, timeout=20)
    try:
        if method.server_streaming:
            await call.read()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), reason_in(error)
    finally:
        call.cancel()
    return grpc.StatusCode.OK, None


async def matrix(client, names):
    return {method.name: await outcome(client, method, request_of(method, names)) for method in PUBLIC}


SOUND = {"task_id": "t", "trial_id": "trial-001", "dataset_id": "d", "request_id": "r", "spec": spec_of("d")}


@pytest.mark.parametrize(
    "credential",
    [(), bearer_metadata("wrong"), bearer_metadata(SERVICE_TOKEN), (("authorization", "alto_x"),), bearer_metadata("")],
    ids=["none", "unknown", "service token", "no bearer", "empty"],
)
async def test_without_a_tenants_key_nothing_goes(admission, credential):
    client = Client(admission.public, credential)
    for name, found in (await matrix(client, SOUND)).items():
        assert found == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"), name


async def test_an_expired_key_and_a_revoked_key_are_refused(admission):
    expired = await admission.client(expire_us=clock_us() - 1)
    revoked = await admission.client("gone")
    await admission.server.keys.revoke("gone")
    for client in (expired, revoked):
        for name, found in (await matrix(client, SOUND)).items():
            assert found == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"), name


@pytest.mark.parametrize("scope", [Scope.READ, Scope.WRITE])
async def test_a_key_of_one_scope_reaches_no_method_of_the_other(admission, scope):
    client = await admission.client(scopes=[scope])
    for name, found in (await matrix(client, SOUND)).items():
        needed = TENANT_SCOPES[f"/{ADMISSION_SERVICE}/{name}"]
        denied = found == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        assert denied == (needed is not scope), (name, found)


async def test_what_belongs_to_another_tenant_is_not_found(admission, placement, tmp_path):
    owner = await admission.client("owner")
    task = await owner.create()
    while not placement.enqueued:
        await admission.server.tasks.get(task.task_id)
    await Node(admission, placement.enqueued[task.task_id].work, tmp_path / "artifacts").train_all()
    dataset_id = task.spec.dataset_id
    names = {
        "task_id": task.task_id,
        "trial_id": "trial-001",
        "dataset_id": dataset_id,
        "request_id": "r",
        "spec": spec_of(dataset_id),
    }
    foreign = await matrix(await admission.client("stranger"), names)
    named = set().union(*NAMING.values())
    assert len(named) == 14
    for name in named:
        assert foreign[name] == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"), name
    stranger = await admission.client("stranger")
    assert not (await stranger.call("ListTuningTasks", messages.ListTuningTasksRequest())).tasks
    assert not (await stranger.call("ListDatasets", messages.ListDatasetsRequest())).datasets
    own = await matrix(owner, names)
    refused = {name for name in named if own[name][0] is not grpc.StatusCode.OK}
    # The task has ended, and the matrix has just admitted another that uses the dataset.
    assert refused == {"PauseTuningTask", "ResumeTuningTask", "DeleteDataset"}


@pytest.mark.parametrize("credential", [(), bearer_metadata("wrong")])
async def test_reports_need_the_service_token(admission, credential):
    events = numbered("t", 1, [])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admission.reports.ReportEvents(iter(events), metadata=credential)
    assert reason_in(caught.value) == "CREDENTIAL_INVALID"


async def test_a_tenants_key_reports_nothing_and_reports_are_not_on_the_public_port(admission):
    client = await admission.client()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admission.reports.ReportEvents(iter([]), metadata=client.metadata)
    assert reason_in(caught.value) == "CREDENTIAL_INVALID"
    inside = admission_service_pb2_grpc.AdmissionServiceStub(admission.internal)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inside.ListDatasets(messages.ListDatasetsRequest(), metadata=client.metadata)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
