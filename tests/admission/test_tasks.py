"""Creating, listing and changing tasks over real sockets: what is refused, and what is answered twice the same."""

import json
import re
from dataclasses import replace

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2
from alto_common.rpc.status import reason_in
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from .conftest import FACTS, MODEL, know_model, spec_of
from .reporting import decided, numbered, trained, trial_state
from .reporting import started as execution_started


async def failure(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


def violations(error):
    for one in rpc_status.from_call(error).details:
        found = error_details_pb2.BadRequest()
        if one.Unpack(found):
            return {violation.field: violation.description for violation in found.field_violations}
    return {}


def space(**kind):
    return json_format.ParseDict(kind, tuning_pb2.SearchSpace())


def grid(**values):
    return space(grid={"dimensions": [{"field": k, "values": {"values": v}} for k, v in values.items()]})


def draws(trials, **domains):
    dimensions = [{"field": name, **domain} for name, domain in domains.items()]
    return space(random={"trials": trials, "dimensions": dimensions})


def is_in(message, path):
    """Whether a path leads to a field of this message, each index and key of it to something that is there."""
    try:
        for name, subscript in re.findall(r"(\w+)(?:\[(.+?)\])?(?:\.|$)", path):
            message = getattr(message, name)
            if name == "dimensions" and subscript and not subscript.isdigit():
                (message,) = (one for one in message if one.field == subscript)
            elif subscript:
                message = message[json.loads(subscript)]
    except (AttributeError, LookupError, ValueError):
        return False
    return True


def wordy(trials):
    """Configurations of two kilobytes each."""
    names = [f"model.layers.{number % 2}.self_attn.q_proj" for number in range(64)]
    return space(explicit={"configs": [{"target_modules": {"names": names}, "seed": seed} for seed in range(trials)]})


async def test_the_same_request_gives_the_same_task(admission):
    client = await admission.client()
    dataset = await client.upload()
    first = await client.create(dataset.dataset_id, request_id="r")
    again = await client.create(dataset.dataset_id, request_id="r")
    assert again.task_id == first.task_id
    error = await failure(client.create(dataset.dataset_id, request_id="r", priority=1))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    other = await admission.client("other")
    assert (await other.create(request_id="r")).task_id != first.task_id


async def test_validate_only_keeps_nothing(admission, placement):
    client = await admission.client()
    task = await client.create(validate_only=True, request_id="r")
    assert (task.task_id, task.trial_count, task.savings.samples_planned) == ("", 2, 36)
    assert not (await client.call("ListTuningTasks", messages.ListTuningTasksRequest())).tasks
    assert (await client.create(request_id="r")).task_id


async def test_an_unusable_base_model_is_told_of_as_it_was_named_and_the_log_says_where_it_lies(admission, models_root):
    (models_root / "alias").symlink_to(models_root / "tiny-llama")
    (models_root / "tiny-llama" / "config.json").write_text("no JSON")
    client = await admission.client()
    with capture_logs() as logs:
        error = await failure(client.create(base_model="alias"))
    assert reason_in(error) == "UNKNOWN_BASE_MODEL"
    assert error.details().startswith("base model 'alias' has no usable configuration (")
    assert str(models_root.parent) not in str(rpc_status.from_call(error))
    (told,) = (entry for entry in logs if entry["log_level"] == "warning")
    assert told["location"] == str(models_root / "tiny-llama")


@pytest.mark.parametrize(
    ("fields", "reason", "field", "cure"),
    [
        ({"base_model": "tiny-lama"}, "UNKNOWN_BASE_MODEL", "spec.base_model", "tiny-llama"),
        ({"base_model": "/etc"}, "UNKNOWN_BASE_MODEL", "spec.base_model", "below"),
        ({"base_model": "a" * 300}, "UNKNOWN_BASE_MODEL", "spec.base_model", "tiny-llama"),
        (
            {"search_space": grid(layers=[[0, 0]])},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions[layers].values.values[0]",
            "each once",
        ),
        (
            {"search_space": wordy(1000)},
            "INVALID_FIELD",
            "spec.search_space",
            "fewer at a time",
        ),
        (
            {"search_space": space(grid={"dimensions": []})},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions",
            "empty",
        ),
        (
            {"search_space": space(explicit={"configs": []})},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.explicit.configs",
            "empty",
        ),
        (
            {"search_space": grid(lora_rank=[2, 4, 8], seed=list(range(500)))},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions",
            "at most",
        ),
        (
            {"search_space": grid(learning_rate=[1e-4, -1])},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions[learning_rate].values.values[1]",
            "above 0",
        ),
        (
            {"search_space": space(base={"lora_rank": 0}, explicit={"configs": [{}]})},
            "INVALID_FIELD",
            "spec.search_space.base.lora_rank",
            "1",
        ),
        (
            {"search_space": grid(no_such_field=[1])},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions[0].field",
            "lora_rank",
        ),
        (
            {"search_space": grid(lora_rank=[2, 64])},
            "CONFIGURATION_UNFIT",
            "spec.search_space.grid.dimensions[lora_rank]",
            "at most 48",
        ),
        (
            {"search_space": grid(target_modules=[["q_proj"], ["w_proj"]])},
            "CONFIGURATION_UNFIT",
            "spec.search_space.grid.dimensions[target_modules]",
            "q_proj",
        ),
        (
            {"search_space": space(base={"max_length": 129}, explicit={"configs": [{}]})},
            "CONFIGURATION_UNFIT",
            "spec.search_space.base.max_length",
            "128",
        ),
        (
            {"search_space": space(explicit={"configs": [{"max_length": 64}, {"max_length": 500}]})},
            "CONFIGURATION_UNFIT",
            "spec.search_space.explicit.configs[1].max_length",
            "128",
        ),
        # What is written twice, in whatever words, is one trial.
        (
            {
                "search_space": space(
                    base={"max_length": 64}, explicit={"configs": [{}, {"max_length": 64}, {"lora_rank": 64}]}
                )
            },
            "CONFIGURATION_UNFIT",
            "spec.search_space.explicit.configs[2].lora_rank",
            "at most 48",
        ),
        (
            {"search_space": space(explicit={"configs": [*[{"max_length": 128}, {}] * 2, {"epochs": 1e300}]})},
            "INVALID_FIELD",
            "spec.search_space.explicit.configs[4].epochs",
            "fewer",
        ),
        (
            {"search_space": space(explicit={"configs": [{"epochs": 1e300, "max_length": 64}]})},
            "INVALID_FIELD",
            "spec.search_space.explicit.configs[0].epochs",
            "fewer",
        ),
        (
            {"search_space": grid(max_steps=[1e30], max_length=[64])},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.grid.dimensions[max_steps].values.values[0]",
            "give 1 to",
        ),
        (
            {"search_space": grid(seed=[1, 2], learning_rate=[])},
            "INVALID_FIELD",
            "spec.search_space.grid.dimensions[learning_rate].values.values",
            "1",
        ),
        (
            {"search_space": grid(max_length=[64], epochs=[1, 1e300])},
            "INVALID_FIELD",
            "spec.search_space.grid.dimensions[epochs]",
            "fewer",
        ),
        (
            {"search_space": draws(3, learning_rate={"log_uniform": {"low": 0, "high": 1}})},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.random.dimensions[learning_rate].log_uniform.low",
            "above 0",
        ),
        (
            {"search_space": draws(3, seed={"uniform": {"high": 9}}, lora_rank={"uniform": {"high": 999}})},
            "SEARCH_SPACE_INVALID",
            "spec.search_space.random.dimensions[lora_rank].uniform.high",
            "1 to 256",
        ),
        ({"early_exit": tuning_pb2.EarlyExit(policy="best")}, "INVALID_FIELD", "spec.early_exit.policy", "paper"),
        ({"objective": tuning_pb2.Objective(kind=2)}, "INVALID_FIELD", "spec.dataset_id", "chosen"),
        ({"validation_fraction": 0.9}, "INVALID_FIELD", "spec.validation_fraction", "0.5"),
        ({"labels": {"k\0": "v"}}, "INVALID_FIELD", 'spec.labels["k\\u0000"]', "NUL"),
        ({"labels": {"a.dimensions[3]": "v\0"}}, "INVALID_FIELD", 'spec.labels["a.dimensions[3]"]', "NUL"),
        ({"display_name": "a\0b"}, "INVALID_FIELD", "spec.display_name", "NUL"),
    ],
)
async def test_bad_input_is_named_with_its_cure(admission, fields, reason, field, cure):
    client = await admission.client()
    error = await failure(client.create(**fields))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, reason), error.details()
    assert cure in violations(error)[field]
    request = messages.CreateTuningTaskRequest(spec=spec_of("d", **fields))
    assert all(is_in(request, path) for path in violations(error))
    assert not (await client.call("ListTuningTasks", messages.ListTuningTasksRequest())).tasks


