"""Wires admission together, starts it and ends it: two ports, two loops towards placement, one database."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from alto.v1 import admission_service_pb2_grpc, report_service_pb2_grpc
from alto_common.artifacts import ArtifactStore
from alto_common.configuration import DATABASE_CURE, FOLDER_CURE, PORT_CURE, make_writable
from alto_common.database import Database
from alto_common.errors import DomainError
from alto_common.loops import end_loops
from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import Scope, ServiceTokenAuthenticator
from alto_common.rpc.server import Server
from alto_common.rpc.tls import TlsFiles, service_tls, tls_files

from alto_admission.access import ADMISSION_SERVICE, REPORT_SERVICE, SERVICE_SCOPES, TENANT_SCOPES
from alto_admission.adapters import Adapters
from alto_admission.api_keys import KeyAuthenticator, kept_key, new_key
from alto_admission.dispatcher import Dispatcher
from alto_admission.event_hub import EventHub
from alto_admission.heavy_work import ModelSources
from alto_admission.metrics import SearchCounts, queue_metrics
from alto_admission.models import Models
from alto_admission.placement_client import PlacementClient
from alto_admission.plan_watcher import PlanWatcher
from alto_admission.report_servicer import ReportServicer
from alto_admission.request_check import check_request
from alto_admission.servicer import AdmissionServicer
from alto_admission.settings import AdmissionSettings
from alto_admission.store.datasets import DatasetStore
from alto_admission.store.keys import KeyStore
from alto_admission.store.outbox import Outbox
from alto_admission.store.tasks import TaskStore
from alto_admission.tuning_tasks import TuningTasks
from alto_admission.uploads import Uploads
from alto_admission.watch import Watches, WatchSettings
from alto_admission.worker import Worker

MIGRATIONS = Path(__file__).parent / "migrations"
HEALTH_S = 2.0
LOCAL_TENANT = "local"

log = structlog.get_logger("alto.admission")


def clock_us() -> int:
    """Return the time: microseconds since the epoch, UTC."""
    return time.time_ns() // 1000


class AdmissionServer:
    """One admission process. `start`, then `stop`. Both constructing and starting it may raise SettingsError."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self.settings = settings
        tls = service_tls(settings)
        public_tls = _public_tls(settings, tls)
        self.database = open_database(settings)
        self._monitoring = Monitoring()
        self.keys = KeyStore(self.database)
        counts = SearchCounts(self._monitoring)
        self.tasks = TaskStore(self.database, clock_us, self._on_change, settings.events_kept, counts.take)
        self.hub = EventHub(self.tasks.last_sequences, settings.poll_s)
        datasets = DatasetStore(self.database)
        outbox = self._outbox = Outbox(self.database)
        with settings.needed("artifact_root", "give a folder, or a URL whose fsspec package is installed"):
            artifacts = ArtifactStore(settings.artifact_root)
        self._artifacts = artifacts
        # Apart, so that reading a large upload does not hold up a small request.
        self._model_worker = Worker("model")
        self._file_worker = Worker("file")
        sources = ModelSources(settings.models_root, settings.allowed_folders, settings.allow_hub)
        self._models = Models(self._model_worker, sources)
        self._uploads = Uploads(
            datasets,
            artifacts,
            self._file_worker,
            settings.upload_folder,
            settings.dataset_limits,
            settings.max_stored_dataset_bytes,
            clock_us,
        )
        self._placement = PlacementClient(settings.placement_address, settings.service_token, tls)
        tuning_tasks = TuningTasks(
            self.tasks,
            datasets,
            self._models,
            artifacts,
            self._placement,
            clock_us,
            settings.max_trials,
            settings.max_unfinished_tasks,
        )
        self._dispatcher = Dispatcher(outbox, self.tasks, tuning_tasks, self._placement, clock_us)
        self._plan_watcher = PlanWatcher(self._placement, self.tasks, outbox, settings.plan_grace_s)
        watches = Watches(
            self.tasks,
            self.hub,
            clock_us,
            WatchSettings(settings.heartbeat_s, max_lag=settings.max_watch_lag, max_per_tenant=settings.max_watches),
        )
        adapters = Adapters(self.tasks, artifacts)
        self.public = Server(
            settings.listen,
            KeyAuthenticator(self.keys, clock_us),
            TENANT_SCOPES,
            [ADMISSION_SERVICE],
            tls=public_tls,
            monitoring=self._monitoring,
            check=partial(check_request, max_trials=settings.max_trials),
        )
        self.internal = Server(
            settings.internal_listen,
            ServiceTokenAuthenticator(settings.service_token),
            SERVICE_SCOPES,
            [REPORT_SERVICE],
            tls=tls,
            monitoring=self._monitoring,
        )
        servicer = AdmissionServicer(
            tuning_tasks,
            self.tasks,
            datasets,
            self._uploads,
            adapters,
            self._models,
            watches,
            self._placement,
            self._plan_watcher,
        )
        admission_service_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, self.public.grpc)
        report_service_pb2_grpc.add_ReportServiceServicer_to_server(ReportServicer(self.tasks), self.internal.grpc)
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Migrate the database, bind both ports, and begin the loops. Ready as soon as health says SERVING."""
        await self._prepare()
        for loop in (
            self._dispatcher.run(),
            self._plan_watcher.run(),
            self.hub.poll(),
            self._watch_health(),
            self._uploads.keep_clean(),
        ):
            self._begin(loop)
        self._begin(self._warm())

    async def _prepare(self) -> None:
        """Have everything that the settings name, or say which of it cannot be had. Raises SettingsError."""
        settings = self.settings
        with settings.needed("database_url", DATABASE_CURE):
            await self.database.migrate()
        if settings.local_key_file is not None:
            with settings.needed("local_key_file", "name a file that can be written and holds a key, or none yet"):
                await self._write_local_key(settings.local_key_file)
        with settings.needed("artifact_root", FOLDER_CURE):
            if (root := self._artifacts.local_root) is not None:
                make_writable(root)
        with settings.needed("upload_folder", FOLDER_CURE):
            make_writable(settings.upload_folder)
        with settings.needed("internal_listen", PORT_CURE):
            await self.internal.start()
        with settings.needed("listen", PORT_CURE):
            await self.public.start()
        self._monitoring.read_from(lambda: queue_metrics(self.tasks, self._outbox, clock_us()))
        with settings.needed("metrics_listen", PORT_CURE):
            self.metrics_port = self._monitoring.start(settings.metrics_listen)

    async def stop(self) -> None:
        """End gracefully: NOT_SERVING, every watch ended with its last token, calls in flight finished, then all."""
        for server in (self.public, self.internal):
            await server.set_serving(False)
        await asyncio.to_thread(self._monitoring.stop)
        self.hub.close()
        await end_loops(self._loops)
        await asyncio.gather(*(server.stop(self.settings.drain_s) for server in (self.public, self.internal)))
        await self._placement.close()
        self._model_worker.close()
        self._file_worker.close()
        await self.database.close()

    def _begin(self, loop: Coroutine[Any, Any, None]) -> None:
        self._loops.append(asyncio.create_task(loop))

    def _on_change(self, task_id: str, last_event_sequence: int) -> None:
        self.hub.announce(task_id, last_event_sequence)
        self._dispatcher.wake()

    async def _watch_health(self) -> None:
        """Say SERVING while the database answers and its schema is current."""
        while True:
            try:
                async with asyncio.timeout(HEALTH_S):
                    healthy = await self.database.is_current()
            except Exception as error:
                log.warning("the database does not answer", error=str(error))
                healthy = False
            for server in (self.public, self.internal):
                await server.set_serving(healthy)
            await asyncio.sleep(HEALTH_S)

    async def _warm(self) -> None:
        """Inspect the base models that are there, so that the first request does not wait for it."""
        try:
            await self._models.all()
        except DomainError as error:
            log.warning("cannot inspect the base models", error=error.message)

    async def _write_local_key(self, file: Path) -> None:
        """Give the tenant "local" the key in `file`; when that is absent make one that only its owner can read."""
        scopes = [Scope.READ, Scope.WRITE]
        if file.exists():
            # The database may be a new one.
            kept = kept_key(file.read_text().strip(), LOCAL_TENANT, scopes, clock_us())
            if await self.keys.by_sha256(kept.key_sha256) is None:
                await self.keys.add(kept)
            return
        secret, kept = new_key(LOCAL_TENANT, scopes, clock_us())
        file.parent.mkdir(parents=True, exist_ok=True)
        await self.keys.add(kept)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secret + "\n")
        aside.rename(file)


def _public_tls(settings: AdmissionSettings, own: TlsFiles | None) -> TlsFiles | None:
    """Return what tenants are shown. Raises SettingsError."""
    public = tls_files(settings, "public_tls", settings.public_tls_certificate, settings.public_tls_key)
    if public is None and own is not None:
        return own.without_roots()
    return public


def open_database(settings: AdmissionSettings) -> Database:
    """Return the database of the settings; the folder of a SQLite file is made. Raises SettingsError."""
    with settings.needed("database_url", DATABASE_CURE):
        prefix, separator, path = settings.database_url.partition(":///")
        if prefix.startswith("sqlite") and separator and path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        return Database(settings.database_url, MIGRATIONS)
