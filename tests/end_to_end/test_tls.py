"""A search through admission, placement and a node as processes of their own, every connection over TLS."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager

import pytest
from alto.v1.training_node_service_pb2 import GetNodeRequest
from alto.v1.training_node_service_pb2_grpc import TrainingNodeServiceStub
from alto_client import AltoError, OperatorClient
from alto_client.connection import Connection
from certificates import Authority, as_settings
from processes import free_ports

TOKEN = "token-of-the-tests"


@contextmanager
def running(module, environment, log):
    """One service as a process, ended at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


class SecuredHouse:
    """Three services, each with a certificate of its own; callers need one of the same authority, tenants their key."""

    def __init__(self, home, models_root):
        self.home = home
        self.authority = Authority(home / "certificates")
        self.port = free_ports()
        addresses = [f"127.0.0.1:{self.port + index}" for index in range(4)]
        self.public, self.reports, self.placement, self.node = addresses
        self.key_file = home / "local.key"
        artifacts = str(home / "artifacts")
        self.services = {
            "placement": {
                "LISTEN": self.placement,
                "DATABASE_URL": f"sqlite+aiosqlite:///{home / 'placement.db'}",
            },
            "admission": {
                "LISTEN": self.public,
                "INTERNAL_LISTEN": self.reports,
                "DATABASE_URL": f"sqlite+aiosqlite:///{home / 'admission.db'}",
                "ARTIFACT_ROOT": artifacts,
                "UPLOAD_FOLDER": str(home / "uploads"),
                "MODELS_ROOT": str(models_root),
                "PLACEMENT_ADDRESS": self.placement,
                "LOCAL_KEY_FILE": str(self.key_file),
            },
            "node": {
                "LISTEN": self.node,
                "NODE_ID": "node-a",
                "PLACEMENT_ADDRESS": self.placement,
                "REPORT_ADDRESS": self.reports,
                "ARTIFACT_ROOT": artifacts,
                "WORK_ROOT": str(home / "node"),
                "MODELS_ROOT": str(models_root),
                "GPUS": "1",
                "DEVICE": "cpu",
                "KERNEL_BACKEND": "cpu",
            },
        }

    @contextmanager
    def open(self):
        modules = {"placement": "alto_placement", "admission": "alto_admission", "node": "alto_training"}
        with ExitStack() as stack:
            for name, settings in self.services.items():
                prefix = f"ALTO_{name.upper()}_"
                files = self.authority.issue(name, roots=self.authority.roots)
                environment = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **{f"{prefix}{key}": value for key, value in settings.items()},
                    f"{prefix}SERVICE_TOKEN": TOKEN,
                    **as_settings(files, prefix),
                }
                stack.enter_context(running(modules[name], environment, self.home / f"{name}.log"))
            yield self

    def alto(self, *arguments):
        environment = {
            **os.environ,
            "ALTO_HOME": str(self.home / "of-a-tenant"),
            "ALTO_SERVER": f"https://{self.public}",
            "ALTO_API_KEY": self.key_file.read_text().strip(),
        }
        command = [sys.executable, "-m", "alto_cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    def logs(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in sorted(self.home.glob("*.log")))


@pytest.fixture
def secured(tmp_path, models_root):
    opened = SecuredHouse(tmp_path / "house", models_root)
    with opened.open():
        deadline = time.monotonic() + 120
        while not opened.key_file.exists():
            assert time.monotonic() < deadline, opened.logs()
            time.sleep(0.1)
        yield opened
    # pytest shows it with a failing test only.
    print(opened.logs())


@pytest.mark.slow
def test_a_search_goes_all_the_way_over_tls(secured, task_file, tmp_path):
    search = {"base": {"batch_size": 4, "max_steps": 8, "max_length": 64}, "grid": {"learning_rate": [1e-3, 3e-3]}}
    path = task_file(search=search, early_exit="none", evaluation={"count": 2})
    roots = ("--root-certificates", secured.authority.roots)
    done = secured.alto("tune", path, *roots, "--json")
    assert done.returncode == 0, done.stderr + secured.logs()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    tasks = json.loads(secured.alto("list", *roots, "--json").stdout)["tasks"]
    assert [task["state"] for task in tasks] == ["SUCCEEDED"]

    refused = secured.alto("list")
    assert refused.returncode == 7
    assert f"{secured.public} shows a certificate that is not trusted here" in refused.stderr
    assert "--root-certificates" in refused.stderr

    of_operator = secured.authority.issue("operator")
    certificate = of_operator.certificate.read_bytes(), of_operator.key.read_bytes()
    known = secured.authority.roots.read_bytes()
    with OperatorClient(secured.placement, TOKEN, root_certificates=known, client_certificate=certificate) as operator:
        assert [node.node_id for node in operator.nodes()] == ["node-a"]
    with OperatorClient(secured.placement, TOKEN, root_certificates=known) as operator, pytest.raises(AltoError):
        operator.nodes()

    with closing(Connection(secured.node, TOKEN, root_certificates=known, client_certificate=certificate)) as to_node:
        stub = TrainingNodeServiceStub(to_node.channel)
        assert to_node.call(stub.GetNode, GetNodeRequest()).node.node_id == "node-a"
    with closing(Connection(secured.node, TOKEN, root_certificates=known)) as to_node, pytest.raises(AltoError):
        to_node.call(TrainingNodeServiceStub(to_node.channel).GetNode, GetNodeRequest())
