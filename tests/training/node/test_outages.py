"""An outage of the artifact store holds a task up and does not end it; one that lasts is named. Real processes."""

import errno
import io
from contextlib import contextmanager

import pytest
from alto.v1 import placement_service_pb2, tuning_pb2
from alto_common.artifacts import ArtifactStore
from alto_training import outages

wire = placement_service_pb2


@contextmanager
def outage(root):
    """Have a file where the store's folder was: whoever comes by gets NotADirectoryError."""
    away = root.with_name("away")
    root.rename(away)
    root.touch()
    try:
        yield
    finally:
        root.unlink()
        away.rename(root)


def tries_again(house):
    """Whether a worker has noticed the outage twice."""
    logs = house.folder.glob("node-a/tasks/*/assignments/*/worker.log")
    lines = "\n".join(path.read_text() for path in logs).splitlines()
    return sum("trying again" in line and "NotADirectoryError" in line for line in lines) > 1


async def dequeue(house, metadata):
    await house.stub.DequeueTask(wire.DequeueTaskRequest(task_id="task"), metadata=metadata, timeout=20)


async def test_an_outage_while_rows_are_fetched_is_waited_out(house, wait_until):
    await house.start_node()
    work = house.work()
    with outage(house.artifact_root):
        await house.enqueue(work)
        await wait_until(lambda: tries_again(house), what="another try")
    await wait_until(house.ended)
    assert house.admission.states()[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    assert house.admission.attempts() == 1


async def test_an_outage_while_adapters_are_published_is_waited_out(house, wait_until):
    await house.start_node()
    await house.enqueue(house.work(steps=100))
    await wait_until(lambda: house.admission.events("execution_started"), what="the start")
    with outage(house.artifact_root):
        await wait_until(lambda: tries_again(house), what="another try")
    await wait_until(house.ended)
    assert house.admission.states()[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    assert house.admission.attempts() == 1
    for event in house.admission.events("adapter_ready"):
        folder = house.artifact_root / event.adapter_ready.uri
        assert {file.name for file in event.adapter_ready.adapter.files} == {path.name for path in folder.iterdir()}


async def test_a_task_can_be_cancelled_in_an_outage(house, wait_until, metadata):
    await house.start_node(stop_grace_s=1)
    work = house.work()
    with outage(house.artifact_root):
        await house.enqueue(work)
        await wait_until(lambda: tries_again(house), what="another try")
        await dequeue(house, metadata)
        await wait_until(house.ended, timeout_s=60)
    assert house.admission.states()[-1] == tuning_pb2.TASK_STATE_CANCELLED
    (ended,) = house.logged("node-a", "worker ended by its node")
    assert ended["reason"] == "cancelled, and it did not stop in time"
    assert not house.logged("node-a", "the worker crashed")


async def test_an_outage_that_lasts_ends_the_attempt_and_is_named(house, wait_until, metadata, monkeypatch):
    # A worker that is less patient: its interpreter runs this first.
    (house.folder / "sitecustomize.py").write_text(
        "from alto_training import outages\noutages.FIRST_WAIT_S, outages.LONGEST_OUTAGE_S = 0.1, 0.3\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(house.folder))
    await house.start_node()
    work = house.work()
    async with house.given_up() as ended:
        with outage(house.artifact_root):
            await house.enqueue(work)
            await wait_until(lambda: ended, what="the end")
    assert ended[0].attempts == 3
    assert ended[0].failure.message.endswith("the artifact store could not be reached; its node's log says more")
    # Its operator reads why.
    assert "NotADirectoryError" in house.logged("node-a", "the worker crashed")[-1]["log_tail"]
    assert ended[0].failure.message.endswith(house.logged("node-a", "assignment ended")[-1]["why"])


class Flickering:
    """A store that breaks off in the middle of what it reads and writes, and is back at the next try."""

    def __init__(self, store):
        self._store = store
        self._breaks = False

    def has_root(self):
        return True

    def _in_pieces(self, content):
        self._breaks = not self._breaks
        yield content[:3]
        if self._breaks:
            raise OSError(errno.ESTALE, "stale file handle")
        yield content[3:]

    def read(self, path, offset):
        yield from self._in_pieces(b"".join(self._store.read(path, offset)))

    def write(self, path, chunks):
        return self._store.write(path, self._in_pieces(b"".join(chunks)))


def test_what_breaks_off_in_the_middle_loses_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(outages, "FIRST_WAIT_S", 0.01)
    store = Flickering(ArtifactStore(str(tmp_path)))
    assert outages.write(store, "file", io.BytesIO(b"0123456789")).size_bytes == 10
    assert b"".join(outages.read(store, "file")) == b"0123456789"


def test_waits_double_to_a_limit_and_end(tmp_path, monkeypatch):
    now, waits = [0.0], []
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outages.time, "sleep", lambda wait_s: (waits.append(wait_s), now.append(now.pop() + wait_s)))
    with pytest.raises(outages.StoreUnreachableError, match="artifact store could not be reached for 600 s"):
        list(outages.read(ArtifactStore(str(tmp_path / "gone")), "file"))
    assert waits[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert sum(waits) == outages.LONGEST_OUTAGE_S


def test_a_file_that_is_not_in_the_store_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(outages.time, "sleep", lambda wait_s: pytest.fail("it waited"))
    with pytest.raises(FileNotFoundError):
        list(outages.read(ArtifactStore(str(tmp_path)), "file"))
