"""Where a node keeps what. Below its work root:

tasks/<task_id>/executor/              checkpoints and adapters, shared by all attempts on this host
tasks/<task_id>/assignments/<epoch>/   what one attempt was told (order.json, work.pb, control) and said (journal, log)
datasets/                              rows by content
datasets/tokenised/<fingerprint>/      their tokens, touched at each use
strategies.json                        how fast backbones were trained on several places, by strategy
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

STRATEGIES_FILE = "strategies.json"
TOKENS_FOLDER = "tokenised"
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class AssignmentFolders:
    """The folders of one attempt. Raises ValueError for a task_id that is not a plain name."""

    work_root: Path
    task_id: str
    epoch: int

    def __post_init__(self) -> None:
        if not _SAFE_ID.fullmatch(self.task_id):
            raise ValueError(f"task_id {self.task_id!r} cannot name a folder")

    @property
    def task(self) -> Path:
        """The task's own."""
        return self.work_root / "tasks" / self.task_id

    @property
    def assignment(self) -> Path:
        """The attempt's own."""
        return self.task / "assignments" / str(self.epoch)

    @property
    def dataset_cache(self) -> Path:
        """Shared by all tasks."""
        return self.work_root / "datasets"

    def prepare(self) -> None:
        """Make the attempt's folder."""
        self.assignment.mkdir(parents=True, exist_ok=True)

    def earlier(self) -> Path | None:
        """Return the folder of the attempt before this one on this host, if there was one."""
        epochs = [int(path.name) for path in (self.task / "assignments").glob("*") if path.name.isdigit()]
        before = max((epoch for epoch in epochs if epoch < self.epoch), default=None)
        return self.task / "assignments" / str(before) if before is not None else None

    def remove_training_state(self) -> None:
        """Delete checkpoints and adapters of a task that will not be trained again; its journals stay for a while."""
        for folder in self.task.glob("executor*"):
            shutil.rmtree(folder, ignore_errors=True)


def sweep(work_root: Path, unused_since_s: float) -> None:
    """Delete what nobody has used since (Unix time): folders of tasks, copies of datasets, and their tokens."""
    datasets = work_root / "datasets"
    for folder in (*(work_root / "tasks").glob("*"), *(datasets / TOKENS_FOLDER).glob("*")):
        if folder.is_dir() and _last_used_s(folder) < unused_since_s:
            # Out of the way first: whoever begins to use it now finds the whole of it or nothing.
            aside = folder.with_name(f".swept-{secrets.token_hex(6)}")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    for path in datasets.glob("*"):
        if path.is_file() and _last_used_s(path) < unused_since_s:
            path.unlink(missing_ok=True)


def _last_used_s(path: Path) -> float:
    """Return when a file, or anything in a folder, was last read or written, as Unix time; now when it is just going.

    File systems note reading once a day, some never. Looking into a folder is no use of it.
    """
    try:
        if not path.is_dir():
            return _used_s(path)
        files = (Path(parent) / name for parent, _, names in os.walk(path) for name in names)
        return max([path.stat().st_mtime, *map(_used_s, files)])
    except FileNotFoundError:
        return time.time()


def _used_s(file: Path) -> float:
    status = file.stat()
    return max(status.st_mtime, status.st_atime)
