"""Where a node keeps what. Below its work root:

tasks/<task_id>/executor/              checkpoints and adapters, shared by all attempts on this host
tasks/<task_id>/assignments/<epoch>/   what one attempt was told (order.json, work.pb, control) and said (journal, log)
datasets/                              rows by content, and their tokens
strategies.json                        how fast backbones were trained on several places, by strategy
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

STRATEGIES_FILE = "strategies.json"
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


def sweep(work_root: Path, untouched_since_s: float) -> None:
    """Delete what nobody has touched since (Unix time): folders of tasks, and copies of datasets."""
    for folder in (work_root / "tasks").glob("*"):
        if _touched_s(folder) < untouched_since_s:
            shutil.rmtree(folder, ignore_errors=True)
    for path in (work_root / "datasets").glob("*"):
        if path.is_file() and path.stat().st_mtime < untouched_since_s:
            path.unlink(missing_ok=True)


def _touched_s(folder: Path) -> float:
    """Return when anything in a folder last changed, as Unix time."""
    times = [folder.stat().st_mtime]
    for parent, _, names in os.walk(folder):
        times.extend((Path(parent) / name).stat().st_mtime for name in names)
    return max(times)