@pytest.mark.parametrize(
    ("search_space", "field"),
    [
        # Each of them breaks a rule of the contract.
        ({"explicit": {"configs": [tuning_pb2.TrialConfig(lora_rank=0)] * 100_000}}, "explicit.configs"),
        ({"random": {"trials": 100_000, "dimensions": [tuning_pb2.Dimension(field="seed")]}}, "random.trials"),
    ],
)
async def test_too_many_trials_are_refused_by_the_services_limit(started, search_space, field):
    admission = await started(max_trials=3)
    client = await admission.client()
    dataset = await client.upload()
    if field == "random.trials":
        search_space["random"]["dimensions"][0].uniform.high = 9
    spec = spec_of(dataset.dataset_id, search_space=tuning_pb2.SearchSpace(**search_space))
    for method, request in (
        ("CreateTuningTask", messages.CreateTuningTaskRequest(request_id="r", spec=spec)),
        ("EstimateTuningTask", messages.EstimateTuningTaskRequest(spec=spec)),
    ):
        error = await failure(client.call(method, request))
        assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "SEARCH_SPACE_INVALID")
        ((path, said),) = violations(error).items()
        assert path == f"spec.search_space.{field}"
        assert said.startswith(f"{path} = 100000: ")
        assert said.endswith("the space may hold at most 3 configurations")


