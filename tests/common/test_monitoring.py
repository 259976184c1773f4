"""The page itself, over a real port: what is counted, what is read on the loop, and what cannot be read."""

import asyncio
import socket
import threading
import time

import pytest
from alto_common.monitoring import FRESH_S, MOST_READERS, SILENCE_S, Monitoring, gauge
from metrics_page import metrics_of


@pytest.fixture
def monitoring():
    numbers = Monitoring()
    yield numbers
    numbers.stop()


async def test_what_is_there_at_the_moment_is_read_on_the_loop_that_owns_it(monitoring):
    loop, seen = asyncio.get_running_loop(), []

    async def read():
        seen.append(asyncio.get_running_loop())
        return [gauge("alto_answer", "As it is now", len(seen))]

    monitoring.read_from(read)
    port = monitoring.start("127.0.0.1:0")
    pages = await asyncio.gather(*(metrics_of(port) for _ in range(5)))
    assert {page("alto_answer") for page in pages} == {1}, "readers that come together see one state"
    await asyncio.sleep(FRESH_S)
    assert (await metrics_of(port))("alto_answer") == 2
    assert seen == [loop, loop]


async def test_readers_that_say_nothing_leave_room_for_others_and_are_let_go_of(monitoring):
    port = monitoring.start("127.0.0.1:0")
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MOST_READERS)]
    try:
        threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
        assert len(threads) <= MOST_READERS
        deadline = time.monotonic() + 6 * SILENCE_S
        while True:
            try:
                await metrics_of(port)
                break
            except OSError:  # hung up on, as long as the idle ones are there
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
    finally:
        for one in idle:
            one.close()


async def test_what_cannot_be_read_is_left_out_and_counted(monitoring):
    async def read():
        raise ConnectionError("no database")

    monitoring.read_from(read)
    monitoring.call_ended("/alto.v1.AdmissionService/GetTuningTask", "OK", 0.02)
    port = monitoring.start("127.0.0.1:0")
    await metrics_of(port)
    value = await metrics_of(port)
    assert value("alto_calls_total", method="GetTuningTask", code="OK") == 1
    assert value("alto_call_seconds_sum", method="GetTuningTask") == 0.02
    assert value("alto_unread_states_total") >= 1


async def test_without_an_address_there_is_no_page_and_a_taken_one_is_an_error(monitoring):
    assert monitoring.start("") == 0
    port = monitoring.start("127.0.0.1:0")
    other = Monitoring()
    with pytest.raises(OSError, match="in use"):
        other.start(f"127.0.0.1:{port}")
    for nowhere in ("nowhere", "9000", ":9000", "127.0.0.1:port"):
        with pytest.raises(ValueError, match=f"'{nowhere}' is not host:port"):
            other.start(nowhere)
    with pytest.raises(OverflowError):
        other.start("127.0.0.1:70000")


async def test_an_address_may_be_of_ip_version_6(monitoring):
    port = monitoring.start("[::1]:0")
    with socket.create_connection(("::1", port)) as reader:
        reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"200 OK" in await asyncio.to_thread(reader.recv, 1000)
