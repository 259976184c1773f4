"""alto-node put together: the node, its session with placement, its server, its health."""

from __future__ import annotations

import asyncio
import fcntl
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import grpc
import structlog
from alto.v1 import placement_pb2, training_node_service_pb2_grpc
from alto_common.configuration import FOLDER_CURE, PORT_CURE, make_writable
from alto_common.loops import end_loops
from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import ServiceTokenAuthenticator
from alto_common.rpc.channel import service_channel
from alto_common.rpc.server import Server
from alto_common.rpc.tls import service_tls
from alto_common.version import package_version
from prometheus_client.metrics_core import Metric

from alto_training.assignments import StopReason
from alto_training.devices import Devices, find_devices
from alto_training.metrics import node_metrics
from alto_training.node import TrainingNode
from alto_training.servicer import SCOPES, SERVICE, TrainingNodeServicer
from alto_training.session import PlacementSession, SupersededError
from alto_training.settings import NodeSettings

HEALTH_INTERVAL_S = 0.5
GRACE_S = 2.0
DRAIN_POLL_S = 0.1
# How long to wait for placement to hear that nothing is left.
LAST_WORD_S = 5.0
SWEEP_INTERVAL_S = 86400.0

log = structlog.get_logger("alto.node")


class NodeServer:
    """The service as one thing to start and stop. `superseded` is set when another process has taken this node's id.

    `facts` are, once it has started, what an operator wants to read of it. Constructing it may raise SettingsError.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.superseded = asyncio.Event()
        self.facts: dict[str, object] = {}
        self._tls = service_tls(settings)
        authenticator = ServiceTokenAuthenticator(settings.service_token)
        self._monitoring = Monitoring()
        self.server = Server(
            settings.listen, authenticator, SCOPES, [SERVICE], tls=self._tls, monitoring=self._monitoring
        )
        self._settings = settings
        self._loops: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []
        self._lock: TextIO | None = None
        self._node: TrainingNode | None = None
        self._session: PlacementSession | None = None

    async def start(self) -> None:
        """Serve, then look for placement. Raises SettingsError."""
        settings = self._settings
        with settings.needed("work_root", f"{FOLDER_CURE}, of this node alone"):
            self._lock = _lock(settings.work_root)
        devices = await asyncio.to_thread(find_devices, settings.gpus, settings.gpu_kind, settings.device)
        self._channels = [
            service_channel(address, self._tls) for address in (settings.placement_address, settings.report_address)
        ]
        node = self._node = TrainingNode(settings, devices, self._channels[1])
        await asyncio.to_thread(node.sweep)
        described = _described(settings, devices)
        self.facts = {
            "node_id": settings.node_id,
            "gpu_kind": devices.kind,
            "places": devices.places,
            "gpus": list(devices.indices),
        }
        servicer = TrainingNodeServicer(node, described)
        training_node_service_pb2_grpc.add_TrainingNodeServiceServicer_to_server(servicer, self.server.grpc)
        with settings.needed("listen", PORT_CURE):
            await self.server.start()

        async def read_metrics() -> list[Metric]:
            return node_metrics(node.assignments, devices.places, node.clock())

        self._monitoring.read_from(read_metrics)
        with settings.needed("metrics_listen", PORT_CURE):
            self.metrics_port = self._monitoring.start(settings.metrics_listen)
        incarnation = secrets.token_hex(8)
        session = PlacementSession(node, described, incarnation, self._channels[0], settings.service_token)
        self._session = session
        self._loops = [
            asyncio.create_task(self._stay_in_touch(session)),
            asyncio.create_task(node.keep_lease()),
            asyncio.create_task(self._look_after_health(session)),
            asyncio.create_task(_keep_swept(node)),
        ]

    async def stop(self) -> None:
        """Have the workers write their checkpoints, tell placement, and end."""
        await self.server.set_serving(False)
        await asyncio.to_thread(self._monitoring.stop)
        node, session = self._node, self._session
        if node is not None and session is not None:
            node.leave(StopReason.DRAINED)
            await _until(lambda: not node.assignments.held, self._settings.shutdown_grace_s)
            await node.close()
            await _until(lambda: node.assignments.has_left or not session.is_connected, LAST_WORD_S)
        await end_loops(self._loops)
        await self.server.stop(GRACE_S)
        for channel in self._channels:
            await channel.close()
        if self._lock is not None:
            self._lock.close()

    async def _stay_in_touch(self, session: PlacementSession) -> None:
        try:
            await session.run()
        except SupersededError as error:
            log.error("this node must stop", error=str(error))
            if self._node is not None:
                self._node.leave(StopReason.SUPERSEDED)
            self.superseded.set()

    async def _look_after_health(self, session: PlacementSession) -> None:
        """SERVING while placement answers."""
        while True:
            await self.server.set_serving(session.is_connected)
            await asyncio.sleep(HEALTH_INTERVAL_S)


async def _keep_swept(node: TrainingNode) -> None:
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        await asyncio.to_thread(node.sweep)


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a condition holds, at most for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(DRAIN_POLL_S)


def _described(settings: NodeSettings, devices: Devices) -> placement_pb2.Node:
    return placement_pb2.Node(
        node_id=settings.node_id,
        gpu_kind=devices.kind,
        gpus=devices.places,
        memory_bytes_per_gpu=devices.memory_bytes_per_place,
        address=settings.listen,
        version=package_version(),
    )


def _lock(work_root: Path) -> TextIO:
    """Take the work folder for this process alone. Raises OSError, RuntimeError."""
    make_writable(work_root)
    file = (work_root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(f"another node uses {work_root}") from error
    return file
