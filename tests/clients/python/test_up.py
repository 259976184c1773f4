"""`alto up` with the real services: each test is a subprocess that a person might have started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from alto_cli.client_file import home_folder
from alto_cli.failures import CommandError
from alto_cli.up.layout import Layout
from alto_cli.up.lock import HomeLock, holder, read_status
from processes import free_ports

PATIENCE_S = 60


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {PATIENCE_S} s: {read_status(home_folder())}")


def alto(*arguments, **options):
    command = [sys.executable, "-m", "alto_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, **options)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def pids(home):
    status = read_status(home)
    return [service.pid for service in status.services if service.pid] if status else []


@pytest.fixture
def home(own_home):
    own_home.mkdir()
    return own_home


@pytest.fixture
def start(home, tmp_path):
    """Start `alto up` and wait until it is ready; whatever is left at the end is killed."""
    pytest.importorskip("alto_planner._planner", reason="the extension is not built here")
    started, seen = [], set()

    def start():
        stderr = (tmp_path / "up.stderr").open("w+")
        command = [sys.executable, "-m", "alto_cli", "up", "--port-base", str(free_ports())]
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
        started.append((process, stderr))

        def ready():
            if process.poll() is not None:
                stderr.seek(0)
                raise AssertionError(stderr.read())
            status = read_status(home)
            return status is not None and status.ready

        wait_for(ready, "the start")
        seen.update(pids(home))
        return process, stderr

    yield start
    for process, stderr in started:
        process.kill()
        process.wait()
        stderr.close()
    for pid in {*seen, *pids(home)}:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_up_serves_survives_a_death_and_stops_cleanly(start, home):
    process, stderr = start()
    assert os.stat(home / "client.json").st_mode & 0o777 == 0o600
    assert alto("list").returncode == 0
    status = json.loads(alto("status", "--json").stdout)
    assert [service["state"] for service in status["services"]] == ["serving"] * 3

    second = alto("up", "--port-base", "30000")
    assert second.returncode == 4
    assert "run already" in second.stderr

    node = next(service for service in read_status(home).services if service.name == "node")
    os.kill(node.pid, signal.SIGKILL)

    def back_again():
        now = next(service for service in read_status(home).services if service.name == "node")
        return now.state == "serving" and now.pid != node.pid and now.restarts == 1

    wait_for(back_again, "the restart of the node")
    before = pids(home)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    assert not any(map(is_alive, before))
    assert holder(home) is None
    stderr.seek(0)
    told = stderr.read()
    assert "node ended (killed by SIGKILL)" in told
    assert "node: starting again in 1 s" in told
    assert told.index("stopping node") < told.index("stopping admission") < told.index("stopping placement")


def test_no_service_outlives_an_up_that_is_killed(start, home):
    process, _ = start()
    left = pids(home)
    assert len(left) == 3
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, left)), "the end of the services")


def test_detached_up_and_down(home):
    pytest.importorskip("alto_planner._planner", reason="the extension is not built here")
    base = str(free_ports())
    up = alto("up", "--detach", "--port-base", base, "--json")
    try:
        assert up.returncode == 0, up.stderr
        assert json.loads(up.stdout)["ready"] is True
        running = pids(home)
        assert alto("up", "--detach", "--port-base", base).returncode == 0
        assert pids(home) == running
    finally:
        down = alto("down", "--json")
    assert json.loads(down.stdout)["stopped"] is not None
    assert not any(map(is_alive, running))
    assert alto("down").returncode == 0
    assert alto("status").returncode == 7


@pytest.mark.parametrize("options", [[], ["--detach"]])
def test_why_a_service_cannot_be_started_is_said_once(home, monkeypatch, options):
    pytest.importorskip("alto_planner._planner", reason="the extension is not built here")
    monkeypatch.setenv("ALTO_NODE_SLOTS", "many")
    up = alto("up", "--port-base", str(free_ports()), *options)
    assert up.returncode == 1
    assert "error: node could not be started (exit status 1)\n  the end of " in up.stderr
    assert up.stderr.count("ALTO_NODE_SLOTS: Input should be a valid integer") == 1


@pytest.mark.parametrize("options", [[], ["--detach"]])
def test_a_home_that_cannot_be_a_folder_is_named_with_the_variable_that_moves_it(tmp_path, monkeypatch, options):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALTO_HOME", str(tmp_path / "file" / "home"))
    up = alto("up", *options)
    assert up.returncode == 2
    assert up.stderr == (
        f"error: {tmp_path / 'file' / 'home'}: Not a directory\n  name another folder for ALTO's state with ALTO_HOME\n"
    )


def test_a_busy_port_is_named_with_the_flag_that_moves_it(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError) as caught:
            Layout(home, port - 2).check_ports()
    assert f"port {port} (placement) is taken" in caught.value.message
    assert "--port-base" in caught.value.cures[0]


def test_one_up_for_each_home(home):
    first, second = HomeLock(home), HomeLock(home)
    assert first.acquire()
    assert not second.acquire()
    assert holder(home) == os.getpid()
    first.release()
    assert holder(home) is None
    assert second.acquire()
    second.release()


def test_the_service_token_is_made_once_and_kept_private(home):
    layout = Layout(home, 7410)
    layout.prepare()
    token = layout.service_token()
    assert len(token) > 30
    assert layout.service_token() == token
    assert os.stat(home / "state" / "service.token").st_mode & 0o777 == 0o600
    for service in layout.services(token):
        prefix = f"ALTO_{service.name.upper()}_"
        assert service.environment[f"{prefix}SERVICE_TOKEN"] == token
        assert service.environment[f"{prefix}LISTEN"] == service.address
