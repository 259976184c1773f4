"""alto-placement put together: database, engine, server, health."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import structlog
from alto.v1 import placement_service_pb2_grpc
from alto_common.configuration import DATABASE_CURE, PORT_CURE
from alto_common.database import Database
from alto_common.loops import end_loops
from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import ServiceTokenAuthenticator
from alto_common.rpc.server import Server
from alto_common.rpc.tls import service_tls
from prometheus_client.metrics_core import Metric
from sqlalchemy import make_url

from alto_placement.engine import PlacementEngine
from alto_placement.metrics import cluster_metrics
from alto_placement.servicer import SCOPES, SERVICE, PlacementServicer
from alto_placement.settings import PlacementSettings
from alto_placement.store import MIGRATIONS, PlacementStore

HEALTH_INTERVAL_S = 1.0
HEALTH_TIMEOUT_S = 5.0  # psycopg takes 10 s more to give up a server that is silent
GRACE_S = 2.0
# For gc.set_threshold. Looking through all that is kept of 100,000 tasks for garbage stops everything for 0.4 s: it is
# done a sixteenth as often as by default. The middle generation is looked through while it is small: by default that
# stops a re-plan for 6 to 12 ms.
GARBAGE_THRESHOLDS = (700, 1, 1000)

log = structlog.get_logger("alto.placement")


class PlacementServer:
    """The service as one thing to start and stop. Both constructing and starting it may raise SettingsError."""

    def __init__(self, settings: PlacementSettings) -> None:
        self._settings = settings
        tls = service_tls(settings)
        with settings.needed("database_url", DATABASE_CURE):
            self._database = Database(settings.database_url, MIGRATIONS)
        self.engine = PlacementEngine(PlacementStore(self._database), settings)
        authenticator = ServiceTokenAuthenticator(settings.service_token)
        self._monitoring = Monitoring()
        self.server = Server(settings.listen, authenticator, SCOPES, [SERVICE], tls=tls, monitoring=self._monitoring)
        self._health: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Migrate the database, take up what it holds, and serve."""
        settings = self._settings
        with settings.needed("database_url", DATABASE_CURE):
            url = make_url(settings.database_url)
            if self._database.is_sqlite and url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            await self._database.migrate()
        await self.engine.start()
        servicer = PlacementServicer(self.engine, settings)
        placement_service_pb2_grpc.add_PlacementServiceServicer_to_server(servicer, self.server.grpc)
        with settings.needed("listen", PORT_CURE):
            await self.server.start()
        self._health = asyncio.create_task(self._look_after_health())
        self._monitoring.read_from(self._read_metrics)
        with settings.needed("metrics_listen", PORT_CURE):
            self.metrics_port = self._monitoring.start(settings.metrics_listen)

    async def stop(self) -> None:
        """End sessions and watches, then serve no more."""
        await asyncio.to_thread(self._monitoring.stop)
        if self._health is not None:
            await end_loops([self._health])
        await self.server.set_serving(False)
        await self.engine.stop()
        await self.server.stop(GRACE_S)
        await self._database.close()

    async def _read_metrics(self) -> Iterable[Metric]:
        # In a thread, over a copy: counting a long queue takes longer than a heartbeat may wait.
        view = self.engine.view()
        return await asyncio.to_thread(cluster_metrics, replace(view, state=view.state.copy()))

    async def _look_after_health(self) -> None:
        """SERVING while the database answers with the latest schema and the engine's loops run."""
        while True:
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    healthy = self.engine.is_alive and await self._database.is_current()
            except Exception:
                log.exception("the database does not answer")
                healthy = False
            await self.server.set_serving(healthy)
            await asyncio.sleep(HEALTH_INTERVAL_S)
