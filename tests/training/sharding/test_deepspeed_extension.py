"""A process that is killed while it compiles must not keep others waiting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from alto_training.sharding.deepspeed_extension import building_alone
from torch.utils.file_baton import FileBaton

BUILD = """
import sys, time
from pathlib import Path
from alto_training.sharding.deepspeed_extension import building_alone
from torch.utils.file_baton import FileBaton

folder = Path(sys.argv[1])
with building_alone(folder):
    assert FileBaton(folder / "extension" / "lock").try_acquire()
    print("building", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_one_that_was_killed_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "extension").mkdir()
    builder = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], stdout=subprocess.PIPE)
    assert builder.stdout is not None
    assert builder.stdout.readline() == b"building\n"
    waiting = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], stdout=subprocess.PIPE)
    time.sleep(0.5)
    assert waiting.poll() is None
    for process in (waiting, builder):
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    baton = FileBaton(tmp_path / "extension" / "lock")
    assert not baton.try_acquire(), "the killed process has left its lock behind"
    with building_alone(tmp_path):
        assert baton.try_acquire()
