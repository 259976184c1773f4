"""From a task file to an adapter, through three real processes; what breaks on the way is really broken."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from adapter_judge import validation_loss
from alto.v1 import error_pb2, tuning_pb2
from alto_client import AltoError, load_task_file
from alto_client.task_spec import task_spec
from alto_common.errors import reason_name
from google.protobuf import struct_pb2
from house import House
from safetensors.torch import load_file

ENDED = (tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED, tuning_pb2.TASK_STATE_CANCELLED)


def spec_of(client, path):
    """Upload a task file's datasets and return what is to be admitted."""
    loaded = load_task_file(path)
    train = client.upload_dataset(loaded.dataset)
    validation = client.upload_dataset(loaded.validation)
    return task_spec(loaded, train.dataset_id, validation.dataset_id)


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def ended_task(client, task_id):
    wait_until(lambda: client.get_task(task_id).state in ENDED, timeout_s=240)
    return client.get_task(task_id)


def test_a_search_ends_with_a_best_adapter_that_peft_loads(client, task_file, models_root, tmp_path):
    path = task_file()
    result = client.tune(load_task_file(path))
    assert result.succeeded
    assert len(result.trials) == 6

    stopped = [trial for trial in result.trials if trial.state == tuning_pb2.TRIAL_STATE_STOPPED]
    assert stopped, "early exit stopped nothing"
    for trial in stopped:
        assert trial.decision.rule
        assert trial.decision.reason
        assert trial.decision.evidence
        assert trial.step < trial.total_steps
    savings = result.task.savings
    assert 0 < savings.samples_trained < savings.samples_planned
    assert savings.trials_stopped == len(stopped)

    best = min(result.trials, key=lambda trial: trial.best_validation_loss)
    assert result.task.best_trial_id == best.trial_id
    rows = load_task_file(path).validation
    assert validation_loss(models_root / "tiny", rows, result.adapter_folder) == pytest.approx(
        best.best_validation_loss, abs=1e-3
    )
    base_loss = validation_loss(models_root / "tiny", rows)
    assert result.task.base_validation_loss == pytest.approx(base_loss, abs=1e-3)
    assert best.best_validation_loss < base_loss - 0.3


def test_any_trial_can_be_downloaded(client, task_file, tmp_path):
    result = client.tune(load_task_file(task_file()))
    for trial in result.trials:
        downloaded = client.download_adapter(result.task.task_id, tmp_path / trial.trial_id, trial.trial_id)
        config = json.loads((downloaded.folder / "adapter_config.json").read_text())
        assert config["r"] == trial.config.lora_rank
        assert config["base_model_name_or_path"] == "tiny"  # not where it lies on the server
        assert load_file(downloaded.folder / "adapter_model.safetensors")


def test_a_watch_that_was_cut_off_loses_and_repeats_nothing(client, task_file):
    task_id = client.create_task(spec_of(client, task_file())).task_id
    first, token = [], ""
    for message in client.watch(task_id):
        token = message.resume_token
        if message.HasField("event"):
            first.append(message.event.sequence)
        if len(first) == 10:
            break
    rest = [message.event.sequence for message in client.watch(task_id, token) if message.HasField("event")]
    assert first + rest == list(range(first[0], first[0] + len(first) + len(rest)))
    assert rest[-1] == client.get_task(task_id).last_event_sequence


def test_the_same_request_id_is_the_same_task(client, task_file):
    spec = spec_of(client, task_file())
    request_id = str(uuid.uuid4())
    first = client.create_task(spec, request_id=request_id)
    assert client.create_task(spec, request_id=request_id).task_id == first.task_id
    spec.display_name = "another payload"
    with pytest.raises(AltoError) as caught:
        client.create_task(spec, request_id=request_id)
    assert caught.value.reason == error_pb2.ERROR_REASON_REQUEST_ID_REUSED
    client.cancel_task(first.task_id)


def test_a_cancelled_task_ends_and_says_so(client, task_file):
    task_id = client.create_task(spec_of(client, task_file(search=long_search(4000)))).task_id
    wait_until(lambda: client.get_task(task_id).state == tuning_pb2.TASK_STATE_RUNNING)
    client.cancel_task(task_id)
    assert ended_task(client, task_id).state == tuning_pb2.TASK_STATE_CANCELLED
    assert all(trial.state != tuning_pb2.TRIAL_STATE_RUNNING for trial in client.trials(task_id))


def test_a_paused_task_carries_on(client, task_file):
    task_id = client.create_task(spec_of(client, task_file(search=long_search(600)))).task_id
    wait_until(lambda: any(trial.step >= 5 for trial in client.trials(task_id)))
    client.pause_task(task_id)
    wait_until(lambda: client.get_task(task_id).state == tuning_pb2.TASK_STATE_PAUSED)
    client.resume_task(task_id)
    assert ended_task(client, task_id).state == tuning_pb2.TASK_STATE_SUCCEEDED


