"""A real admission server on real sockets, with a placement that does what a test tells it."""

import asyncio
import hashlib
import json
import uuid
from dataclasses import asdict, dataclass

import grpc
import pytest
from alto.v1 import (
    admission_service_pb2,
    admission_service_pb2_grpc,
    placement_pb2,
    placement_service_pb2,
    placement_service_pb2_grpc,
    report_service_pb2_grpc,
    tuning_pb2,
)
from alto_admission.api_keys import new_key
from alto_admission.server import AdmissionServer, clock_us
from alto_admission.settings import AdmissionSettings
from alto_common import base_models
from alto_common.base_models import ModelFacts
from alto_common.rpc.authentication import Scope, ServiceTokenAuthenticator
from alto_common.rpc.channel import bearer_metadata
from alto_common.rpc.server import Server
from tokenizers import Tokenizer, models, pre_tokenizers

MODEL = "tiny-llama"
SERVICE_TOKEN = "the-service-token"
FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    hidden_size=48,
    layers=2,
    vocabulary=64,
    context_length=128,
    parameters=100_000,
    bytes=400_000,
    linear_modules={
        f"model.layers.{layer}.self_attn.{name}": (48, 24 if name == "k_proj" else 48)
        for layer in range(2)
        for name in ("q_proj", "k_proj")
    },
    has_chat_template=False,
    tokenizer_vocabulary=3,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
ROWS = b"".join(
    json.dumps({"prompt": f"q {number}", "completion": f"a {number}"}).encode() + b"\n" for number in range(20)
)


@pytest.fixture
def models_root(tmp_path, monkeypatch):
    """A root with one model whose facts are known already: no test here needs torch."""
    root = tmp_path / "models"
    folder = root / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "q": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    monkeypatch.setenv("ALTO_MODELS", str(root))
    know_model(root, FACTS)
    return root


def know_model(root, facts):
    """Keep facts about the model as it is now, so that nothing inspects it."""
    cached = root.parent / "model-facts" / f"{base_models._fingerprint(str(root / MODEL))}.json"
    cached.parent.mkdir(exist_ok=True)
    cached.write_text(json.dumps(asdict(facts)))


class FakePlacement(placement_service_pb2_grpc.PlacementServiceServicer):
    """Keeps what it is told, and tells watchers what it plans; `show` tells them anything else.

    `refuse` makes every call fail with that status; answers to what is queued and taken out wait for `may_answer`.
    """

    def __init__(self):
        self.enqueued = {}
        self.calls = []
        self.refuse = None
        self.answer = placement_pb2.PLACEMENT_STATE_WAITING
        self.failure = None
        self.watchers = []
        self.gpu_kind = "h100"
        self.plan = placement_pb2.Plan()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def EnqueueTask(self, request, context):
        await self._maybe_refuse(context)
        task_id = request.work.task_id
        self.calls.append(("enqueue", task_id))
        self.enqueued.setdefault(task_id, request)
        queue = tuning_pb2.QueueStatus(reason="PLANNING", explanation="The plan is being made.")
        task = placement_pb2.PlannedTask(task_id=task_id, state=self.answer, queue=queue, failure=self.failure)
        self.show(*self._others(task_id), task)
        await self.may_answer.wait()
        return placement_service_pb2.EnqueueTaskResponse(task=task)

    async def DequeueTask(self, request, context):
        await self._maybe_refuse(context)
        self.calls.append(("dequeue", request.task_id))
        self.show(*self._others(request.task_id))
        await self.may_answer.wait()
        return placement_service_pb2.DequeueTaskResponse()

    async def UpdateTask(self, request, context):
        await self._maybe_refuse(context)
        if request.HasField("held"):
            self.calls.append(("hold" if request.held else "let go", request.task_id))
        if request.stop_trial_ids:
            self.calls.append(("stop", *request.stop_trial_ids))
        return placement_service_pb2.UpdateTaskResponse()

    async def EstimateTask(self, request, context):
        await self._maybe_refuse(context)
        response = placement_service_pb2.EstimateTaskResponse(basis="prior, never measured", gpu_kind=self.gpu_kind)
        response.duration.expected.FromSeconds(1800)
        response.duration.upper.FromSeconds(3600)
        return response

    async def WatchPlan(self, request, context):
        await self._maybe_refuse(context)
        queue = asyncio.Queue()
        queue.put_nowait(self.plan)
        self.watchers.append(queue)
        while True:
            yield placement_service_pb2.WatchPlanResponse(plan=await queue.get())

    def show(self, *tasks):
        self.plan = placement_pb2.Plan(tasks=tasks)
        for watcher in self.watchers:
            watcher.put_nowait(self.plan)

    def _others(self, task_id):
        return [task for task in self.plan.tasks if task.task_id != task_id]

    async def _maybe_refuse(self, context):
        if self.refuse is not None:
            await context.abort(*self.refuse)


