"""alto-node as a process: why it cannot start is its last line, with the setting and the cure."""

import fcntl

import pytest
from processes import taken_address, why_it_does_not_start


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
    with taken_address() as taken, (used / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = {"file": file, "used": used, "taken": taken}
        settings = {"SERVICE_TOKEN": "t", "LISTEN": "127.0.0.1:0", "DEVICE": "cpu", setting: value.format(**names)}
        named = {f"ALTO_NODE_{name}": value for name, value in settings.items()}
        last = why_it_does_not_start("alto_training", tmp_path / "home", named)
    assert last.startswith(f"alto-node: ALTO_NODE_{setting}: ")
    assert said.format(**names) in last