def long_search(steps):
    return {
        "base": {"batch_size": 4, "max_steps": steps, "max_length": 64, "epochs": 100},
        "grid": {"learning_rate": [1.0e-3], "lora_rank": [4, 8]},
    }


@pytest.mark.parametrize("service", ["node", "placement", "admission"])
def test_a_service_that_is_killed_in_the_middle_changes_nothing(house, client, task_file, tmp_path, service):
    spec = spec_of(client, task_file(search=long_search(150), early_exit={"policy": "none"}))
    undisturbed = ended_task(client, client.create_task(spec).task_id)
    task_id = client.create_task(spec).task_id
    process_id = house.process_of(service)
    wait_until(lambda: any(trial.step >= 20 for trial in client.trials(task_id)))
    os.kill(process_id, signal.SIGKILL)
    house.process_of(service)
    task = ended_task(client, task_id)
    assert task.state == tuning_pb2.TASK_STATE_SUCCEEDED
    weights = []
    for number, one in enumerate((undisturbed, task)):
        folder = client.download_adapter(one.task_id, tmp_path / str(number), one.best_trial_id).folder
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, expected in weights[0].items():
        assert expected.equal(weights[1][name]), f"{name} differs after {service} was killed"


def grid(field, *values):
    """Give a specification one dimension alone."""

    def change(spec):
        del spec.search_space.grid.dimensions[:]
        dimension = spec.search_space.grid.dimensions.add(field=field)
        dimension.values.values.extend(struct_pb2.Value(number_value=value) for value in values)

    return change


BAD_SPECS = {
    "unknown model": (
        lambda spec: setattr(spec, "base_model", "no-such-model"),
        "UNKNOWN_BASE_MODEL",
        "base_model",
        "no-such-model",
    ),
    "empty search space": (
        lambda spec: spec.search_space.grid.ClearField("dimensions"),
        "SEARCH_SPACE_INVALID",
        "search_space",
        "",
    ),
    "rank 0": (grid("lora_rank", 8, 0), "SEARCH_SPACE_INVALID", "lora_rank", "0"),
    "rank above the layer's width": (grid("lora_rank", 8, 200), "CONFIGURATION_UNFIT", "lora_rank", "200"),
    "negative learning rate": (grid("learning_rate", -1e-4), "SEARCH_SPACE_INVALID", "learning_rate", "-0.0001"),
    "unknown target module": (
        lambda spec: spec.search_space.base.target_modules.names.append("no_such_proj"),
        "CONFIGURATION_UNFIT",
        "target_modules",
        "no_such_proj",
    ),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_bad_task_is_refused_before_anything_is_spent(client, task_file, name):
    change, reason, field, value = BAD_SPECS[name]
    spec = spec_of(client, task_file())
    change(spec)
    before = len(list(client.tasks()))
    with pytest.raises(AltoError) as caught:
        client.create_task(spec)
    assert reason_name(caught.value.reason) == reason
    (violation, *_) = caught.value.violations
    assert field in violation.field
    assert value in violation.description
    assert len(list(client.tasks())) == before


def test_a_dataset_over_the_limit_is_refused(models_root, tmp_path, data_folder):
    house = House(tmp_path / "home", models_root)
    house.environment["ALTO_ADMISSION_MAX_DATASET_BYTES"] = "1000"
    house.start()
    try:
        with house.client() as client, pytest.raises(AltoError) as caught:
            client.upload_dataset(data_folder / "train.jsonl")
    finally:
        house.stop()
    assert reason_name(caught.value.reason) == "DATASET_TOO_LARGE"
    assert "1000" in str(caught.value) or "1,000" in str(caught.value)


def test_a_malformed_line_is_named(client, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n')
    with pytest.raises(AltoError) as caught:
        client.upload_dataset(path)
    assert caught.value.reason == error_pb2.ERROR_REASON_DATASET_MALFORMED
    assert any("2" in violation.field for violation in caught.value.violations)


def test_another_client_reads_the_api_by_reflection(house):
    """buf's own gRPC client, in Go, without any code generated from the contract."""
    from pathlib import Path

    credentials = json.loads((house.home / "client.json").read_text())
    buf = Path(sys.executable).parent / "buf"
    command = [buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--reflect"]
    command += ["-H", f"authorization: Bearer {credentials['api_key']}", "-d", '{"page_size": 1}']
    url = f"http://{credentials['address']}/alto.v1.AdmissionService/ListTuningTasks"
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= {"tasks", "nextPageToken"}
