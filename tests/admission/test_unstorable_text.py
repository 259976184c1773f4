"""NUL in any text of any request, on both databases: refused before anything is looked at, and named by its path."""

import grpc
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import report_service_pb2, tuning_pb2
from alto_common.rpc.interceptor import ALL_NAMED_BYTES
from alto_common.rpc.status import reason_in
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor

from .test_tasks import failure, violations

PUBLIC = messages.DESCRIPTOR.services_by_name["AdmissionService"].methods
TEXT = "a\0b"


def with_nul(descriptor, around=()):
    """Yield (path, message) for each text that a message may have, keys and values of maps included."""
    make = message_factory.GetMessageClass(descriptor)
    around = (*around, descriptor)
    for field in descriptor.fields:
        name, kind = field.name, field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            value = kind.fields_by_name["value"]
            blank = value.default_value if value.message_type is None else make_blank(value.message_type)
            yield f'{name}["a\\u0000b"]', make(**{name: {TEXT: blank}})
            for path, one in one_with_nul(value, around):
                yield f'{name}["k"]{path}', make(**{name: {"j": blank, "k": one}})
        elif field.is_repeated:
            for path, one in one_with_nul(field, around):
                yield f"{name}[1]{path}", make(**{name: [type(one)(), one]})
        else:
            for path, one in one_with_nul(field, around):
                yield f"{name}{path}", make(**{name: one})


def one_with_nul(field, around):
    if field.type == FieldDescriptor.TYPE_STRING:
        yield "", TEXT
    elif field.message_type is not None and field.message_type not in around:
        for path, message in with_nul(field.message_type, around):
            yield f".{path}", message


def make_blank(descriptor):
    return message_factory.GetMessageClass(descriptor)()


async def test_a_text_with_nul_is_refused_by_its_path(database_url, started):
    admission = await started(database_url=database_url)
    client = await admission.client()
    seen = set()
    for method in PUBLIC:
        for path, request in with_nul(method.input_type):
            sent = iter([request]) if method.client_streaming else request
            call = client.stream(method.name, sent)
            error = await failure(call.read() if method.server_streaming else call)
            assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), path
            assert "NUL" in violations(error)[path], path
            seen.add(f"{method.name}.{path}")
    assert seen >= {
        'CreateTuningTask.spec.labels["a\\u0000b"]',
        'CreateTuningTask.spec.labels["k"]',
        "CreateTuningTask.spec.search_space.explicit.configs[1].target_modules.names[1]",
        'CreateTuningTask.spec.search_space.grid.dimensions[1].values.values[1].struct_value.fields["a\\u0000b"]',
        'ListTuningTasks.labels["k"]',
        "UploadDataset.header.display_name",
        "WatchTuningTask.resume_token",
    }


async def test_a_report_with_nul_is_refused_by_its_path(database_url, started):
    admission = await started(database_url=database_url)
    for path, request in with_nul(report_service_pb2.ReportEventsRequest.DESCRIPTOR):
        error = await failure(admission.report([request]))
        assert "NUL" in violations(error)[path], path


async def test_validate_only_refuses_what_cannot_be_kept(database_url, started):
    admission = await started(database_url=database_url)
    client = await admission.client()
    error = await failure(client.create(validate_only=True, display_name=TEXT))
    assert violations(error).keys() == {"spec.display_name"}


async def test_of_a_large_request_the_first_is_named(admission):
    client = await admission.client()
    names = [TEXT] * 64
    configs = [tuning_pb2.TrialConfig(target_modules=tuning_pb2.TargetModules(names=names))] * 100
    space = tuning_pb2.SearchSpace(explicit=tuning_pb2.ExplicitSearch(configs=configs))
    assert space.ByteSize() > ALL_NAMED_BYTES
    error = await failure(client.create("d", search_space=space))
    assert violations(error).keys() == {"spec.search_space.explicit.configs[0].target_modules.names[0]"}
