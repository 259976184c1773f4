"""The page itself, over a real port: what is counted, what is read on the loop, and what cannot be read."""

import asyncio

import pytest
from alto_common.monitoring import Monitoring, gauge
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
    assert [(await metrics_of(port))("alto_answer") for _ in range(2)] == [1, 2]
    assert seen == [loop, loop]


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
    with pytest.raises(ValueError, match="nowhere"):
        other.start("nowhere")
