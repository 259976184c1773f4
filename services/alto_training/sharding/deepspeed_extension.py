"""What DeepSpeed compiles on first use (on a CPU, its messages by shared memory): once, and by one process at a time.

torch's own lock on a build is a file that a process killed in the middle leaves behind, and for which every later one
waits for ever. Here a lock of the kernel's stands around it, which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VARIABLE = "TORCH_EXTENSIONS_DIR"
_BUILDER = "ShareMemCommBuilder"


def load_extension() -> None:
    """Compile DeepSpeed's extension for this device if it has one, or load it where that was done before."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    folder = extensions_folder()
    os.environ[_VARIABLE] = str(folder)
    builder: Any = get_accelerator().create_op_builder(_BUILDER)
    if builder is not None and builder.is_compatible(verbose=False):
        with building_alone(folder):
            builder.load(verbose=False)


def extensions_folder() -> Path:
    """Return where extensions for these versions are kept: below $TORCH_EXTENSIONS_DIR, or ~/.cache/alto/extensions."""
    import deepspeed
    import torch

    root = Path(os.environ.get(_VARIABLE) or "~/.cache/alto/extensions").expanduser()
    name = f"alto-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}-ds{deepspeed.__version__}"
    return root if root.name == name else root / name


@contextmanager
def building_alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build in `folder`, after clearing the locks of those that were killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "alone").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for left_behind in folder.glob("*/lock"):
            left_behind.unlink()
        yield