async def test_a_dataset_that_cannot_be_divided_needs_a_validation_dataset(admission):
    client = await admission.client()
    one = await client.upload(b'{"text": "a"}')
    assert "spec.dataset_id" in violations(await failure(client.create(one.dataset_id)))
    assert await client.create(one.dataset_id, validation_dataset_id=one.dataset_id)


async def test_conversations_need_a_base_model_with_a_chat_template(admission, models_root):
    client = await admission.client()
    talk = await client.upload(b'{"messages": [{"role": "assistant", "content": "a"}]}\n' * 3)
    error = await failure(client.create(talk.dataset_id, validation_dataset_id=talk.dataset_id))
    assert reason_in(error) == "INVALID_FIELD"
    found = violations(error)
    assert set(found) == {"spec.dataset_id", "spec.validation_dataset_id"}
    assert all("has no chat template: give rows of {prompt, completion}" in text for text in found.values())
    (models_root / MODEL / "chat_template.jinja").write_text("a")
    know_model(models_root, replace(FACTS, has_chat_template=True))
    assert await client.create(talk.dataset_id, validation_dataset_id=talk.dataset_id)


async def test_a_quota_is_named(started):
    admission = await started(max_unfinished_tasks=1)
    client = await admission.client()
    task = await client.create()
    error = await failure(client.create(task.spec.dataset_id))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    assert await client.create(task.spec.dataset_id)


