"""What nobody has used for long in the work folder goes, at the start and while the node runs; what is used stays."""

import os
import time
from types import SimpleNamespace

import pytest
from alto_training import server
from alto_training.folders import sweep
from alto_training.server import NodeServer
from alto_training.settings import NodeSettings

DAY_S = 86_400.0
KEEP_S = 7 * DAY_S


def make(root, age_s):
    """Make what a node leaves behind, of this age; return it by name."""
    made = {
        "task": root / "tasks/task/executor/state.json",
        "rows": root / "datasets/0123abcd",
        "half-written rows": root / "datasets/0123abcd.f00.part",
        "tokens": root / "datasets/tokenised/4567cdef/layout.json",
        "half-written tokens": root / "datasets/tokenised/.4567cdef-x1/tokens.bin",
    }
    for path in made.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    grow_old(root, age_s)
    return made


def grow_old(root, age_s):
    then = time.time() - age_s
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            os.utime(os.path.join(parent, name), (then, then))


def left(made):
    return {name for name, path in made.items() if path.exists()}


def test_what_was_not_used_for_long_is_deleted(tmp_path):
    made = make(tmp_path, 8 * DAY_S)
    costs = tmp_path / "datasets/tokenised/costs.json"
    costs.write_text("{}")
    grow_old(tmp_path, 8 * DAY_S)
    sweep(tmp_path, time.time() - 9 * DAY_S)
    assert left(made) == set(made)
    sweep(tmp_path, time.time() - KEEP_S)
    assert not left(made)
    assert [path.name for path in (tmp_path / "datasets/tokenised").iterdir()] == [costs.name]
    assert not list((tmp_path / "tasks").iterdir())


@pytest.mark.parametrize("name", ["task", "rows", "half-written rows", "tokens", "half-written tokens"])
def test_one_file_that_was_read_or_written_keeps_the_whole(tmp_path, name):
    made = make(tmp_path, 8 * DAY_S)
    status = made[name].stat()
    for used in ((time.time(), status.st_mtime), (status.st_atime, time.time())):
        os.utime(made[name], used)
        sweep(tmp_path, time.time() - KEEP_S)
        assert left(made) == {name}


async def test_a_node_sweeps_when_it_starts_and_while_it_runs_but_not_what_an_attempt_may_use(
    tmp_path, monkeypatch, wait_until
):
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.05)
    settings = NodeSettings(
        service_token="t",
        listen="127.0.0.1:0",
        placement_address="127.0.0.1:1",
        report_address="127.0.0.1:1",
        work_root=tmp_path,
        device="cpu",
    )
    made = make(tmp_path, 8 * DAY_S)
    node_server = NodeServer(settings)
    await node_server.start()
    try:
        assert not left(made), "it sweeps before it serves"
        supervisors = node_server._node.supervisors
        supervisors["a"] = SimpleNamespace(begun_s=time.time() - 8 * DAY_S)
        made = make(tmp_path, 8 * DAY_S)
        old = tmp_path / "datasets/old"
        old.touch()
        os.utime(old, (0, 0))
        await wait_until(lambda: not old.exists(), what="a sweep")
        assert left(made) == set(made)
        supervisors.clear()
        await wait_until(lambda: not left(made), what="the next sweep")
    finally:
        node_server._node.supervisors.clear()
        await node_server.stop()
