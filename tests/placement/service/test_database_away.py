"""Placement ends in order though its database is away: nodes and watchers hear of it."""

import asyncio

import grpc
import pytest
from alto.v1 import placement_service_pb2 as wire
from alto.v1 import placement_service_pb2_grpc
from alto_common.rpc.channel import service_channel
from alto_common.rpc.status import reason_in
from alto_placement.server import PlacementServer
from structlog.testing import capture_logs

from .test_placement_service import METADATA, TestNode, enqueue


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_sessions_and_watches_end_though_what_was_learned_cannot_be_kept(database_url, settings, refused):
    server = PlacementServer(settings.model_copy(update={"database_url": database_url}))
    await server.start()
    async with service_channel(f"127.0.0.1:{server.server.port}") as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        node = await TestNode(stub).connect()
        await enqueue(stub)
        await node.hears("assignment")
        await asyncio.sleep(3 * settings.refresh_s)  # plans that count what the tenant uses
        watch = stub.WatchPlan(wire.WatchPlanRequest(), metadata=METADATA)
        await watch.read()
        with capture_logs() as logs:
            async with refused(), asyncio.timeout(30):
                await server.stop()
        assert any(line["event"] == "what was learned last could not be kept" for line in logs)
        for call in (node.call, watch):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert reason_in(caught.value) == "UNAVAILABLE"
