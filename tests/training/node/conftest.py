"""Real processes over real sockets: alto-placement and alto-node, a tiny Llama, and an admission that records."""

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from alto.v1 import (
    error_pb2,
    placement_pb2,
    placement_service_pb2,
    placement_service_pb2_grpc,
    report_service_pb2,
    report_service_pb2_grpc,
    training_node_service_pb2_grpc,
    tuning_pb2,
)
from alto_common.errors import DomainError
from alto_common.rpc.authentication import Scope, ServiceTokenAuthenticator
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_common.rpc.server import Server
from alto_common.tuning import TrialConfig
from alto_common.tuning_wire import trial_config_to_wire
from processes import children, free_ports

TOKEN = "token-of-the-tests"
METADATA = bearer_metadata(TOKEN)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, save_tiny_llama):
    """A models root with one random Llama of 2 layers and a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_llama(root / "tiny", hidden_size=48, intermediate_size=80, max_position_embeddings=64)
    return root


@dataclass
class RecordingAdmission(report_service_pb2_grpc.ReportServiceServicer):
    """Takes reports as admission does: in order, without gaps, fenced by epoch. `refuse` makes it unreachable."""

    reports: list = field(default_factory=list)
    highest_epoch: dict = field(default_factory=dict)
    sequences: dict = field(default_factory=dict)
    refused_epochs: list = field(default_factory=list)
    refuse: bool = False

    async def ReportEvents(self, requests, context):
        last = 0
        async for request in requests:
            if self.refuse:
                raise DomainError(error_pb2.ERROR_REASON_UNAVAILABLE, "not now")
            if request.epoch < self.highest_epoch.get(request.task_id, 0):
                self.refused_epochs.append(request.epoch)
                raise DomainError(error_pb2.ERROR_REASON_EPOCH_STALE, "another assignment has taken over")
            self.highest_epoch[request.task_id] = request.epoch
            key = (request.task_id, request.epoch)
            known = self.sequences.get(key, 0)
            if request.sequence == known + 1:
                self.sequences[key] = request.sequence
                self.reports.append(request)
            else:
                assert request.sequence <= known, "a gap in what a node reports"
            last = self.sequences[key]
        return report_service_pb2.ReportEventsResponse(acknowledged_sequence=last)

    def events(self, kind, task_id="task"):
        return [r.event for r in self.reports if r.task_id == task_id and r.event.WhichOneof("payload") == kind]

    def attempts(self, task_id="task"):
        return len({r.epoch for r in self.reports if r.task_id == task_id})

    def states(self, task_id="task"):
        return [event.task_state_changed.state for event in self.events("task_state_changed", task_id)]

    def measurements(self):
        """What every trial's curve looks like, each step once."""
        curves = {}
        for event in self.events("trial_measured"):
            metric = event.trial_measured.metric
            name = "validation" if metric.HasField("validation_loss") else "train"
            value = metric.validation_loss if name == "validation" else metric.train_loss
            curves.setdefault((event.trial_id, name), {})[metric.step] = value
        return curves

    def adapters(self):
        """The latest adapter of each trial: step and digests."""
        latest = {}
        for event in self.events("adapter_ready"):
            adapter = event.adapter_ready.adapter
            digests = {file.name: file.sha256 for file in adapter.files}
            latest[event.trial_id] = (adapter.step, digests["adapter_model.safetensors"])
        return latest


class Service:
    """One process of ours. Its output is shown when a test fails."""

    def __init__(self, module, environment, log):
        self._module, self.environment, self._log = module, environment, log
        self.process = None

    async def start(self):
        with self._log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=output,
            )

    async def kill(self, number=signal.SIGKILL):
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
        if self.process is not None:
            await self.process.wait()


