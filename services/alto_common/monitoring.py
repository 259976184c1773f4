"""What a service counts and measures of itself, for Prometheus to read: one page over HTTP, beside the service's ports.

Counters and histograms are kept as things happen. What is there at the moment (tasks in each state, the plan, places)
is read when the page is asked for, on the service's own event loop, so that it needs no lock and no second book.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from threading import Thread
from typing import TypeAlias
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# The page is asked for every 15 s or so, and Prometheus waits 10 s for it.
READ_TIMEOUT_S = 5.0
_CALL_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

Read: TypeAlias = Callable[[], Awaitable[Iterable[Metric]]]

log = structlog.get_logger("alto.monitoring")


class Monitoring:
    """The numbers of one process. `registry` is where a service adds its own.

    >>> numbers = Monitoring()
    >>> numbers.call_ended("/alto.v1.AdmissionService/GetTuningTask", "OK", 0.002)
    >>> numbers.registry.get_sample_value("alto_calls_total", {"method": "GetTuningTask", "code": "OK"})
    1.0
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._calls = Counter("alto_calls", "Calls that ended, streams too", ["method", "code"], registry=self.registry)
        self._seconds = Histogram(
            "alto_call_seconds",
            "From the arrival of a call to its response; calls with one response",
            ["method"],
            buckets=_CALL_SECONDS,
            registry=self.registry,
        )
        self._streams = Gauge(
            "alto_open_streams", "Streams of responses that are open", ["method"], registry=self.registry
        )
        self._unread = Counter("alto_unread_states", "Times that the state could not be read", registry=self.registry)
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def call_ended(self, method: str, code: str, seconds: float | None) -> None:
        """Count a call of a method (its full name); `seconds` None for a stream of responses."""
        name = method.rpartition("/")[2]
        self._calls.labels(name, code).inc()
        if seconds is not None:
            self._seconds.labels(name).observe(seconds)

    def stream_opened(self, method: str, by: int) -> None:
        """Count a stream that opened (1) or closed (-1)."""
        self._streams.labels(method.rpartition("/")[2]).inc(by)

    def read_from(self, read: Read) -> None:
        """Have the page show what `read` returns; it is called on the event loop that runs now."""
        self.registry.register(_OnLoop(asyncio.get_running_loop(), read, self._unread))

    def start(self, listen: str) -> int:
        """Serve the page at `listen`, host:port, and return the port; "" serves none. Raises OSError, ValueError."""
        if not listen:
            return 0
        host, _, port = listen.rpartition(":")
        self._server, self._thread = start_http_server(int(port), host.strip("[]"), self.registry)
        return int(self._server.server_port)

    def stop(self) -> None:
        """Serve it no more."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = None


class _OnLoop(Collector):
    """Asks an event loop, from the thread of whoever reads the page. What cannot be read now is left out."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Read, unread: Counter) -> None:
        self._loop = loop
        self._read = read
        self._unread = unread

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is to read is known when it is read."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return what is there now."""
        asked = asyncio.run_coroutine_threadsafe(self._reading(), self._loop)
        try:
            return asked.result(READ_TIMEOUT_S)
        except Exception as error:
            asked.cancel()
            self._unread.inc()
            log.warning("the state cannot be read for monitoring", error=str(error) or type(error).__name__)
            return ()

    async def _reading(self) -> list[Metric]:
        return list(await self._read())


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    """Return one number that may rise and fall."""
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """Return numbers that may rise and fall, each under the values of `labels`."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for under, value in values:
        family.add_metric(under, value)
    return family
