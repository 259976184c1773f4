"""What tests of real processes share: ports for them, their children, and a way to look at them in peace."""

import itertools
import os
import signal
import socket
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
