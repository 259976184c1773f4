"""Commands from the node to a worker: JSON lines in a file that the executor polls between ticks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROL_FILE = "control"


def write_command(folder: Path, command: str, **details: Any) -> None:
    """Append a command for the worker of the assignment in `folder`."""
    with (folder / CONTROL_FILE).open("a") as file:
        file.write(json.dumps({"command": command, **details}) + "\n")


class CommandReader:
    """Reads the commands of a control file, each once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL_FILE
        self._offset = 0

    def next(self) -> dict[str, Any] | None:
        """Return the next command, None when there is none; never waits."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                line = file.readline()
        except FileNotFoundError:
            return None
        if not line.endswith(b"\n"):
            return None
        self._offset += len(line)
        command: dict[str, Any] = json.loads(line)
        return command
