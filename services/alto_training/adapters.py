"""Putting a trial's best adapter into the artifact store, and the event that tells of it."""

from __future__ import annotations

from pathlib import Path

from alto.v1 import event_pb2, tuning_pb2
from alto_common.artifacts import ArtifactStore

from alto_training import outages
from alto_training.executor.events import TrialFinished


def publish(store: ArtifactStore, artifact_folder: str, epoch: int, finished: TrialFinished) -> event_pb2.TaskEvent:
    """Copy the adapter of a trial that has one, and return its AdapterReady.

    It goes to <artifact_folder>/trials/<trial_id>/<epoch>-<step>/: no two attempts write the same file. Raises
    StoreUnreachableError.
    """
    assert finished.adapter_path is not None, "only a trial with an adapter is published"
    folder = f"{artifact_folder}/trials/{finished.trial_id}/{epoch}-{finished.best_step}"
    files = []
    for path in sorted(Path(finished.adapter_path).iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                stored = outages.write(store, f"{folder}/{path.name}", file)
            files.append(tuning_pb2.AdapterFile(name=path.name, size_bytes=stored.size_bytes, sha256=stored.sha256))
    adapter = tuning_pb2.Adapter(
        files=files, step=finished.best_step or 0, validation_loss=finished.best_validation_loss or 0.0
    )
    event = event_pb2.TaskEvent(
        task_id=finished.task_id,
        trial_id=finished.trial_id,
        adapter_ready=event_pb2.AdapterReady(adapter=adapter, uri=folder),
    )
    event.time.GetCurrentTime()
    return event
