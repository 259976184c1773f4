"""The loop: pack a tick, train it, step whose batch is complete, evaluate, decide, fill freed slots, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import TuningJob

from alto_training.early_exit import Decision, make_policy
from alto_training.executor import passes
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.checkpoint import Checkpoint, CheckpointStore
from alto_training.executor.control import Cancel, Control, Pause, ReviveTrial, StopTrial
from alto_training.executor.errors import ExecutorError, JobChangedError, OutOfMemoryError, WrongBaseModelError
from alto_training.executor.events import (
    CheckpointWritten,
    Event,
    Outcome,
    TaskStarted,
    TaskState,
    TickHalved,
    TrialDecided,
    TrialProgress,
    TrialStarted,
    TrialState,
    Verdict,
)
from alto_training.executor.loading import OpenData, load_job_backbone, open_job_data
from alto_training.executor.packer import choose_items
from alto_training.executor.progress import ProgressMeter
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.slots import Slots
from alto_training.executor.task_run import TaskRun
from alto_training.executor.trial_run import TrialRun

_DEFAULT_TOKENS_PER_TICK = {"cpu": 1024, "cuda": 8192}


class Executor:
    """Trains every trial of a job (and of `companions`, jobs over the same backbone) together, and returns how it went.

    `workdir` receives adapters/ (PEFT format, best validation loss) and checkpoints/; running again over the same
    folder carries on from the last good checkpoint. `events` is called on the executor's thread, in order. `backbone`
    saves loading one that is at hand; `open_data` replaces how datasets are opened.
    """

    def __init__(
        self,
        job: TuningJob,
        workdir: Path,
        events: Callable[[Event], None],
        settings: ExecutorSettings | None = None,
        control: Control | None = None,
        *,
        companions: Sequence[TuningJob] = (),
        backbone: Backbone | None = None,
        open_data: OpenData = open_job_data,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = (job, *companions)
        self._workdir = workdir
        self._emit = events
        self._settings = settings or ExecutorSettings()
        self._control = control
        self._given_backbone = backbone
        self._open_data = open_data
        self._clock = clock
        self._store = CheckpointStore(workdir / "checkpoints")
        self._tasks: list[TaskRun] = []
        self._task_of: dict[TrialRun, TaskRun] = {}
        self._tick = 0
        self._cancelled: str | None = None
        self._paused = False

    def run(self) -> Outcome:
        """Train until every trial has ended, or until paused or cancelled; return the first job's outcome.

        Raises an `ExecutorError` when nothing can be trained: each names what is wrong and the cure.
        """
        return self.run_all()[0]

    def run_all(self) -> list[Outcome]:
        """Like `run`, with an outcome for each job."""
        self._prepare()
        while not self._paused:
            self._obey()
            self._fill_slots()
            if not any(True for _ in self._slots):
                break
            self._train_one_tick()
            self._write_checkpoint_if_due()
            self._tell_progress(self._settings.progress_interval_s)
        self._write_checkpoint()
        self._tell_progress(0.0)
        return [self._outcome(task) for task in self._tasks]

    # Setting up

    def _prepare(self) -> None:
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        backbone = self._given_backbone or load_job_backbone(self._jobs[0].base_model, self._settings)
        if self._settings.recompute:
            backbone.recompute_activations()
        self._backbone = backbone
        self._tokens_per_tick = self._settings.tokens_per_tick or _DEFAULT_TOKENS_PER_TICK[backbone.device.type]
        self._evaluation_tokens = self._settings.evaluation_tokens_per_tick or 2 * self._tokens_per_tick
        for number, job in enumerate(self._jobs):
            folder = self._workdir if number == 0 else self._workdir / "tasks" / job.task_id
            policy = make_policy(job.early_exit, [trial.trial_id for trial in job.trials])
            train, validation = self._open_data(job, self._settings.cache_dir or self._workdir / "cache")
            self._tasks.append(
                TaskRun(job, train, validation, backbone, policy, folder, self._emit, self._evaluation_tokens)
            )
        trials = sum(len(job.trials) for job in self._jobs)
        self._slots: Slots[TrialRun] = Slots(min(self._settings.slots or trials, trials))
        checkpoint = self._store.read()
        if checkpoint is None:
            self._begin()
        else:
            self._resume(checkpoint)
        # A resumed run goes on with the back end it had: another rounds otherwise.
        before = checkpoint.state["backend"] if checkpoint and self._settings.backend is Backend.AUTO else None
        name = before or self._settings.backend
        self._backend = choose_backend(name, backbone.layers, len(self._slots.places), backbone.device)
        backbone.use_backend(self._backend)
        self._tell_started(None if checkpoint is None else checkpoint.tick)
        self._meter = ProgressMeter(self._clock)
        self._checkpointed_at = self._clock()

    def _begin(self) -> None:
        for task in self._tasks:
            for trial in task.job.trials:
                try:
                    run = task.prepare(trial)
                except ExecutorError as error:
                    task.refuse(trial, str(error))
                    self._apply(task, task.policy.trial_ended(trial.trial_id))
                else:
                    self._task_of[run] = task
                    self._slots.enqueue(run)

    def _tell_started(self, resumed_from_tick: int | None) -> None:
        for task in self._tasks:
            self._emit(
                TaskStarted(
                    task_id=task.task_id,
                    device=str(self._backbone.device),
                    backbone_dtype=self._settings.backbone_dtype,
                    backend=self._backend.name,
                    slots=len(self._slots.places),
                    tokens_per_tick=self._tokens_per_tick,
                    trials=len(task.job.trials),
                    train_examples=len(task.train),
                    validation_examples=len(task.validation),
                    backbone_parameters=self._backbone.parameters,
                    resumed_from_tick=resumed_from_tick,
                )
            )

    # One tick

    def _train_one_tick(self) -> None:
        """Train a tick's worth of every active trial, then do all that follows from it."""
        started = self._clock()
        active = list(self._slots)
        taken, losses = self._forward_backward(active)
        self._tick += 1
        stepped: list[TrialRun] = []
        for run, items, loss in zip(active, taken, losses, strict=True):
            if items and run.count(items, loss) and self._finish_batch(run):
                stepped.append(run)
        evaluating_from = self._clock()
        self._meter.training_seconds += evaluating_from - started
        self._evaluate([run for run in stepped if run.evaluation_due])
        self._meter.evaluation_seconds += self._clock() - evaluating_from
        for run in stepped:
            if run.finished and run in self._slots:
                self._end(run, TrialState.SUCCEEDED, "all its steps are done")

    def _forward_backward(self, active: Sequence[TrialRun]) -> tuple[list[int], list[float]]:
        """Return how many items each active trial trained, and their part of its loss; halve the tick if it must be."""
        while True:
            taken = choose_items([run.waiting_tokens for run in active], self._tokens_per_tick, self._tick)
            shares = [
                (place, run.share(items)) for place, (run, items) in enumerate(zip(active, taken, strict=True)) if items
            ]
            try:
                parts = passes.train_tick(self._backbone, [share for _, share in shares])
            except passes.TickTooLargeError as error:
                self._halve(active, taken, error)
                continue
            losses = [0.0] * len(active)
            for (place, share), part in zip(shares, parts, strict=True):
                losses[place] = part
                self._meter.trained_tokens += sum(item.tokens for item in share.items)
            return taken, losses

    def _halve(self, active: Sequence[TrialRun], taken: Sequence[int], error: Exception) -> None:
        """Halve the tick after memory ran out; effective batches whose gradients were being added start again."""
        for run, items in zip(active, taken, strict=True):
            if items:
                run.restart_batch()
        if sum(taken) == 1:
            raise OutOfMemoryError(
                f"memory ran out with a single sequence on the tick ({error})",
                "use recomputation, a smaller max_length, or a device with more memory",
            ) from error
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        before, self._tokens_per_tick = self._tokens_per_tick, max(1, self._tokens_per_tick // 2)
        self._evaluation_tokens = max(1, self._evaluation_tokens // 2)
        for task in self._tasks:
            self._emit(TickHalved(task.task_id, before, self._tokens_per_tick))

    def _finish_batch(self, run: TrialRun) -> bool:
        """Take the optimiser step of a complete effective batch; a trial that is not finite ends instead."""
        task = self._task_of[run]
        report = run.finish_batch()
        if not report.finite:
            reason = (
                f"Stopped at step {run.step + 1}: the train loss is {report.train_loss:g} and the gradient norm "
                f"{report.gradient_norm:g}. A lower learning rate usually cures this."
            )
            self._decided(task, run, Verdict.STOP, "non_finite", reason)
            self._end(run, TrialState.STOPPED, reason)
            return False
        self._emit(
            TrialProgress(
                task_id=task.task_id,
                trial_id=run.trial_id,
                step=run.step,
                total_steps=run.total_steps,
                train_loss=report.train_loss,
                train_loss_smoothed=run.train_loss_smoothed,
                learning_rate=report.learning_rate,
                gradient_norm=report.gradient_norm,
                tokens_trained=run.tokens_trained,
            )
        )
        return True

    def _evaluate(self, due: Sequence[TrialRun]) -> None:
        """Measure the validation loss of all trials that are due, together, and act on what the policies say."""
        if not due:
            return
        shares = [self._task_of[run].evaluation_share(run) for run in due]
        losses = passes.item_losses(self._backbone, shares, self._evaluation_tokens)
        for run, each in zip(due, losses, strict=True):
            task = self._task_of[run]
            observation = task.note_evaluation(run, each)
            if run.trial_id not in task.unjudged:
                self._apply(task, task.policy.observe(run.trial_id, observation))
            elif not observation.finite:
                self._end(run, TrialState.STOPPED, f"its validation loss is not finite at step {run.step}")

    # What follows

    def _apply(self, task: TaskRun, decisions: Sequence[Decision]) -> None:
        """Act on a policy's decisions."""
        for decision in decisions:
            run = task.runs.get(decision.trial_id)
            if run is None or decision.trial_id in task.finished or decision.trial_id in task.unjudged:
                continue
            verdict = Verdict(decision.verdict.value)
            self._decided(
                task, run, verdict, decision.rule, decision.reason, dict(decision.evidence), decision.threshold
            )
            if verdict is Verdict.STOP:
                self._end(run, TrialState.STOPPED, decision.reason)
            elif verdict is Verdict.PAUSE:
                self._slots.leave(run)
                run.adapter.move(torch.device("cpu"))
                task.parked.add(run.trial_id)
            elif run.trial_id in task.parked:
                task.parked.discard(run.trial_id)
                self._slots.enqueue(run)

    def _decided(
        self,
        task: TaskRun,
        run: TrialRun,
        verdict: Verdict,
        rule: str,
        reason: str,
        evidence: dict[str, float] | None = None,
        threshold: float | None = None,
    ) -> None:
        self._emit(TrialDecided(task.task_id, run.trial_id, run.step, verdict, rule, reason, evidence or {}, threshold))

    def _end(self, run: TrialRun, state: TrialState, reason: str) -> None:
        """End a trial: its slot is free, its best adapter is written, and the policy may release others."""
        task = self._task_of[run]
        self._slots.leave(run)
        run.adapter.move(torch.device("cpu"))
        task.finish(run, state, reason)
        self._apply(task, task.policy.trial_ended(run.trial_id))
        task.forget_oldest(self._settings.revivable_trials)

    def _fill_slots(self) -> None:
        """Give free slots to waiting trials."""
        if not self._slots.waiting and not any(True for _ in self._slots):
            self._release_parked()
        for slot, run in self._slots.fill():
            run.adapter.move(self._backbone.device)
            task = self._task_of[run]
            self._emit(TrialStarted(task.task_id, run.trial_id, slot, run.step, run.total_steps, run.adapter.size))

    def _release_parked(self) -> None:
        """Carry on with parked trials that no one is left to release: a policy must not be able to hang a task."""
        for task in self._tasks:
            for trial_id in sorted(task.parked):
                self._slots.enqueue(task.runs[trial_id])
            task.parked.clear()

    # Commands

    def _obey(self) -> None:
        """Carry out the commands that have come in since the last tick."""
        while self._control is not None and (command := self._control.poll()) is not None:
            if isinstance(command, Pause):
                self._paused = True
            elif isinstance(command, Cancel):
                self._cancel(command.reason)
            elif isinstance(command, StopTrial):
                for task, run in self._named(command.task_id, command.trial_id):
                    if run.trial_id not in task.finished:
                        self._decided(task, run, Verdict.STOP, "user", command.reason)
                        self._end(run, TrialState.CANCELLED, command.reason)
            elif isinstance(command, ReviveTrial):
                for task, run in self._named(command.task_id, command.trial_id):
                    self._revive(task, run)

    def _named(self, task_id: str | None, trial_id: str) -> list[tuple[TaskRun, TrialRun]]:
        return [
            (task, task.runs[trial_id])
            for task in self._tasks
            if trial_id in task.runs and task_id in (None, task.task_id)
        ]

    def _cancel(self, reason: str) -> None:
        self._cancelled = reason
        for run, task in list(self._task_of.items()):
            if run.trial_id in task.runs and run.trial_id not in task.finished:
                self._end(run, TrialState.CANCELLED, reason)

    def _revive(self, task: TaskRun, run: TrialRun) -> None:
        ended = task.finished.get(run.trial_id)
        if run.trial_id not in task.parked and (ended is None or ended.state is not TrialState.STOPPED):
            return
        task.finished.pop(run.trial_id, None)
        task.parked.discard(run.trial_id)
        task.unjudged.add(run.trial_id)
        self._decided(task, run, Verdict.REVIVE, "user", "revived by its user; no policy judges it any more")
        self._slots.enqueue(run, first=True)

    # Checkpoints, progress, the end

    def _write_checkpoint_if_due(self) -> None:
        every = self._settings.checkpoint_every_ticks
        by_count = every is not None and self._tick % every == 0
        if by_count or self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_s:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        started = self._clock()
        state: dict[str, Any] = {
            "backbone_fingerprint": self._backbone.fingerprint,
            "backend": self._backend.name,
            "tokens_per_tick": self._tokens_per_tick,
            "evaluation_tokens": self._evaluation_tokens,
            "slots": [None if run is None else self._name(run) for run in self._slots.places],
            "waiting": [self._name(run) for run in self._slots.waiting],
            "tasks": [task.state() for task in self._tasks],
        }
        groups = [group for number, task in enumerate(self._tasks) for group in task.tensor_groups(f"task{number}")]
        path, size = self._store.write(self._tick, state, groups)
        self._checkpointed_at = self._clock()
        for task in self._tasks:
            self._emit(CheckpointWritten(task.task_id, self._tick, str(path), size, self._checkpointed_at - started))

    def _name(self, run: TrialRun) -> tuple[int, str]:
        return self._tasks.index(self._task_of[run]), run.trial_id

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["backbone_fingerprint"] != self._backbone.fingerprint:
            raise WrongBaseModelError(
                f"the checkpoint in {self._workdir} is of another backbone than {self._backbone.name_or_path}",
                "give the base model it was trained over, or another work folder",
            )
        if len(state["tasks"]) != len(self._tasks):
            raise JobChangedError(
                f"the checkpoint in {self._workdir} holds {len(state['tasks'])} tasks, not {len(self._tasks)}",
                "give the same jobs in the same order, or another work folder",
            )
        self._tick = checkpoint.tick
        self._tokens_per_tick = state["tokens_per_tick"]
        self._evaluation_tokens = state["evaluation_tokens"]
        for number, (task, saved) in enumerate(zip(self._tasks, state["tasks"], strict=True)):
            task.load_state(saved, checkpoint.groups, f"task{number}")
            self._task_of |= dict.fromkeys(task.runs.values(), task)
        self._slots = Slots(len(state["slots"]))
        for slot, name in enumerate(state["slots"]):
            if name is not None:
                run = self._tasks[name[0]].runs[name[1]]
                run.adapter.move(self._backbone.device)
                self._slots.places[slot] = run
        for number, trial_id in state["waiting"]:
            self._slots.enqueue(self._tasks[number].runs[trial_id])

    def _tell_progress(self, interval_s: float) -> None:
        if self._meter.due(interval_s):
            for task in self._tasks:
                active = sum(self._task_of[run] is task for run in self._slots)
                self._emit(self._meter.measure(task, self._tick, active, self._backbone.device))

    def _outcome(self, task: TaskRun) -> Outcome:
        if self._paused and not task.done:
            state = TaskState.PAUSED
        elif self._cancelled is not None:
            state = TaskState.CANCELLED
        elif all(one.state is TrialState.FAILED for one in task.finished.values()):
            state = TaskState.FAILED
        else:
            state = TaskState.SUCCEEDED
        return Outcome(task.task_id, state, tuple(task.finished.values()), task.best_trial_id)
