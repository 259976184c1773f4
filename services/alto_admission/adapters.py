"""Adapters on their way out: which files, and their bytes one after another from any offset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from alto.v1 import tuning_pb2
from alto_common.artifacts import ArtifactStore
from alto_common.errors import invalid_fields, not_found
from alto_common.violations import Violation

from alto_admission.domain.story import Story
from alto_admission.domain.task import Trial
from alto_admission.store.tasks import TaskStore


class Adapters:
    """Finds and reads adapters."""

    def __init__(self, tasks: TaskStore, artifacts: ArtifactStore) -> None:
        self._tasks = tasks
        self._artifacts = artifacts

    async def find(self, tenant: str, task_id: str, trial_id: str) -> Trial:
        """Return the trial whose adapter is asked for: the best of the task when none is named.

        Raises RESOURCE_NOT_FOUND when there is no adapter yet.
        """
        if not trial_id:
            task, trials = await self._tasks.with_trials(task_id, tenant)
            trial = Story(task, [trial for trial in trials if trial.adapter is not None], 0).best_trial()
        else:
            trial = await self._tasks.trial(task_id, trial_id, tenant)
        if trial is None or trial.adapter is None:
            raise not_found("adapter", trial_id or f"best of {task_id}")
        return trial

    async def read(self, trial: Trial, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of the files' contents, one file after another, from `offset` on.

        Raises INVALID_FIELD for an offset behind the end, RESOURCE_NOT_FOUND when a file is gone.
        """
        adapter = tuning_pb2.Adapter.FromString(trial.adapter or b"")
        total = sum(file.size_bytes for file in adapter.files)
        if offset > total:
            raise invalid_fields([Violation("offset", offset, f"give at most {total}, the size of all files")])
        start = 0
        for file in adapter.files:
            inside = max(0, offset - start)
            if inside < file.size_bytes:
                async for position, piece in self._pieces(f"{trial.adapter_folder}/{file.name}", inside):
                    yield start + position, piece
            start += file.size_bytes

    async def _pieces(self, path: str, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        pieces: Iterator[bytes] = self._artifacts.read(path, offset)
        while True:
            try:
                piece = await asyncio.to_thread(next, pieces, b"")
            except FileNotFoundError as error:
                raise not_found("adapter file", path.rpartition("/")[2]) from error
            if not piece:
                return
            yield offset, piece
            offset += len(piece)
