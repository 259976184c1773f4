"""What Prometheus reads of placement: nodes, places, tasks by where they stand, and the plan."""

import asyncio

from metrics_page import metrics_of

from .test_placement_service import TestNode, enqueue


async def test_the_cluster_is_told_as_it_stands(placement, stub):
    value = await metrics_of(placement.metrics_port)
    assert value("alto_longest_wait_seconds") == 0
    node = await TestNode(stub, gpus=2).connect()
    await enqueue(stub, "first", gpus=2)
    await node.hears("assignment")
    await enqueue(stub, "second", gpus=2)
    await asyncio.sleep(0.05)
    while not (value := await metrics_of(placement.metrics_port))("alto_plan_makespan_seconds"):
        await asyncio.sleep(0.05)
    assert value("alto_nodes", state="ready") == 1
    assert (value("alto_places", kind="cpu", use="used"), value("alto_places", kind="cpu", use="free")) == (2, 0)
    assert value("alto_unfinished_tasks", state="assigned") == 1
    assert value("alto_unfinished_tasks", state="waiting") == 1
    assert 0 < value("alto_longest_wait_seconds") < 600
    assert 0 < value("alto_plan_lower_bound_seconds") <= value("alto_plan_makespan_seconds")
    assert value("alto_calls_total", method="EnqueueTask", code="OK") == 2
