"""Three nodes, more tasks than places, searches that end early, one node killed: all end, what was told is true."""

import json
import os
import signal
import threading
import time

import pytest
from alto.v1 import error_pb2, placement_pb2, tuning_pb2
from alto_client import AltoError, load_task_file
from alto_client.task_spec import task_spec
from house import House
from processes import children, standing_still

NODES = ("local", "node-b", "node-c")
LEASE_S = 8
HELD = (placement_pb2.PLACEMENT_STATE_ASSIGNED, placement_pb2.PLACEMENT_STATE_STOPPING)
WAITING = placement_pb2.PLACEMENT_STATE_WAITING
QUEUED, RUNNING = tuning_pb2.TASK_STATE_QUEUED, tuning_pb2.TASK_STATE_RUNNING
ENDED = (tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED, tuning_pb2.TASK_STATE_CANCELLED)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, models_root):
    """The services with three nodes of one place each; a silent node is lost soon."""
    house = House(
        tmp_path_factory.mktemp("cluster"),
        models_root,
        ALTO_PLACEMENT_LEASE_S=str(LEASE_S),
        ALTO_PLACEMENT_HEARTBEAT_S="0.5",
        ALTO_NODE_CHECKPOINT_INTERVAL_S="1",
        ALTO_NODE_THREADS="1",
        # This is about places: who joins another's executor needs none.
        ALTO_PLACEMENT_SHARING="off",
    )
    house.start()
    for node_id in NODES[1:]:
        house.start_node(node_id)
    try:
        with house.operator() as operator:
            until(lambda: ready(operator) == set(NODES), what="all nodes")
        yield house
    finally:
        house.stop()


def ready(operator):
    return {node.node_id for node in operator.nodes() if node.state == placement_pb2.NODE_STATE_READY}


def until(condition, timeout_s=90, what="it"):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)
    return found


class Watcher(threading.Thread):
    """Follows the plan as a chart would, and keeps every one."""

    def __init__(self, operator):
        super().__init__(daemon=True)
        self.operator, self.plans = operator, []

    def run(self):
        try:
            for plan in self.operator.watch_plan():
                self.plans.append(plan)
        except AltoError:
            pass


def submit(client, task_file, name, steps, **changes):
    search = {
        "base": {"batch_size": 4, "max_steps": steps, "max_length": 64, "epochs": 100},
        "grid": {"learning_rate": [1.0e-4, 1.0e-3, 3.0e-3], "lora_rank": [4, 8]},
    }
    loaded = load_task_file(task_file(name=name, search=search, **changes))
    train, validation = (client.upload_dataset(path).dataset_id for path in (loaded.dataset, loaded.validation))
    return client.create_task(task_spec(loaded, train, validation)).task_id


def by_id(plan):
    return {task.task_id: task for task in plan.tasks}


@pytest.mark.timeout(240)
def test_all_tasks_end_though_a_node_is_killed_and_what_was_told_was_true(cluster, task_file, tmp_path):
    with cluster.client() as client, cluster.operator() as operator:
        nodes = [cluster.process_of("node"), *(node.pid for node in cluster.nodes.values())]
        watcher = Watcher(operator)
        watcher.start()
        early = {"policy": "paper", "warmup_fraction": 0.1, "keep_fraction": 0.34}
        ids = [submit(client, task_file, f"search {i}", steps=240 - 30 * i, early_exit=early) for i in range(5)]
        until(lambda: sum(client.get_task(one).state == RUNNING for one in ids) == 3, what="three searches at once")

        with standing_still(*(worker for node in nodes for worker in children(node))):
            # Why the others wait is told in words, in figures, and names what they wait for.
            waiting = [task for task in map(client.get_task, ids) if task.state == QUEUED]
            for task in waiting:
                assert task.queue.reason in ("GPUS_BUSY", "TURN_OF_OTHERS"), task.queue
                assert set(task.forecast.waits_for) <= set(ids)
                assert task.forecast.waits_for
                assert task.forecast.start_time.ToDatetime() < task.forecast.end_time.ToDatetime()
            said = cluster.alto("why", waiting[0].task_id).stdout
            print(said)
            assert "is waiting" in said
            assert "waits for" in said
            running = next(t for t in map(client.get_task, ids) if t.state == RUNNING)
            said = cluster.alto("why", running.task_id).stdout
            print(said)
            assert f"node           {running.node_id}" in said
            chart = cluster.alto("plan").stdout
            print(chart)
            assert all(f"{node_id}/0" in chart for node_id in NODES)

        until(lambda: any(t.step >= 3 for one in held_by(operator, "node-b") for t in client.trials(one)))
        (victim,) = held_by(operator, "node-b")
        os.kill(cluster.nodes["node-b"].pid, signal.SIGKILL)
        until(lambda: ready(operator) == {"local", "node-c"}, what="the loss of node-b")
        lost = operator.plan().revision

        until(lambda: all(client.get_task(one).state in ENDED for one in ids), timeout_s=180, what="the end of all")
        tasks = {one: client.get_task(one) for one in ids}
        assert {task.state for task in tasks.values()} == {tuning_pb2.TASK_STATE_SUCCEEDED}
        assert all(task.savings.trials_stopped for task in tasks.values()), "early exit stopped nothing"
        said = cluster.alto("why", ids[0]).stdout
        print(said)
        assert "has succeeded" in said
        assert tasks[ids[0]].best_trial_id in said
        for one in ids:
            folder = client.download_adapter(one, tmp_path / one).folder
            assert (folder / "adapter_model.safetensors").stat().st_size > 0

        check_plans(watcher.plans, lost, victim)
        # No stale forecast stays behind.
        assert not any(client.get_task(one).HasField("forecast") for one in ids)
        until(lambda: not operator.plan().tasks, what="an empty plan")


