"""`alto up` in a home folder of its own, to be started, asked, killed and stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from alto_client import AltoClient, OperatorClient
from processes import free_ports


class House:
    """`alto up` in a home folder of its own."""

    def __init__(self, home: Path, models_root: Path, **environment: str) -> None:
        self.home = home
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "ALTO_HOME": str(home),
            "ALTO_MODELS": str(models_root),
            "OMP_NUM_THREADS": "1",
            # Runs are compared bit by bit: which kernels compute them must not hang on what was measured faster.
            "ALTO_NODE_KERNEL_BACKEND": "cpu",
            **environment,
        }
        self.port_base = free_ports()

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
        for node in self.nodes.values():
            node.terminate()
        self.alto("down")
        for node in self.nodes.values():
            node.wait(timeout=60)

    def operator(self):
        """A client of placement."""
        credentials = json.loads((self.home / "client.json").read_text())
        return OperatorClient(credentials["placement_address"], credentials["service_token"])

    def start_node(self, node_id, **settings):
        """Start one more node beside that of `alto up`, a process of its own; it takes one task at a time."""
        credentials = json.loads((self.home / "client.json").read_text())
        names = {
            "LISTEN": "127.0.0.1:0",
            "NODE_ID": node_id,
            "PLACEMENT_ADDRESS": credentials["placement_address"],
            "REPORT_ADDRESS": f"127.0.0.1:{self.port_base + 1}",
            "ARTIFACT_ROOT": str(self.home / "artifacts"),
            "WORK_ROOT": str(self.home / node_id),
            "MODELS_ROOT": self.environment["ALTO_MODELS"],
            "SERVICE_TOKEN": credentials["service_token"],
            "GPUS": "1",
            **{name.upper(): str(value) for name, value in settings.items()},
        }
        environment = {**self.environment, **{f"ALTO_NODE_{name}": value for name, value in names.items()}}
        with (self.home / f"{node_id}.log").open("ab") as log:
            command = [sys.executable, "-m", "alto_training"]
            self.nodes[node_id] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

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
