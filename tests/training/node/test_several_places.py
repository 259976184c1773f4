"""A search on a node with two places is trained by two worker ranks: real processes, whatever becomes of them."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from alto.v1 import placement_service_pb2, tuning_pb2
from alto_common.artifacts import ArtifactStore
from alto_training.datasets import fetch, split
from alto_training.executor.executor import Executor
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.wire import job_from_wire
from processes import children
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Some seconds' work, of which the first checkpoints are a small part.
STEPS = 400
# AdamW divides what is nearly zero by itself: a large epsilon keeps a rounding from becoming a step.
CONFIG = {"adam_epsilon": 1e-3}


@pytest.fixture(scope="module")
def expected():
    """The weights of each trial as one process trains them, by the number of steps; found out when first asked for."""
    return {}


def train_alone(house, steps):
    """Train the same search in this process; return the weights of each trial."""
    work, cache = house.work(steps=steps, trials=3, config=CONFIG), house.folder / "alone"
    train, validation = split(fetch(ArtifactStore(str(house.artifact_root)), work.train, cache), 0.2, cache)
    job = job_from_wire(work, str(house.models_root / "tiny"), str(train), str(validation))
    settings = ExecutorSettings(backend=Backend.REFERENCE, threads=1)
    outcome = Executor(job, cache / "work", lambda event: None, settings).run()
    return {one.trial_id: load_file(Path(one.adapter_path) / "adapter_model.safetensors") for one in outcome.trials}


async def begin(house, wait_until, strategy="auto", **changes):
    """Start a search on two places; wait until there is a checkpoint, and return the process ids of its ranks."""
    await house.start_node(gpus=2, slots=3, checkpoint_interval_s=0.1, strategy=strategy)
    await house.enqueue(house.work(**{"steps": STEPS, "trials": 3, "config": CONFIG} | changes), gpus=2)
    await wait_until(lambda: house.admission.events("checkpoint_written"), what="a checkpoint")
    ranks = children(house.worker_process())
    assert len(ranks) == 2
    return ranks


def is_gone(process_id):
    return not os.path.exists(f"/proc/{process_id}")


def check(house, expected, steps=STEPS):
    """The search ended once, with the weights that one process comes to."""
    admission = house.admission
    assert admission.states()[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    assert admission.states().count(tuning_pb2.TASK_STATE_SUCCEEDED) == 1
    curves = admission.measurements()
    if steps not in expected:
        expected[steps] = train_alone(house, steps)
    adapters = {event.trial_id: event.adapter_ready.uri for event in admission.events("adapter_ready")}
    assert set(adapters) == {"trial-0", "trial-1", "trial-2"}
    for trial, uri in adapters.items():
        assert sorted(curves[trial, "train"]) == list(range(1, steps + 1))
        ours = load_file(house.artifact_root / uri / "adapter_model.safetensors")
        for name, weight in expected[steps][trial].items():
            assert torch.linalg.vector_norm(ours[name] - weight) <= 1e-5 * torch.linalg.vector_norm(weight), name


async def test_two_ranks_come_to_what_one_process_does(house, wait_until, expected):
    ranks = await begin(house, wait_until)
    lock = (house.folder / "node-a" / "tasks" / "task" / "lock").resolve()
    for process in (house.worker_process(), *ranks):
        # A task's lock lasts until the last rank is gone.
        assert str(lock) in {os.path.realpath(file) for file in Path(f"/proc/{process}/fd").glob("*")}
    await wait_until(house.ended)
    check(house, expected)
    assert all(is_gone(rank) for rank in ranks)
    assert '"replicated"' in (house.folder / "node-a" / "strategies.json").read_text()


@pytest.mark.parametrize(("strategy", "steps"), [("replicated", STEPS), ("sharded", 150)])
async def test_a_rank_is_killed_at_any_moment(house, wait_until, expected, strategy, steps):
    ranks = await begin(house, wait_until, strategy, steps=steps)
    written = len(house.admission.events("checkpoint_written")) + random.randrange(3)
    await wait_until(lambda: len(house.admission.events("checkpoint_written")) >= written, what="the moment")
    os.kill(ranks[random.randrange(2)], signal.SIGKILL)
    await wait_until(house.ended)
    check(house, expected, steps)
    assert house.admission.attempts() == 1, "its worker starts the ranks again by itself"
    assert len(house.admission.events("execution_started")) == 2
    assert all(is_gone(rank) for rank in ranks)


async def test_the_worker_is_killed(house, wait_until, expected):
    ranks = await begin(house, wait_until)
    os.kill(house.worker_process(), signal.SIGKILL)
    await wait_until(lambda: all(is_gone(rank) for rank in ranks), what="the ranks' end with their worker")
    await wait_until(house.ended)
    check(house, expected)
    assert house.admission.attempts() == 2


async def test_the_node_is_killed(house, wait_until, expected):
    ranks = await begin(house, wait_until)
    await house.nodes["node-a"].kill()
    await wait_until(lambda: all(is_gone(rank) for rank in ranks), what="the ranks' end with their node")
    await house.nodes["node-a"].start()
    await wait_until(house.ended)
    check(house, expected)


async def test_stop_a_trial_pause_resume_cancel(house, wait_until, metadata):
    wire = placement_service_pb2
    admission = house.admission

    async def update(**fields):
        await house.stub.UpdateTask(wire.UpdateTaskRequest(task_id="task", **fields), metadata=metadata, timeout=20)

    def state_of(trial_id):
        return [e.trial_state_changed.state for e in admission.events("trial_state_changed") if e.trial_id == trial_id]

    ranks = await begin(house, wait_until, steps=100_000)
    await update(stop_trial_ids=["trial-0"])
    await wait_until(lambda: state_of("trial-0")[-1:] == [tuning_pb2.TRIAL_STATE_CANCELLED], what="the trial's end")
    await update(held=True)
    await wait_until(lambda: admission.states()[-1] == tuning_pb2.TASK_STATE_PAUSED, what="the pause")
    await wait_until(lambda: all(is_gone(rank) for rank in ranks), what="the end of the ranks")
    await update(held=False)
    await wait_until(lambda: len(admission.events("execution_started")) == 2, what="the resumption")
    assert admission.events("execution_started")[-1].execution_started.resumed
    await house.stub.DequeueTask(wire.DequeueTaskRequest(task_id="task"), metadata=metadata, timeout=20)
    await wait_until(lambda: admission.states()[-1] == tuning_pb2.TASK_STATE_CANCELLED, what="the cancellation")
    await wait_until(house.ended)
    assert state_of("trial-1")[-1] == state_of("trial-2")[-1] == tuning_pb2.TRIAL_STATE_CANCELLED
