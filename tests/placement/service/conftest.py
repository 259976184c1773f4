"""Placement as a server of a test's own, on a real socket and over a database of its own."""

import pytest
from alto.v1 import placement_service_pb2_grpc
from alto_common.rpc.channel import service_channel
from alto_placement.server import PlacementServer
from alto_placement.settings import PlacementSettings


@pytest.fixture
def lease_s():
    return 60.0


@pytest.fixture
def settings(tmp_path, lease_s):
    return PlacementSettings(
        listen="127.0.0.1:0",
        database_url=f"sqlite+aiosqlite:///{tmp_path / 'placement.db'}",
        service_token="secret",
        lease_s=lease_s,
        heartbeat_s=0.2,
        retry_delay_s=0.05,
        refresh_s=0.2,
        decision_budget_s=0,
        metrics_listen="127.0.0.1:0",
    )


@pytest.fixture
async def placement(settings):
    server = PlacementServer(settings)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def stub(placement):
    async with service_channel(f"127.0.0.1:{placement.server.port}") as channel:
        yield placement_service_pb2_grpc.PlacementServiceStub(channel)
