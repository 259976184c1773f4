"""What tests of real processes share: ports for them, their children, and a way to look at them in peace."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

PORTS_IN_A_ROW = 4
_TURNS = 16
# Each test process looks among ports of its own, below those that the kernel gives to outgoing connections.
_FIRST_PORT = 10_000 + os.getpid() % 350 * _TURNS * PORTS_IN_A_ROW
_turn = itertools.count()


def free_ports():
    """Return the first of four free ports in a row, for servers that are yet to come."""
    for _ in range(_TURNS):
        first = _FIRST_PORT + next(_turn) % _TURNS * PORTS_IN_A_ROW
        if all(map(_is_free, range(first, first + PORTS_IN_A_ROW))):
            return first
    raise RuntimeError("no free ports")


def _is_free(port):
    with socket.socket() as probe:
        # As servers bind: connections that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def children(process_id):
    """Return the process ids of a process's children, eldest first."""
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


@contextmanager
def standing_still(*process_ids):
    """Keep processes from getting on while a test looks at them."""
    for process_id in process_ids:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for process_id in process_ids:
            os.kill(process_id, signal.SIGCONT)


@contextmanager
def taken_address():
    """Give the address of a port that another program has."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def why_it_does_not_start(module, home, settings):
    """Run a service that cannot start, with these variables; return its last line, and see that it is no traceback."""
    environment = os.environ | {"ALTO_HOME": str(home)} | settings
    command = [sys.executable, "-m", module]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "PASSWORD" not in ended.stderr
    return ended.stderr.splitlines()[-1]
