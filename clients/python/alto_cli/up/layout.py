"""Where the local services keep their files, on which ports they listen, and the settings that tell them so."""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from alto_cli import exit_codes
from alto_cli.client_file import write_private
from alto_cli.failures import CommandError

HOST = "127.0.0.1"
NODE_ID = "local"
TLS_SETTING = re.compile("ALTO_(ADMISSION|PLACEMENT|NODE)_(PUBLIC_)?TLS_.+")


@dataclass(frozen=True)
class ServiceSpec:
    """One service: its module, the address of its health check, where it logs, and its settings."""

    name: str
    module: str
    address: str
    log: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Folders below `home`, and four ports from `port_base`."""

    home: Path
    port_base: int

    @property
    def admission(self) -> str:
        """Address of the public API."""
        return f"{HOST}:{self.port_base}"

    @property
    def reports(self) -> str:
        """Address of admission's internal side."""
        return f"{HOST}:{self.port_base + 1}"

    @property
    def placement(self) -> str:
        """Address of placement."""
        return f"{HOST}:{self.port_base + 2}"

    @property
    def node(self) -> str:
        """Address of the node."""
        return f"{HOST}:{self.port_base + 3}"

    @property
    def local_key_file(self) -> Path:
        """Where admission leaves the key of the local user."""
        return self.home / "state" / "local.key"

    def prepare(self) -> None:
        """Make the folders, readable by their owner alone. Raises `CommandError` where that cannot be done."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            for name in ("state", "artifacts", "work", "logs"):
                (self.home / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"{error.filename}: {error.strerror}", "name another folder for ALTO's state with ALTO_HOME"
            ) from None

    def check_environment(self) -> None:
        """Raise `CommandError` naming the settings for TLS: on one machine the services speak plaintext."""
        if given := sorted(filter(TLS_SETTING.fullmatch, os.environ)):
            raise CommandError(
                f"`alto up` serves this machine alone, without TLS, and {', '.join(given)} would have it otherwise",
                f"leave them out: env {' '.join(f'-u {name}' for name in given)} alto up",
                "or start each service by itself: alto-admission, alto-placement, alto-node",
            )

    def check_ports(self) -> None:
        """Raise `CommandError` naming the ports that something else listens on."""
        users = ("admission", "admission's internal side", "placement", "node")
        busy = [
            f"port {self.port_base + index} ({user}) is taken by another program"
            for index, user in enumerate(users)
            if _is_busy(self.port_base + index)
        ]
        if busy:
            free = f"move all four: alto up --port-base {self.port_base + 100}"
            raise CommandError("; ".join(busy), free, exit_code=exit_codes.CONFLICT)

    def service_token(self) -> str:
        """Return the token that the services share, made once."""
        path = self.home / "state" / "service.token"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32))
        return path.read_text().strip()

    def services(self, token: str) -> list[ServiceSpec]:
        """Return the services in the order in which they are started; they stop in the opposite one."""
        models = os.environ.get("ALTO_MODELS") or str(Path.home() / ".cache" / "alto" / "models")
        # One machine, one user: who may start ALTO here may name any folder as a model.
        model_settings = {"MODELS_ROOT": models, "MODEL_FOLDERS": "/", "ALLOW_HUB": "true"}
        state, artifacts = self.home / "state", str(self.home / "artifacts")
        placement = {
            "LISTEN": self.placement,
            "DATABASE_URL": f"sqlite+aiosqlite:///{state / 'placement.db'}",
        }
        admission = {
            "LISTEN": self.admission,
            "INTERNAL_LISTEN": self.reports,
            "DATABASE_URL": f"sqlite+aiosqlite:///{state / 'admission.db'}",
            "ARTIFACT_ROOT": artifacts,
            "UPLOAD_FOLDER": str(state / "uploads"),
            **model_settings,
            "PLACEMENT_ADDRESS": self.placement,
            "LOCAL_KEY_FILE": str(self.local_key_file),
        }
        node = {
            "LISTEN": self.node,
            "NODE_ID": NODE_ID,
            "PLACEMENT_ADDRESS": self.placement,
            "REPORT_ADDRESS": self.reports,
            "ARTIFACT_ROOT": artifacts,
            "WORK_ROOT": str(self.home / "work"),
            **model_settings,
        }
        return [
            self._service("placement", "alto_placement", self.placement, placement, token),
            self._service("admission", "alto_admission", self.admission, admission, token),
            self._service("node", "alto_training", self.node, node, token),
        ]

    def _service(self, name: str, module: str, address: str, settings: dict[str, str], token: str) -> ServiceSpec:
        prefix = f"ALTO_{name.upper()}_"
        environment = {f"{prefix}{key}": value for key, value in settings.items()}
        environment[f"{prefix}SERVICE_TOKEN"] = token
        environment[f"{prefix}LOG_FORMAT"] = "text"
        environment["ALTO_HOME"] = str(self.home)
        environment["PYTHONUNBUFFERED"] = "1"
        return ServiceSpec(name, module, address, self.home / "logs" / f"{name}.log", environment)


def _is_busy(port: int) -> bool:
    with socket.socket() as probe:
        # As the services themselves bind: connections that linger after a stop do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False