def held_by(operator, node_id):
    return [task.task_id for task in operator.plan().tasks if task.node_id == node_id and task.state in HELD]


def check_plans(plans, lost, victim):
    """Every plan that was told: nobody shares a GPU, nobody is moved without reason, who waits knows why."""
    epochs = {}
    for plan in plans:
        held = [(task.node_id, gpu) for task in plan.tasks if task.state in HELD for gpu in task.gpu_indices]
        assert len(held) == len(set(held)), "two tasks on one GPU"
        if plan.revision >= lost:
            assert all(node_id != "node-b" for node_id, _ in held), "a dead node holds a task"
        for task in plan.tasks:
            if task.state == WAITING:
                assert task.queue.reason
                assert task.queue.explanation
            if task.epoch:
                epochs.setdefault(task.task_id, set()).add(task.epoch)
    moved = {task_id for task_id, seen in epochs.items() if len(seen) > 1}
    assert moved == {victim}, "only the dead node's task begins again"
    assert sorted({plan.revision for plan in plans}) == [plan.revision for plan in plans], "a plan came out of order"


def test_a_task_that_no_node_can_hold_is_refused_with_the_largest_that_fits(cluster, task_file):
    time.sleep(LEASE_S)  # until then a wider node might still join
    with cluster.client() as client:
        before = len(list(client.tasks()))
        for resources, words in (
            ({"gpus": 2}, "the most that a node has is 1"),
            ({"gpu_kind": "a100"}, "no node has GPUs of the kind 'a100'; there are: cpu (up to 1 on one node)"),
        ):
            with pytest.raises(AltoError, match="can ever hold") as caught:
                submit(client, task_file, "too much", 10, resources=resources)
            assert caught.value.reason == error_pb2.ERROR_REASON_TASK_UNPLACEABLE
            assert words in caught.value.message
            assert caught.value.metadata["largest_fit_gpus"] in ("0", "1")
        assert len(list(client.tasks())) == before


def test_a_drained_cluster_says_so_and_goes_on_when_it_may(cluster, task_file):
    with cluster.client() as client, cluster.operator() as operator:
        for node_id in ready(operator):
            cluster.alto("drain" if node_id == "local" else "cordon", node_id)
        task_id = submit(client, task_file, "patient", 5)
        until(lambda: client.get_task(task_id).queue.reason == "NO_NODE_READY")
        said = cluster.alto("why", task_id).stdout
        print(said)
        assert "local is being drained" in said
        assert "not foreseen" in said
        states = {
            node["node_id"]: node["state"] for node in json.loads(cluster.alto("nodes", "--json").stdout)["nodes"]
        }
        assert states["local"].endswith("DRAINING")
        cluster.alto("uncordon", "local")
        until(lambda: client.get_task(task_id).state in ENDED)
        assert client.get_task(task_id).state == tuning_pb2.TASK_STATE_SUCCEEDED
