"""A session's cancellation is never lost, not even when placement ends in the same moment."""

import asyncio

import grpc
import pytest
from alto.v1 import placement_pb2, placement_service_pb2
from alto_training.session import PlacementSession


class EndingCall:
    """A stream that breaks exactly when its reader is cancelled."""

    def __init__(self):
        self.broken = asyncio.get_running_loop().create_future()

    async def read(self):
        return await self.broken

    def cancel(self):
        pass


class Placement:
    def __init__(self):
        self.calls = []

    async def RegisterNode(self, request, **_):
        return placement_service_pb2.RegisterNodeResponse()

    def NodeSession(self, requests, **_):
        self.calls.append(EndingCall())
        return self.calls[-1]


class Assignments:
    def begin_session(self):
        pass


class Node:
    assignments = Assignments()


async def test_a_cancellation_together_with_the_end_of_the_stream_ends_the_session():
    channel = grpc.aio.insecure_channel("127.0.0.1:9")
    session = PlacementSession(Node(), placement_pb2.Node(node_id="n"), "i", channel, "token")
    placement = session._placement = Placement()
    running = asyncio.create_task(session.run())
    while not placement.calls:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    placement.calls[0].broken.set_exception(
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, None, details="end")
    )
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)
    await channel.close()
