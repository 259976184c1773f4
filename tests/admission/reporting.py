"""A node as admission sees it: reports of one assignment, in order, from 1."""

import hashlib

from alto.v1 import event_pb2, report_service_pb2, tuning_pb2

RUNNING = tuning_pb2.TRIAL_STATE_RUNNING
SUCCEEDED = tuning_pb2.TRIAL_STATE_SUCCEEDED


def started(node_id="n1", resumed=False):
    started = event_pb2.ExecutionStarted(node_id=node_id, device="cpu", base_validation_loss=3.0, resumed=resumed)
    return event_pb2.TaskEvent(execution_started=started)


def task_state(state, failure=None):
    return event_pb2.TaskEvent(task_state_changed=event_pb2.TaskStateChanged(state=state, failure=failure))


def trial_state(trial_id, state, step=0):
    changed = event_pb2.TrialStateChanged(state=state, step=step, total_steps=4, samples_trained=step * 2)
    return event_pb2.TaskEvent(trial_id=trial_id, trial_state_changed=changed)


def trained(trial_id, step, loss=None):
    loss = 2.0 / step if loss is None else loss
    metric = tuning_pb2.TrialMetric(step=step, train_loss=loss, train_loss_smoothed=loss, learning_rate=1e-4)
    measured = event_pb2.TrialMeasured(metric=metric, total_steps=4, samples_trained=step * 2)
    return event_pb2.TaskEvent(trial_id=trial_id, trial_measured=measured)


def evaluated(trial_id, step, loss):
    measured = event_pb2.TrialMeasured(metric=tuning_pb2.TrialMetric(step=step, validation_loss=loss), total_steps=4)
    return event_pb2.TaskEvent(trial_id=trial_id, trial_measured=measured)


def decided(trial_id, step, verdict=tuning_pb2.VERDICT_STOP):
    decision = tuning_pb2.StoppingDecision(verdict=verdict, policy="paper", rule="underperformance", step=step)
    return event_pb2.TaskEvent(trial_id=trial_id, trial_decided=event_pb2.TrialDecided(decision=decision))


def progressed(fraction):
    return event_pb2.TaskEvent(task_progressed=event_pb2.TaskProgressed(fraction_done=fraction))


def adapter_ready(trial_id, folder, loss, step=4, files=()):
    adapter = tuning_pb2.Adapter(files=files, step=step, validation_loss=loss)
    return event_pb2.TaskEvent(
        trial_id=trial_id, adapter_ready=event_pb2.AdapterReady(adapter=adapter, uri=f"{folder}/trials/{trial_id}")
    )


def numbered(task_id, epoch, events, first=1):
    """The requests that report `events` as those of one assignment."""
    return [
        report_service_pb2.ReportEventsRequest(task_id=task_id, epoch=epoch, sequence=sequence, event=event)
        for sequence, event in enumerate(events, start=first)
    ]


class Node:
    """Trains nothing, but reports a whole search and writes its adapters."""

    def __init__(self, admission, work, artifact_root):
        self.admission = admission
        self.work = work
        self.root = artifact_root

    def whole_story(self):
        """The events of an undisturbed execution; later trials are better."""
        trials = [trial.trial_id for trial in self.work.trials]
        events = [started()]
        for number, trial_id in enumerate(trials):
            events.append(trial_state(trial_id, RUNNING))
            for step in range(1, 5):
                events.append(trained(trial_id, step))
                events.append(evaluated(trial_id, step, 2.0 / step - 0.1 * number))
            events.append(self.written_adapter(trial_id, 0.5 - 0.1 * number))
            events.append(trial_state(trial_id, SUCCEEDED, 4))
            events.append(progressed((number + 1) / len(trials)))
        return [*events, task_state(tuning_pb2.TASK_STATE_SUCCEEDED)]

    def written_adapter(self, trial_id, loss):
        folder = self.root / self.work.artifact_folder / "trials" / trial_id
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"adapter_model.safetensors": f"weights of {trial_id}".encode(), "adapter_config.json": b"{}"}
        files = []
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append(tuning_pb2.AdapterFile(name=name, size_bytes=len(content), sha256=sha256))
        return adapter_ready(trial_id, self.work.artifact_folder, loss, files=files)

    async def train_all(self, epoch=1):
        events = self.whole_story()
        return await self.admission.report(numbered(self.work.task_id, epoch, events))
