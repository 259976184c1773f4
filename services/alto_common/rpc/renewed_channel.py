"""A channel over TLS that outlives its certificate: calls begin with what lies in the files then."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc

from alto_common.rpc.tls import CurrentTls, channel_credentials


class RenewedChannel(grpc.aio.Channel):
    """A channel to `address`. A call that begins after the files were replaced has a connection made with the new ones.

    Calls under way keep the connection they have, which is closed when the last of them has ended: cutting them off
    would cost the services their sessions at every renewal. So a stream that nobody wants any more must be cancelled:
    to drop it is not enough.
    """

    def __init__(self, address: str, tls: CurrentTls, options: Sequence[tuple[str, int | str]]) -> None:
        self._address = address
        self._tls = tls
        self._options = options
        self._calls: Counter[grpc.aio.Channel] = Counter()
        self._closing: set[asyncio.Task[None]] = set()
        self._shown = tls.newest()
        self._channel = self._connected()

    def _connected(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self._address, channel_credentials(self._shown), options=self._options)

    def _newest(self) -> grpc.aio.Channel:
        content = self._tls.newest()
        if content is not self._shown:
            before = self._channel
            self._shown = content
            self._channel = self._connected()
            self._close_unused(before)
        return self._channel

    def _method(self, arity: str, *described: Any, **named: Any) -> Callable[..., Any]:
        """Return a method of one of the four arities, as a stub has it."""

        def call(*arguments: Any, **options: Any) -> Any:
            channel = self._newest()
            begun: grpc.aio.Call = getattr(channel, arity)(*described, **named)(*arguments, **options)
            self._calls[channel] += 1
            begun.add_done_callback(partial(self._ended, channel))
            return begun

        return call

    def _ended(self, channel: grpc.aio.Channel, _call: object) -> None:
        self._calls[channel] -= 1
        self._close_unused(channel)

    def _close_unused(self, channel: grpc.aio.Channel) -> None:
        if self._calls[channel] > 0:
            return
        del self._calls[channel]
        if channel is not self._channel:
            closing = asyncio.ensure_future(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def unary_unary(self, *described: Any, **named: Any) -> Any:
        """Return a method with one request and one response."""
        return self._method("unary_unary", *described, **named)

    def unary_stream(self, *described: Any, **named: Any) -> Any:
        """Return a method with a stream of responses."""
        return self._method("unary_stream", *described, **named)

    def stream_unary(self, *described: Any, **named: Any) -> Any:
        """Return a method with a stream of requests."""
        return self._method("stream_unary", *described, **named)

    def stream_stream(self, *described: Any, **named: Any) -> Any:
        """Return a method with streams both ways."""
        return self._method("stream_stream", *described, **named)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return how the newest connection is."""
        return self._newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the newest connection is in another state."""
        await self._newest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the newest connection can be used."""
        await self._newest().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close every connection; calls under way have `grace` seconds."""
        await asyncio.gather(*(channel.close(grace) for channel in {self._channel, *self._calls}), *self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
