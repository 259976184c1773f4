"""What a service counts and measures of itself, for Prometheus to read: one page over HTTP, beside the service's ports.

Counters and histograms are kept as things happen. What is there at the moment (tasks in each state, the plan, places)
is read when the page is asked for, on the service's own event loop, so that it needs no lock and no second book.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# The page is asked for every 15 s or so, and Prometheus waits 10 s for it.
READ_TIMEOUT_S = 5.0
# Readers that come together see one state, and one that says or takes nothing is let go of.
FRESH_S = 1.0
MOST_READERS = 8
SILENCE_S = 10.0
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
        self._server: _PageServer | None = None
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
        if not host or not port.isdecimal():
            raise ValueError(f"{listen!r} is not host:port")
        self._server = _PageServer(host.strip("[]"), int(port), make_wsgi_app(self.registry))
        self._thread = Thread(target=self._server.serve_forever, daemon=True, name="metrics")
        self._thread.start()
        log.info("metrics can be read", host=host, port=self._server.server_port)
        return self._server.server_port

    def stop(self) -> None:
        """Serve it no more."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = None


class _PageServer(ThreadingMixIn, WSGIServer):
    """Serves the page to a few readers at a time. Raises OSError, OverflowError for a port that none can have."""

    daemon_threads = True

    def __init__(self, host: str, port: int, app: Any) -> None:
        self._places = BoundedSemaphore(MOST_READERS)
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _PageHandler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind without asking for this host's name, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # host and port of TCP
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or hang up where too many are being answered."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a reader has gone away, or was too slow."""


class _PageHandler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each reading."""


class _OnLoop(Collector):
    """Asks an event loop, from the thread of whoever reads the page. What cannot be read now is left out."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Read, unread: Counter) -> None:
        self._loop = loop
        self._read = read
        self._unread = unread
        self._lock = Lock()
        self._state: Iterable[Metric] = ()
        self._read_s = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is to read is known when it is read."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return what is there now, or was a moment ago."""
        with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                self._state = self._asked()
                self._read_s = time.monotonic()
            return self._state

    def _asked(self) -> Iterable[Metric]:
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