@pytest.fixture
async def placement():
    """A placement service on a real socket; `port` is set."""
    names = ("EnqueueTask", "DequeueTask", "UpdateTask", "EstimateTask", "WatchPlan")
    scopes = {f"/alto.v1.PlacementService/{name}": Scope.SERVICE for name in names}
    server = Server("127.0.0.1:0", ServiceTokenAuthenticator(SERVICE_TOKEN), scopes, ["alto.v1.PlacementService"])
    servicer = FakePlacement()
    placement_service_pb2_grpc.add_PlacementServiceServicer_to_server(servicer, server.grpc)
    await server.start()
    servicer.port = server.port
    yield servicer
    await server.stop(0)


@pytest.fixture
def settings_of(tmp_path, models_root):
    """A function from overrides to the settings of a server of this test's own."""

    def make(**overrides):
        values = {
            "service_token": SERVICE_TOKEN,
            "listen": "127.0.0.1:0",
            "internal_listen": "127.0.0.1:0",
            "database_url": f"sqlite+aiosqlite:///{tmp_path / 'admission.db'}",
            "artifact_root": str(tmp_path / "artifacts"),
            "upload_folder": tmp_path / "uploads",
            "models_root": models_root,
            "placement_address": "127.0.0.1:1",
            "poll_s": 0.05,
            "drain_s": 0.5,
        }
        return AdmissionSettings(**{**values, **overrides})

    return make


@dataclass
class Client:
    """One caller of a server."""

    channel: grpc.aio.Channel
    metadata: tuple

    def __post_init__(self):
        self.stub = admission_service_pb2_grpc.AdmissionServiceStub(self.channel)

    async def call(self, name, request):
        return await getattr(self.stub, name)(request, metadata=self.metadata, timeout=20)

    def stream(self, name, request):
        return getattr(self.stub, name)(request, metadata=self.metadata, timeout=20)

    async def upload(self, content=ROWS, request_id=None, file_name="rows.jsonl", **header):
        header = {
            "request_id": request_id or uuid.uuid4().hex,
            "file_name": file_name,
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        } | header
        messages = upload_messages(header, content)
        response = await self.stub.UploadDataset(iter(messages), metadata=self.metadata, timeout=20)
        return response.dataset

    async def create(self, dataset_id=None, request_id=None, validate_only=False, **spec):
        if dataset_id is None:
            dataset_id = (await self.upload()).dataset_id
        request = admission_service_pb2.CreateTuningTaskRequest(
            request_id=request_id or uuid.uuid4().hex, spec=spec_of(dataset_id, **spec), validate_only=validate_only
        )
        return (await self.call("CreateTuningTask", request)).task


def upload_messages(header, content, offset=0, step=100):
    """The messages of an upload that carries on at `offset`."""
    yield admission_service_pb2.UploadDatasetRequest(header=admission_service_pb2.DatasetUploadHeader(**header))
    for start in range(offset, len(content), step):
        chunk = admission_service_pb2.DatasetChunk(offset=start, data=content[start : start + step])
        yield admission_service_pb2.UploadDatasetRequest(chunk=chunk)


def spec_of(dataset_id, trials=2, **fields):
    """A sound specification: `trials` written configurations over the tiny model."""
    configs = [tuning_pb2.TrialConfig(lora_rank=2 + number, max_length=64) for number in range(trials)]
    values = {
        "base_model": MODEL,
        "dataset_id": dataset_id,
        "search_space": tuning_pb2.SearchSpace(explicit=tuning_pb2.ExplicitSearch(configs=configs)),
    }
    return tuning_pb2.TuningTaskSpec(**{**values, **fields})


class Running:
    """A server that runs, with ways in."""

    def __init__(self, server):
        self.server = server
        self.public = grpc.aio.insecure_channel(f"127.0.0.1:{server.public.port}")
        self.internal = grpc.aio.insecure_channel(f"127.0.0.1:{server.internal.port}")
        self.reports = report_service_pb2_grpc.ReportServiceStub(self.internal)

    async def client(self, tenant="acme", scopes=("read", "write"), expire_us=None):
        secret, kept = new_key(tenant, scopes, clock_us(), expire_us)
        await self.server.keys.add(kept)
        return Client(self.public, bearer_metadata(secret))

    async def report(self, requests):
        response = await self.reports.ReportEvents(iter(requests), metadata=bearer_metadata(SERVICE_TOKEN), timeout=20)
        return response.acknowledged_sequence

    async def close(self):
        await self.public.close()
        await self.internal.close()
        await self.server.stop()


@pytest.fixture
async def started(settings_of, placement):
    """A function that starts a server; all are stopped at the end.

    Ask for `database_url` before it: what is asked for first goes last, and servers stop before their database goes.
    """
    running = []

    async def start(**overrides):
        server = AdmissionServer(settings_of(**{"placement_address": f"127.0.0.1:{placement.port}", **overrides}))
        await server.start()
        running.append(Running(server))
        return running[-1]

    yield start
    for one in running:
        await one.close()


@pytest.fixture
async def admission(started):
    """A server with the usual settings."""
    return await started()
