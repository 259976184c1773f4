"""alto-node as a process: why it cannot start is its last line, with the setting and the cure."""

import fcntl
import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("WORK_ROOT", "{file}", "{file}: File exists: name a folder that can be written"),
        ("WORK_ROOT", "{used}", "another node uses {used}: name a folder that can be written, of this node alone"),
        ("LISTEN", "{taken}", "cannot listen on '{taken}': give host:port"),
        ("GPUS", "none", "Input should be a valid integer"),
    ],
)
def test_why_it_cannot_start_is_its_last_line_with_the_setting_and_the_cure(tmp_path, setting, value, said):
    file, used = tmp_path / "file", tmp_path / "used"
    file.touch()
    used.mkdir()
    with socket.socket() as taken, (used / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"file": file, "used": used, "taken": f"127.0.0.1:{taken.getsockname()[1]}"}
        settings = {"SERVICE_TOKEN": "t", "LISTEN": "127.0.0.1:0", "DEVICE": "cpu", setting: value.format(**names)}
        environment = os.environ | {f"ALTO_NODE_{name}": value for name, value in settings.items()}
        environment["ALTO_HOME"] = str(tmp_path / "home")
        command = [sys.executable, "-m", "alto_training"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"alto-node: ALTO_NODE_{setting}: ")
    assert said.format(**names) in last
    assert "Traceback" not in ended.stderr