class House:
    """Placement and nodes as processes, admission as a recorder in this one."""

    def __init__(self, folder: Path, models_root: Path):
        self.folder, self.models_root = folder, models_root
        self.admission = RecordingAdmission()
        self.artifact_root = folder / "artifacts"
        self.placement_port = free_ports()
        self.nodes = {}
        self.node_ports = {}
        self.placement = Service(
            "alto_placement",
            {
                "ALTO_PLACEMENT_LISTEN": f"127.0.0.1:{self.placement_port}",
                "ALTO_PLACEMENT_DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'placement.db'}",
                "ALTO_PLACEMENT_SERVICE_TOKEN": TOKEN,
                "ALTO_PLACEMENT_HEARTBEAT_S": "0.3",
                "ALTO_PLACEMENT_RETRY_DELAY_S": "0.1",
                "ALTO_PLACEMENT_REFRESH_S": "0.5",
            },
            folder / "placement.log",
        )

    async def open(self):
        scopes = {"/alto.v1.ReportService/ReportEvents": Scope.SERVICE}
        self._reports = Server("127.0.0.1:0", ServiceTokenAuthenticator(TOKEN), scopes, ["alto.v1.ReportService"])
        report_service_pb2_grpc.add_ReportServiceServicer_to_server(self.admission, self._reports.grpc)
        await self._reports.start()
        await self.placement.start()
        self._channel = service_channel(f"127.0.0.1:{self.placement_port}")
        self.stub = placement_service_pb2_grpc.PlacementServiceStub(self._channel)

    @asynccontextmanager
    async def given_up(self):
        """A list that the tasks come into which placement gives up: those that have ended are told of once."""
        tasks = []

        async def watch():
            request = placement_service_pb2.WatchPlanRequest()
            async for response in self.stub.WatchPlan(request, metadata=METADATA, wait_for_ready=True):
                tasks.extend(t for t in response.plan.tasks if t.state == placement_pb2.PLACEMENT_STATE_GIVEN_UP)

        watching = asyncio.create_task(watch())
        yield tasks
        watching.cancel()

    async def restart_placement(self, **settings):
        """Kill placement and start it again, with these settings changed."""
        await self.placement.kill()
        self.placement.environment.update({f"ALTO_PLACEMENT_{name.upper()}": value for name, value in settings.items()})
        await self.placement.start()

    async def start_node(self, node_id="node-a", **settings):
        self.node_ports[node_id] = free_ports()
        environment = {
            "ALTO_NODE_LISTEN": f"127.0.0.1:{self.node_ports[node_id]}",
            "ALTO_NODE_NODE_ID": node_id,
            "ALTO_NODE_SERVICE_TOKEN": TOKEN,
            "ALTO_NODE_PLACEMENT_ADDRESS": f"127.0.0.1:{self.placement_port}",
            "ALTO_NODE_REPORT_ADDRESS": f"127.0.0.1:{self._reports.port}",
            "ALTO_NODE_ARTIFACT_ROOT": str(self.artifact_root),
            "ALTO_NODE_WORK_ROOT": str(self.folder / node_id),
            "ALTO_NODE_MODELS_ROOT": str(self.models_root),
            "ALTO_NODE_DEVICE": "cpu",
            "ALTO_NODE_KERNEL_BACKEND": "reference",
            "ALTO_NODE_THREADS": "1",
            "ALTO_NODE_CHECKPOINT_INTERVAL_S": "0.2",
            **{f"ALTO_NODE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        node = self.nodes[node_id] = Service("alto_training", environment, self.folder / f"{node_id}.log")
        await node.start()
        return node

    async def close(self):
        for service in (*self.nodes.values(), self.placement):
            await service.kill()
        await self._channel.close()
        await self._reports.stop(0)

    def logs(self):
        return "\n".join(f"--- {path}\n{path.read_text()[-6000:]}" for path in sorted(self.folder.rglob("*.log")))

    def logged(self, node_id, event):
        """What a node has logged as `event`, in order."""
        lines = (self.folder / f"{node_id}.log").read_text().splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in said if line["event"] == event]

    def work(self, task_id="task", steps=12, trials=2, rows=24, config=None, **changes):
        """A task over rows that go through the artifact store; its validation rows are split off by the node."""
        content = b"".join(
            json.dumps({"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}"}).encode() + b"\n" for i in range(rows)
        )
        path = self.artifact_root / "datasets" / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        config = {"lora_rank": 4, "batch_size": 2, "max_steps": steps, "max_length": 32, **(config or {})}
        work = placement_pb2.TuningWork(
            task_id=task_id,
            base_model="tiny",
            train=placement_pb2.Artifact(
                path="datasets/rows.jsonl", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
            ),
            validation_fraction=0.2,
            early_exit=tuning_pb2.EarlyExit(policy="none"),
            evaluation=tuning_pb2.Evaluation(count=4),
            artifact_folder=f"tasks/{task_id}",
            trials=[
                placement_pb2.PlannedTrial(
                    trial_id=f"trial-{i}",
                    config=trial_config_to_wire(TrialConfig(**config, learning_rate=1e-3 * (i + 1), seed=i)),
                )
                for i in range(trials)
            ],
        )
        for name, value in changes.items():
            if isinstance(value, str):
                setattr(work, name, value)
            else:
                getattr(work, name).CopyFrom(value)
        return work

    async def enqueue(self, work, gpus=1, tenant="acme", size=None):
        resources = tuning_pb2.Resources(gpus=gpus)
        request = placement_service_pb2.EnqueueTaskRequest(tenant=tenant, work=work, resources=resources, size=size)
        return await self.stub.EnqueueTask(request, metadata=METADATA, timeout=20, wait_for_ready=True)

    async def plan(self):
        response = await self.stub.GetPlan(
            placement_service_pb2.GetPlanRequest(), metadata=METADATA, timeout=20, wait_for_ready=True
        )
        return response.plan

    async def planned(self, task_id="task"):
        """The task in the plan, None when it has ended."""
        return next((task for task in (await self.plan()).tasks if task.task_id == task_id), None)

    async def ended(self, task_id="task"):
        return await self.planned(task_id) is None

    def worker_process(self, node_id="node-a"):
        """The process id of the worker that runs on a node, if one does."""
        workers = children(self.nodes[node_id].process.pid)
        return workers[0] if workers else None


async def until(condition, timeout_s=240.0, what="it"):
    """Wait until a condition holds (a function, or an async one). Right is right, however slow the machine is."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        await asyncio.sleep(0.05)


@pytest.fixture
def wait_until():
    return until


@pytest.fixture
async def house(tmp_path, tiny_model, request):
    opened = House(tmp_path, tiny_model)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()
        # pytest shows it with a failing test only.
        print(opened.logs())


@pytest.fixture
def node_stub(house):
    """Opens a stub of a node's TrainingNodeService."""

    @asynccontextmanager
    async def open_stub(node_id="node-a"):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{house.node_ports[node_id]}") as channel:
            yield training_node_service_pb2_grpc.TrainingNodeServiceStub(channel)

    return open_stub


@pytest.fixture
def metadata():
    return METADATA
