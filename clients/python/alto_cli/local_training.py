"""What `alto train-local` does: the executor in this process, shown as a search of the services is shown."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import event_pb2, tuning_pb2
from alto_client.task_file import TaskFile, load_task_file
from alto_client.task_spec import task_spec

from alto_cli import exit_codes
from alto_cli.extras import needs_extra
from alto_cli.failures import CommandError
from alto_cli.following import Follower, follower, show_result
from alto_cli.local_folders import check_output, copy_files, locked
from alto_cli.local_job import local_job, told_to_the_user
from alto_cli.output import say
from alto_cli.quiet import quiet_libraries
from alto_cli.view.story import Story

if TYPE_CHECKING:
    from alto_common.tuning import TuningJob
    from alto_training.executor.control import ControlQueue
    from alto_training.executor.events import Event, Outcome
    from alto_training.executor.settings import ExecutorSettings

NODE_NAME = "this machine"
END_STATES = {
    "succeeded": tuning_pb2.TASK_STATE_SUCCEEDED,
    "cancelled": tuning_pb2.TASK_STATE_CANCELLED,
    "failed": tuning_pb2.TASK_STATE_FAILED,
}


@dataclass(frozen=True)
class LocalMachine:
    """How to use this machine: what the options of `alto train-local` and `alto estimate --local` say."""

    device: str = ""
    dtype: str = "float32"
    slots: int | None = None
    threads: int | None = None

    def settings(self) -> ExecutorSettings:
        """Return the executor's settings; raise `CommandError` for a number format that there is not."""
        from alto_common.calibrations import default_calibrations_folder
        from alto_training.executor.settings import BackboneDtype, ExecutorSettings

        formats = ", ".join(BackboneDtype)
        if self.dtype not in list(BackboneDtype):
            raise CommandError(f"--dtype {self.dtype}: there is no such number format", f"give one of {formats}")
        return ExecutorSettings(
            device=self.device,
            backbone_dtype=BackboneDtype(self.dtype),
            slots=self.slots,
            threads=self.threads,
            calibrations=default_calibrations_folder(),
        )


def prepare_libraries(machine: LocalMachine) -> LocalMachine:
    """Load torch, keep its libraries quiet, and return the machine with its device named."""
    import torch

    device = machine.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in (*there, *(["cuda"] if len(there) > 1 else [])):
        raise CommandError(f"--device {device}: there is no such device here", f"give one of {', '.join(there)}")
    quiet_libraries(device.partition(":")[0])
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    return replace(machine, device=device)


def train_file(
    path: Path, work: Path | None, output: Path | None, force: bool, machine: LocalMachine, json_output: bool
) -> None:
    """Run the search of a task file here, and put the best adapter into the output folder."""
    task_file = load_task_file(path)
    folder = output.resolve() if output else task_file.output
    work = work.resolve() if work else folder.with_name(f"{folder.name}.work")
    with needs_extra("training", "training on this machine"):
        machine = prepare_libraries(machine)
        from alto_training.executor.control import ControlQueue
        from alto_training.executor.executor import Executor
    settings = machine.settings()
    check_output(folder, work, force)
    story, control = Story(), ControlQueue()
    with told_to_the_user(), locked(work):
        job = local_job(task_file, work)
        with follower(story, json_output) as shown, _pause_on_interrupt(control, shown):
            shown.message(_snapshot(task_file, job))
            outcome = Executor(job, work, _sink(job, shown), settings, control).run()
    if outcome.state == "paused":
        say(f"paused with a checkpoint in {work}; the same command carries on")
        raise typer.Exit(exit_codes.INTERRUPTED)
    adapter_folder = ""
    if outcome.best is not None and outcome.best.adapter_path is not None:
        copy_files(Path(outcome.best.adapter_path), folder)
        adapter_folder = str(folder)
    _close(story, outcome)
    show_result(story, adapter_folder, json_output)
    raise typer.Exit(exit_codes.SUCCESS if adapter_folder else exit_codes.FAILURE)


def _snapshot(task_file: TaskFile, job: TuningJob) -> messages.WatchTuningTaskResponse:
    """Return the story's first message: the task is about to run, its trials are pending."""
    from alto_common.tuning_wire import trial_config_to_wire

    task = tuning_pb2.TuningTask(
        task_id=job.task_id,
        spec=task_spec(task_file, dataset_id=""),
        state=tuning_pb2.TASK_STATE_QUEUED,
        trial_count=len(job.trials),
    )
    task.queue.explanation = "loading the base model and the datasets"
    trials = [
        tuning_pb2.Trial(
            trial_id=trial.trial_id,
            task_id=job.task_id,
            config=trial_config_to_wire(trial.config),
            state=tuning_pb2.TRIAL_STATE_PENDING,
        )
        for trial in job.trials
    ]
    return messages.WatchTuningTaskResponse(snapshot=messages.TuningTaskSnapshot(task=task, trials=trials))


def _sink(job: TuningJob, shown: Follower) -> Any:
    """Return what takes the executor's events: they are shown as those of a watch are."""
    from alto_training.wire import EventTranslator

    translator = EventTranslator(job, NODE_NAME)
    sequence = 0

    def take(event: Event) -> None:
        nonlocal sequence
        for translated in translator.translate(event):
            sequence += 1
            translated.sequence = sequence
            shown.message(messages.WatchTuningTaskResponse(event=translated))

    return take


def _close(story: Story, outcome: Outcome) -> None:
    """Put into the story what only the outcome tells: savings, the end, and trials that ended in an earlier run."""
    from alto_training.wire import TRIAL_STATES

    trained = sum(trial.samples_trained for trial in outcome.trials)
    saved = sum(trial.samples_saved for trial in outcome.trials)
    stopped = sum(trial.state == "stopped" for trial in outcome.trials)
    story.task.savings.CopyFrom(
        tuning_pb2.Savings(samples_planned=trained + saved, samples_trained=trained, trials_stopped=stopped)
    )
    for trial in outcome.trials:
        known = story.trials[trial.trial_id]
        known.state = TRIAL_STATES[trial.state]
        known.step, known.total_steps, known.samples_trained = trial.step, trial.total_steps, trial.samples_trained
        if trial.best_validation_loss is not None:
            known.best_validation_loss, known.best_step = trial.best_validation_loss, trial.best_step or 0
        if trial.state == "stopped" and not known.HasField("decision"):
            known.decision.reason = trial.reason
    if outcome.best is not None and outcome.best.best_validation_loss is not None:
        story.task.best_trial_id = outcome.best.trial_id
        story.task.best_validation_loss = outcome.best.best_validation_loss
    end = event_pb2.TaskEvent(
        task_state_changed=event_pb2.TaskStateChanged(state=END_STATES.get(outcome.state, story.task.state))
    )
    if outcome.state == "failed":
        reasons = dict.fromkeys(trial.reason for trial in outcome.trials)
        end.task_state_changed.failure.message = f"no trial left an adapter: {'; '.join(reasons)}"
    end.time.GetCurrentTime()
    story.apply_event(end)


@contextmanager
def _pause_on_interrupt(control: ControlQueue, shown: Follower) -> Iterator[None]:
    """Let Ctrl-C pause at the next tick, with a checkpoint; a second one ends at once."""
    from alto_training.executor.control import Pause

    def on_signal(_number: int, _frame: object) -> None:
        control.put(Pause())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shown.notice("writing a checkpoint, then stopping; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
