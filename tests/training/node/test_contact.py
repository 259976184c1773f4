"""What an operator reads of a node that cannot reach the others: once, as what it is, and when it is over."""

import grpc
import pytest
from alto_training import contact
from alto_training.contact import REMIND_S, Contact


def error(code):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="why")


AWAY, REFUSED = error(grpc.StatusCode.UNAVAILABLE), error(grpc.StatusCode.UNAUTHENTICATED)


class Log:
    def __init__(self):
        self.lines = []

    def __getattr__(self, level):
        return lambda event, **facts: self.lines.append((level, event, facts))


@pytest.fixture
def log(monkeypatch):
    made = Log()
    monkeypatch.setattr(contact, "log", made)
    return made


def test_an_outage_is_told_when_it_begins_now_and_then_and_when_it_is_over(log):
    now = [0.0]
    placement = Contact("placement", lambda: now[0])
    placement.answered()
    for second in range(int(2 * REMIND_S)):
        now[0] = float(second)
        placement.failed(AWAY)
    placement.answered()
    placement.answered()
    away = ("warning", "placement does not answer; trying again", {"error": "UNAVAILABLE: why"})
    assert log.lines == [away, away, ("info", "placement answers again", {"outage_s": 2 * REMIND_S - 1})]


def test_a_wrong_token_is_no_outage(log):
    admission = Contact("admission", lambda: 0.0)
    for failure in (AWAY, REFUSED, REFUSED, AWAY):
        admission.failed(failure)
    assert [(level, event) for level, event, _ in log.lines] == [
        ("warning", "admission does not answer; trying again"),
        ("error", "admission refuses this node's service token"),
        ("warning", "admission does not answer; trying again"),
    ]
    assert log.lines[1][2] == {
        "setting": "ALTO_NODE_SERVICE_TOKEN",
        "cure": "give it the value of ALTO_ADMISSION_SERVICE_TOKEN and start the node again",
        "error": "UNAUTHENTICATED: why",
    }


async def test_a_node_says_who_it_is_and_that_its_token_is_wrong(house, wait_until):
    await house.plan()
    await house.start_node(gpus=2, service_token="another")
    refusals = "placement refuses this node's service token"
    (refused,) = await wait_until(lambda: house.logged("node-a", refusals), what="the refusal")
    assert (refused["level"], refused["setting"]) == ("error", "ALTO_NODE_SERVICE_TOKEN")
    (serving,) = await wait_until(lambda: house.logged("node-a", "serving"), what="its start")
    said = {name: serving[name] for name in ("service", "node_id", "gpu_kind", "places", "gpus")}
    assert said == {"service": "alto-node", "node_id": "node-a", "gpu_kind": "cpu", "places": 2, "gpus": []}


async def test_a_node_says_when_the_others_answer_again(house, wait_until):
    await house.start_node()
    await wait_until(lambda: has_nodes(house), what="the node")
    await house.placement.kill()
    away = "placement does not answer; trying again"
    await wait_until(lambda: house.logged("node-a", away), what="placement to be missed")
    await house.placement.start()
    await wait_until(lambda: house.logged("node-a", "placement answers again"), what="placement's answer")
    house.admission.refuse = True
    await house.enqueue(house.work(steps=4))
    away = "admission does not answer; trying again"
    await wait_until(lambda: house.logged("node-a", away), what="admission to be missed")
    house.admission.refuse = False
    await wait_until(lambda: house.logged("node-a", "admission answers again"), what="admission's answer")
    await wait_until(house.ended)


async def has_nodes(house):
    return (await house.plan()).nodes
