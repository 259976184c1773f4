"""Two searches over one base model and one place: the second shares the first one's executor, and is told so."""

import os
import signal
import time

import pytest
import torch
from alto.v1 import tuning_pb2
from alto_client import load_task_file
from alto_client.task_spec import task_spec
from house import House
from processes import children, standing_still
from safetensors.torch import load_file

QUEUED, RUNNING = tuning_pb2.TASK_STATE_QUEUED, tuning_pb2.TASK_STATE_RUNNING
SUCCEEDED, CANCELLED = tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_CANCELLED
ENDLESS, SHORT = 100_000, 300


@pytest.fixture
def house(tmp_path, models_root, database_url):
    """The services with one place, and placement's state in each kind of database."""
    postgres = {} if database_url.startswith("sqlite") else {"ALTO_PLACEMENT_DATABASE_URL": database_url}
    opened = House(
        tmp_path / "home",
        models_root,
        ALTO_PLACEMENT_HEARTBEAT_S="0.5",
        ALTO_NODE_CHECKPOINT_INTERVAL_S="1",
        ALTO_NODE_THREADS="1",
        ALTO_NODE_GPUS="1",
        **postgres,
    )
    opened.start()
    yield opened
    opened.stop()


def until(condition, timeout_s=120, what="it"):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)
    return found


def submit(client, task_file, name, steps):
    # AdamW divides what is nearly zero by itself: a large epsilon keeps a rounding from becoming a step.
    base = {"batch_size": 4, "max_steps": steps, "max_length": 64, "epochs": 1000, "adam_epsilon": 1e-3}
    grid = {"learning_rate": [1.0e-3, 3.0e-3], "lora_rank": [4]}
    loaded = load_task_file(task_file(name=name, search={"base": base, "grid": grid}, early_exit={"policy": "none"}))
    train, validation = (client.upload_dataset(path).dataset_id for path in (loaded.dataset, loaded.validation))
    return client.create_task(task_spec(loaded, train, validation)).task_id


def ended(client, task_id, state=SUCCEEDED):
    task = client.get_task(task_id)
    assert task.state in (state, QUEUED, RUNNING, tuning_pb2.TASK_STATE_CANCELLING), task
    return task.state == state


def weights(client, task_id, folder):
    """The adapter of each trial of a task, by learning rate."""
    found = {}
    for trial in client.trials(task_id):
        there = folder / task_id / trial.trial_id
        client.download_adapter(task_id, there, trial.trial_id)
        found[trial.config.learning_rate] = load_file(there / "adapter_model.safetensors")
    return found


@pytest.mark.timeout(280)
def test_a_guest_ends_as_it_would_have_alone_and_everybody_is_told(house, task_file, tmp_path):
    with house.client() as client, house.operator() as operator:
        alone = submit(client, task_file, "alone", SHORT)
        until(lambda: ended(client, alone))
        host = submit(client, task_file, "host", ENDLESS)
        until(lambda: any(trial.step >= 3 for trial in client.trials(host)), what="the host's first steps")
        worker = worker_of(house)
        guest = submit(client, task_file, "guest", SHORT)
        until(lambda: client.get_task(guest).state == RUNNING, what="the guest's start")
        with standing_still(worker):
            until(lambda: guest in client.get_task(host).forecast.guest_task_ids, what="the plan of both")
            assert client.get_task(host).state == RUNNING
            said = house.alto("why", guest).stdout
            print(said)
            assert f"it shares {host}'s executor" in said
            said = house.alto("why", host).stdout
            print(said)
            assert "it has the GPUs it asked for" in said
            assert guest in said.split("shared by")[1].splitlines()[0]
            said = house.alto("plan").stdout
            print(said)
            assert f"shares {host}'s executor" in said
            (node,) = operator.nodes()
            assert (node.gpus_in_use, node.gpus) == (1, 1)

        until(lambda: ended(client, guest), what="the guest's end")
        assert client.get_task(host).state == RUNNING, "its host goes on"
        expected, shared = weights(client, alone, tmp_path), weights(client, guest, tmp_path)
        assert shared.keys() == expected.keys()
        for learning_rate, tensors in expected.items():
            for name, weight in tensors.items():
                error = torch.linalg.vector_norm(shared[learning_rate][name] - weight)
                assert error <= 1e-5 * torch.linalg.vector_norm(weight), (learning_rate, name)

        # The worker of another pair is killed: both carry on, one after the other, and neither has failed.
        second = submit(client, task_file, "second", SHORT)
        until(lambda: any(trial.step >= 3 for trial in client.trials(second)), what="the second guest's first steps")
        until(lambda: client.get_task(second).fraction_done > 0)
        assert planned(operator, second).forecast.is_guest
        os.kill(worker, signal.SIGKILL)
        until(lambda: not planned(operator, second).forecast.is_guest, what="that they share no more")
        until(lambda: planned(operator, host).attempts == 2, what="the host's return")
        client.cancel_task(host)
        until(lambda: ended(client, host, CANCELLED), what="the host's end")
        until(lambda: ended(client, second), what="the second guest's end")
        assert not any(client.get_task(one).failure.message for one in (host, second))


def planned(operator, task_id):
    return next(task for task in operator.plan().tasks if task.task_id == task_id)


def worker_of(house):
    """The process id of the one worker that runs."""
    (worker,) = children(house.process_of("node"))
    return worker
