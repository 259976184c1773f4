"""alto-placement as a process: why it cannot start is its last line, with the setting and the cure."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("DATABASE_URL", "postgresql://alto:PASSWORD@127.0.0.1:1/alto", "Connection refused: start the database"),
        ("DATABASE_URL", "sqlite+aiosqlite:///{file}/a.db", "{file}: File exists: start the database"),
        ("DATABASE_URL", "PASSWORD", "Could not parse SQLAlchemy URL"),
        ("LISTEN", "{taken}", "cannot listen on '{taken}': give host:port"),
        ("LOG_FORMAT", "xml", "Input should be 'json' or 'text'"),
    ],
)
def test_why_it_cannot_start_is_its_last_line_with_the_setting_and_the_cure(tmp_path, setting, value, said):
    file = tmp_path / "file"
    file.touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"SERVICE_TOKEN": "t", "LISTEN": "127.0.0.1:0", setting: value.format(file=file, taken=address)}
        environment = os.environ | {f"ALTO_PLACEMENT_{name}": value for name, value in settings.items()}
        environment["ALTO_HOME"] = str(tmp_path / "home")
        command = [sys.executable, "-m", "alto_placement"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"alto-placement: ALTO_PLACEMENT_{setting}: ")
    assert said.format(file=file, taken=address) in last
    assert "Traceback" not in ended.stderr
    assert "PASSWORD" not in ended.stderr
