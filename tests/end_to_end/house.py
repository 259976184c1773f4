"""`alto up` in a home folder of its own, to be started, asked, killed and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from alto_client import AltoClient

PORTS = 4


def free_port_base():
    """Return a port with three free ones behind it, out of sixteen that no test process beside this one looks at.

    They lie below the ports that the kernel gives to outgoing connections.
    """
    first = 10_000 + os.getpid() % 1_250 * 16
    for base in range(first, first + 16, PORTS):
        try:
            for port in range(base, base + PORTS):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


class House:
    """`alto up` in a home folder of its own."""

    def __init__(self, home: Path, models_root: Path) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "ALTO_HOME": str(home),
            "ALTO_MODELS": str(models_root),
            "OMP_NUM_THREADS": "1",
            # Runs are compared bit by bit: which kernels compute them must not hang on what was measured faster.
            "ALTO_NODE_KERNEL_BACKEND": "cpu",
        }
        self.port_base = free_port_base()

    def alto(self, *arguments, check=True):
        """Run the `alto` command and return its standard output."""
        command = [sys.executable, "-m", "alto_cli", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        if check and done.returncode != 0:
            raise AssertionError(f"alto {arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def start(self):
        self.alto("up", "--detach", "--port-base", self.port_base)

    def stop(self):
        self.alto("down")

    def client(self):
        credentials = json.loads((self.home / "client.json").read_text())
        return AltoClient(credentials["address"], credentials["api_key"])

    def process_of(self, service):
        """Return the process id of a service that serves."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            services = json.loads(self.alto("status", "--json", check=False).stdout)["services"]
            found = next(one for one in services if one["name"] == service)
            if found["state"] == "serving" and found["pid"]:
                return found["pid"]
            time.sleep(0.2)
        raise AssertionError(f"{service} does not serve")

    def kill(self, service):
        """Kill a service as the kernel would."""
        os.kill(self.process_of(service), signal.SIGKILL)