async def refused_etag(client, request):
    """Cancel; where the etag is not the latest, put the one that the refusal tells into the request."""
    try:
        await client.call("CancelTuningTask", request)
    except grpc.aio.AioRpcError as error:
        if (error.code(), reason_in(error)) != (grpc.StatusCode.ABORTED, "ETAG_MISMATCH"):
            raise
        (info,) = [d for d in rpc_status.from_call(error).details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
        found = error_details_pb2.ErrorInfo()
        info.Unpack(found)
        request.etag = found.metadata["etag"]
        return True
    return False


async def test_an_etag_that_is_not_the_latest_is_refused(admission):
    client = await admission.client()
    task = await client.create()
    request = messages.CancelTuningTaskRequest(task_id=task.task_id, etag="r999")
    assert await refused_etag(client, request)
    # The task is being queued meanwhile: what one refusal tells may be old by the next call.
    for _ in range(5):
        if not await refused_etag(client, request):
            break
    cancelled = (await client.call("GetTuningTask", messages.GetTuningTaskRequest(task_id=task.task_id))).task
    assert cancelled.state == tuning_pb2.TASK_STATE_CANCELLED
    assert cancelled.etag != request.etag


async def test_a_state_that_does_not_allow_it(admission):
    client = await admission.client()
    task = await client.create()
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    error = await failure(client.call("PauseTuningTask", messages.PauseTuningTaskRequest(task_id=task.task_id)))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_CONFLICT")


async def test_lists_come_in_pages(admission):
    client = await admission.client()
    dataset = await client.upload()
    for number in range(3):
        await client.create(dataset.dataset_id, labels={"n": str(number)}, trials=3)
    request = messages.ListTuningTasksRequest(page_size=2)
    first = await client.call("ListTuningTasks", request)
    request.page_token = first.next_page_token
    second = await client.call("ListTuningTasks", request)
    assert [task.spec.labels["n"] for task in (*first.tasks, *second.tasks)] == ["2", "1", "0"]
    assert not second.next_page_token
    request.labels["n"] = "1"
    error = await failure(client.call("ListTuningTasks", request))
    assert reason_in(error) == "PAGE_TOKEN_INVALID"

    task_id = first.tasks[0].task_id
    trials = messages.ListTrialsRequest(task_id=task_id, page_size=2)
    page = await client.call("ListTrials", trials)
    trials.page_token = page.next_page_token
    rest = await client.call("ListTrials", trials)
    names = [trial.trial_id for trial in (*page.trials, *rest.trials)]
    assert names == ["trial-001", "trial-002", "trial-003"]
    assert page.trials[0].config.lora_alpha == 32, "every field is set"


async def test_a_page_ends_where_a_response_is_full(admission):
    client = await admission.client()
    dataset = await client.upload()
    for number in range(10):
        await client.create(dataset.dataset_id, search_space=wordy(200), labels={"n": str(number)})
    request, seen, pages = messages.ListTuningTasksRequest(), [], 0
    while request.page_token or not pages:
        page = await client.call("ListTuningTasks", request)
        assert page.ByteSize() < 4 << 20
        seen += [task.spec.labels["n"] for task in page.tasks]
        request.page_token, pages = page.next_page_token, pages + 1
    assert seen == list("9876543210")
    assert pages > 1


async def test_a_trials_curve_and_decision(admission):
    client = await admission.client()
    task = await client.create()
    events = [execution_started(), *(trained("trial-001", step) for step in range(1, 6)), decided("trial-001", 5)]
    events.append(trial_state("trial-001", tuning_pb2.TRIAL_STATE_STOPPED, 5))
    await admission.report(numbered(task.task_id, 1, events))
    request = messages.ListTrialMetricsRequest(task_id=task.task_id, trial_id="trial-001", page_size=3)
    first = await client.call("ListTrialMetrics", request)
    request.page_token = first.next_page_token
    second = await client.call("ListTrialMetrics", request)
    assert [point.step for point in (*first.metrics, *second.metrics)] == [1, 2, 3, 4, 5]
    trial = messages.GetTrialRequest(task_id=task.task_id, trial_id="trial-001")
    found = (await client.call("GetTrial", trial)).trial
    assert (found.state, found.decision.rule) == (tuning_pb2.TRIAL_STATE_STOPPED, "underperformance")
    task = (await client.call("GetTuningTask", messages.GetTuningTaskRequest(task_id=task.task_id))).task
    assert (task.savings.trials_stopped, task.savings.samples_trained) == (1, 10)


async def test_base_models_are_listed(admission):
    client = await admission.client()
    (model,) = (await client.call("ListBaseModels", messages.ListBaseModelsRequest())).base_models
    assert (model.name, model.parameter_count, model.context_length) == (MODEL, FACTS.parameters, 128)
    assert list(model.target_modules) == ["k_proj", "q_proj"]


async def test_an_estimate_before_anything_is_spent(admission, placement):
    client = await admission.client()
    dataset = await client.upload()
    resources = tuning_pb2.Resources(gpus=2)
    request = messages.EstimateTuningTaskRequest(spec=spec_of(dataset.dataset_id, resources=resources))
    estimate = await client.call("EstimateTuningTask", request)
    assert (estimate.trial_count, estimate.samples_planned, estimate.tokens_planned) == (2, 36, 180)
    assert (estimate.duration_upper.seconds, estimate.duration_expected.seconds) == (3600, 1800)
    assert (estimate.gpu_hours_expected, estimate.basis) == (1.0, "prior, never measured")
    assert estimate.peak_memory_bytes > FACTS.bytes
    # The memory is that of the device that placement would take.
    placement.gpu_kind = "cpu"
    on_cpu = await client.call("EstimateTuningTask", request)
    assert on_cpu.peak_memory_bytes != estimate.peak_memory_bytes
    placement.refuse = (grpc.StatusCode.UNAVAILABLE, "away")
    error = await failure(client.call("EstimateTuningTask", request))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
