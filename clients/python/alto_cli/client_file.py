"""ALTO's home folder and the file in it that tells clients of this machine where the server is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


def home_folder() -> Path:
    """Return where ALTO keeps its state on this machine: ALTO_HOME, or ~/.alto."""
    return Path(os.environ.get("ALTO_HOME") or Path.home() / ".alto").expanduser()


@dataclass(frozen=True)
class ClientFile:
    """What `alto up` tells the other commands."""

    address: str
    api_key: str
    placement_address: str
    service_token: str

    @classmethod
    def load(cls, home: Path | None = None) -> ClientFile | None:
        """Return the file's content, None when there is none or it is not one that `alto up` wrote."""
        path = (home or home_folder()) / "client.json"
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, home: Path) -> None:
        """Write the file, readable by its owner alone, whole or not at all."""
        write_private(home / "client.json", json.dumps(asdict(self), indent=1) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; a reader sees the old content or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    aside.replace(path)
