import pytest
from alto.v1 import error_pb2, tuning_pb2
from alto_client import AltoClient, AltoError, load_task_file
from alto_common.errors import DomainError
from alto_common.rpc.status import CODES
from alto_common.violations import Violation


def test_each_create_has_a_request_id_of_its_own_and_a_retry_keeps_it(client, admission):
    spec = tuning_pb2.TuningTaskSpec(base_model="m", dataset_id="d")
    admission.unavailable_calls = 2
    first = client.create_task(spec)
    ids = [request.request_id for request in admission.requests]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    second = client.create_task(spec)
    assert second.task_id != first.task_id
    assert client.create_task(spec, request_id=ids[0]).task_id == first.task_id


def test_only_unavailable_is_tried_again(client, admission):
    admission.error = DomainError(error_pb2.ERROR_REASON_INTERNAL, "a bug, 4f2a")
    with pytest.raises(AltoError, match="a bug, 4f2a"):
        client.get_task("task-1")
    assert len(admission.requests) == 1


def test_every_call_has_a_deadline_and_carries_the_key(client, admission):
    client.get_task("task-1")
    list(client.tasks())
    list(client.watch("task-1"))
    assert all(0 < remaining < 4000 for remaining in admission.deadlines)
    assert {metadata["authorization"] for metadata in admission.metadata} == {"Bearer alto_test_key"}


def test_pages_become_one_iterator(client, admission):
    assert [task.task_id for task in client.tasks()] == [f"task-{number}" for number in range(1, 6)]
    assert len(admission.requests) == 3


def test_pages_are_fetched_only_as_far_as_they_are_read(client, admission):
    assert next(client.tasks()).task_id == "task-1"
    assert len(admission.requests) == 1


def test_an_error_is_decoded_with_everything_it_carries(client, admission):
    admission.error = DomainError(
        error_pb2.ERROR_REASON_INVALID_FIELD,
        "learning_rate = -1: give a number above 0",
        violations=[Violation("spec.search_space.base.learning_rate", -1, "give a number above 0")],
        metadata={"hint": "x"},
        retry_after_s=2.5,
    )
    with pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    error = caught.value
    assert error.reason == error_pb2.ERROR_REASON_INVALID_FIELD
    assert error.reason_name == "INVALID_FIELD"
    assert error.status_code.name == "INVALID_ARGUMENT"
    assert error.violations[0].field == "spec.search_space.base.learning_rate"
    assert "give a number above 0" in error.violations[0].description
    assert error.metadata == {"hint": "x"}
    assert error.retry_after_s == 2.5
    assert not error.is_connection_loss


def test_a_quota_names_its_subject(client, admission):
    admission.error = DomainError(error_pb2.ERROR_REASON_QUOTA_EXCEEDED, "too many", quota=("tenant:local", "1 of 1"))
    with pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    assert caught.value.violations[0].field == "tenant:local"


@pytest.mark.parametrize("reason", [reason for reason, code in CODES.items() if code.name != "UNAVAILABLE"])
def test_every_reason_of_the_contract_arrives(client, admission, reason):
    admission.error = DomainError(reason, "why")
    with pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    assert caught.value.reason == reason
    assert caught.value.status_code == CODES[reason]


def test_a_wrong_key_is_told_as_such(address):
    with AltoClient(address, "another") as client, pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    assert caught.value.reason == error_pb2.ERROR_REASON_CREDENTIAL_INVALID


def test_a_server_that_is_not_there_is_named():
    with AltoClient("127.0.0.1:1", "key", timeout_s=5) as client, pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    assert "cannot reach 127.0.0.1:1" in caught.value.message
    assert caught.value.reason == error_pb2.ERROR_REASON_UNAVAILABLE


def test_tune_goes_the_whole_way(client, admission, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "task.yaml").write_text(
        "base_model: tiny\ndataset: train.jsonl\nsearch: {grid: {lora_rank: [4, 8]}}\noutput: best\n"
    )
    admission.adapter_files = {"adapter_config.json": b"{}"}
    admission.snapshot.task.best_trial_id = "trial-002"
    admission.snapshot.task.best_validation_loss = 1.25
    kinds = []
    result = client.tune(
        load_task_file(tmp_path / "task.yaml"), on_message=lambda message: kinds.append(message.WhichOneof("message"))
    )
    assert result.best_validation_loss == 1.25
    assert result.adapter_folder == tmp_path / "best"
    assert (tmp_path / "best" / "adapter_config.json").read_bytes() == b"{}"
    assert kinds.count("event") == 13
    (created,) = admission.created.values()
    assert created.spec.dataset_id == "dataset-1"
    assert created.spec.display_name == "task"
