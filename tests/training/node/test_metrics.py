"""What Prometheus reads of a node that trains."""

from metrics_page import metrics_of
from processes import free_ports


async def test_a_node_says_what_it_trains_and_how_fast(house, wait_until):
    port = free_ports()
    await house.start_node(metrics_listen=f"127.0.0.1:{port}")
    await house.enqueue(house.work(steps=2000))

    async def fast():
        value = await metrics_of(port)
        return value if value("alto_task_tick_seconds", task_id="task") else None

    value = await wait_until(fast, what="a measured tick")
    assert value("alto_task_tokens_per_second", task_id="task") > 0
    assert 0 <= value("alto_task_fraction_done", task_id="task") < 1
    assert (value("alto_node_places", use="used"), value("alto_node_places", use="free")) == (1, 0)
    assert 0 < value("alto_node_lease_seconds") <= 15
