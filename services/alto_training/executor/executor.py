"""The loop: pack a tick, train it, step whose batch is complete, evaluate, decide, fill freed slots, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import TuningJob

from alto_training.early_exit import make_policy
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.budget import Budget, backbone_facts, choose_budget
from alto_training.executor.calibration import costs_of
from alto_training.executor.checkpoint import Checkpoint, CheckpointStore
from alto_training.executor.control import Command, Control, Pause
from alto_training.executor.errors import JobChangedError, WrongBaseModelError
from alto_training.executor.events import (
    CheckpointWritten,
    Event,
    Outcome,
    TaskStarted,
    TaskState,
    TickHalved,
    TrialProgress,
    TrialState,
    Verdict,
)
from alto_training.executor.fitting_passes import FittingPasses
from alto_training.executor.loading import OpenData, load_job_backbone, open_job_data
from alto_training.executor.progress import ProgressMeter
from alto_training.executor.ranks import OneRank, Ownership, Ranks
from alto_training.executor.roster import Roster
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.task_run import TaskRun
from alto_training.executor.trial_run import TrialRun


class Executor:
    """Trains every trial of a job (and of `companions`, jobs over the same backbone) together, and returns how it went.

    `workdir` receives adapters/ (PEFT format, best validation loss) and checkpoints/; running again over the same
    folder carries on from the last good checkpoint. `events` is called on the executor's thread, in order. `backbone`
    saves loading one that is at hand; `open_data` replaces how datasets are opened. `ranks` says that other processes
    run the same over the same folder, and shares the trials out among all. `before_checkpoint` returns when whatever
    `events` was told is safe: a run that carries on from the checkpoint does not tell it again.
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
        ranks: Ranks | None = None,
        before_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs = (job, *companions)
        self._workdir = workdir
        self._emit = events
        self._settings = settings or ExecutorSettings()
        self._control = control
        self._given_backbone = backbone
        self._open_data = open_data
        self._clock = clock
        self._ranks = ranks or OneRank()
        self._before_checkpoint = before_checkpoint
        self._store = CheckpointStore(workdir / "checkpoints")
        self._ownership = Ownership(self._ranks, self._store)
        self._tick = 0
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
            commands, checkpoint_due = self._ranks.first(self._commands(), self._checkpoint_due())
            if checkpoint_due:
                self._write_checkpoint()
            self._obey(commands)
            self._roster.fill_slots()
            if not any(True for _ in self._roster):
                break
            self._train_one_tick()
            self._tell_progress(self._settings.progress_interval_s)
        self._write_checkpoint()
        self._tell_progress(0.0)
        return [self._outcome(task) for task in self._roster.tasks]

    # Setting up

    def _prepare(self) -> None:
        self._meter = ProgressMeter(self._clock)
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        backbone = self._given_backbone or load_job_backbone(self._jobs[0].base_model, self._settings)
        if self._settings.recompute:
            backbone.recompute_activations()
        self._backbone = backbone
        configs = [trial.config for job in self._jobs for trial in job.trials]
        # Alone, for ranks would have to measure in step.
        costs = costs_of(self._settings, backbone, may_measure=self._ranks.size == 1)
        budget = self._agreed(choose_budget(self._settings, backbone_facts(backbone), costs, configs), len(configs))
        evaluation_tokens = self._settings.evaluation_tokens_per_tick or 2 * budget.tokens_per_tick
        self._passes = FittingPasses(
            backbone,
            budget.tokens_per_tick,
            evaluation_tokens,
            self._ranks,
            self._ownership,
            self._meter,
            self._tell_halved,
            self._clock,
        )
        tasks = []
        for number, job in enumerate(self._jobs):
            folder = self._workdir if number == 0 else self._workdir / "tasks" / job.task_id
            policy = make_policy(job.early_exit, [trial.trial_id for trial in job.trials])
            train, validation = self._open_data(job, self._settings.cache_dir or self._workdir / "cache")
            tasks.append(
                TaskRun(
                    job, train, validation, backbone, policy, folder, self._emit, evaluation_tokens, self._ownership
                )
            )
        revivable = self._settings.revivable_trials
        self._roster = Roster(tasks, budget.slots, backbone.device, self._emit, revivable, self._ownership)
        checkpoint = self._store.read()
        if checkpoint is None:
            self._roster.admit_all()
        else:
            self._resume(checkpoint)
        # A resumed run goes on with the back end it had: another rounds otherwise.
        before = checkpoint.state["backend"] if checkpoint and self._settings.backend is Backend.AUTO else None
        name = before or self._settings.backend
        self._backend = choose_backend(
            name, backbone.layers, len(self._roster.slots.places), backbone.device, backbone.dtype
        )
        backbone.use_backend(self._backend)
        for task in self._roster.tasks:
            if task.base_validation_loss is None:
                task.note_base_losses(self._passes.losses([task.evaluation_share(None)])[0])
        self._tell_started(None if checkpoint is None else checkpoint.tick)
        self._meter.begin()
        self._checkpointed_at, self._checkpointed_tick = self._clock(), self._tick

    def _agreed(self, budget: Budget, trials: int) -> Budget:
        """Return one budget for all ranks: tokens that fit on each of them, and the slots of all together."""
        each = self._ranks.united({str(self._ranks.rank): (budget.tokens_per_tick, budget.slots)}).values()
        slots = self._settings.slots or sum(slots for _, slots in each)
        return Budget(min(tokens for tokens, _ in each), min(slots, trials))

    def _tell_started(self, resumed_from_tick: int | None) -> None:
        for task in self._roster.tasks:
            self._emit(
                TaskStarted(
                    task_id=task.task_id,
                    device=str(self._backbone.device),
                    backbone_dtype=self._settings.backbone_dtype,
                    backend=self._backend.name,
                    slots=len(self._roster.slots.places),
                    tokens_per_tick=self._passes.tokens_per_tick,
                    trials=len(task.job.trials),
                    train_examples=len(task.train),
                    validation_examples=len(task.validation),
                    backbone_parameters=self._backbone.parameters,
                    base_validation_loss=task.base_validation_loss,
                    resumed_from_tick=resumed_from_tick,
                )
            )

    def _tell_halved(self, before: int, after: int) -> None:
        for task in self._roster.tasks:
            self._emit(TickHalved(task.task_id, before, after))

    # One tick

    def _train_one_tick(self) -> None:
        """Train a tick's worth of every active trial, then do all that follows from it."""
        started = self._clock()
        trained = self._passes.train(list(self._roster), turn=self._tick)
        self._tick += 1
        complete = [run for run, part in trained.items() if run.count(part.items, part.loss)]
        stepped = [run for run in complete if self._finish_batch(run, trained[run].gradient_norm)]
        tokens = sum(part.tokens for part in trained.values())
        self._meter.trained(tokens, sum(run.config.lora_rank for run in trained), self._clock() - started)
        self._evaluate([run for run in stepped if run.evaluation_due])
        for run in stepped:
            if run.finished and run.trial_id not in self._roster.task_of(run).finished:
                self._roster.end(run, TrialState.SUCCEEDED, "all its steps are done")

    def _finish_batch(self, run: TrialRun, norm: float) -> bool:
        """Take the optimiser step of a complete effective batch; a trial that is not finite ends instead."""
        task = self._roster.task_of(run)
        report = run.finish_batch(norm)
        if not report.finite:
            reason = (
                f"Stopped at step {run.step + 1}: the train loss is {report.train_loss:g} and the gradient norm "
                f"{report.gradient_norm:g}. A lower learning rate usually cures this."
            )
            self._roster.decided(task, run, Verdict.STOP, "non_finite", reason)
            self._roster.end(run, TrialState.STOPPED, reason)
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
        losses = self._passes.validation_losses(
            due, lambda run: self._roster.task_of(run).evaluation_share(run.adapter)
        )
        for run in due:
            task = self._roster.task_of(run)
            observation = task.note_evaluation(run, losses[run])
            if run.trial_id not in task.unjudged:
                self._roster.apply(task, task.policy.observe(run.trial_id, observation))
            elif not observation.finite:
                self._roster.end(run, TrialState.STOPPED, f"its validation loss is not finite at step {run.step}")
        for run in due:
            self._roster.rotate(run)

    # Commands, checkpoints, progress, the end

    def _commands(self) -> list[Command]:
        """Return the commands that have come in since the last tick."""
        commands: list[Command] = []
        while self._control is not None and (command := self._control.poll()) is not None:
            commands.append(command)
        return commands

    def _obey(self, commands: Sequence[Command]) -> None:
        """Carry out commands."""
        for command in commands:
            if isinstance(command, Pause):
                self._paused = True
            else:
                self._roster.obey(command)

    def _checkpoint_due(self) -> bool:
        every = self._settings.checkpoint_every_ticks
        by_count = every is not None and self._tick % every == 0 and self._tick != self._checkpointed_tick
        return by_count or self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_s

    def _write_checkpoint(self) -> None:
        started = self._clock()
        state: dict[str, Any] = {
            "backbone_fingerprint": self._backbone.fingerprint,
            "backbone_dtype": self._settings.backbone_dtype,
            "backend": self._backend.name,
            "tokens_per_tick": self._passes.tokens_per_tick,
            "evaluation_tokens": self._passes.evaluation_tokens,
            "roster": self._roster.state(),
            "tasks": [task.state() for task in self._roster.tasks],
        }
        runs = [run for task in self._roster.tasks for run in task.runs.values() if self._ownership.owns(run)]
        groups = [group for run in runs for group in self._roster.tensor_groups(run)]
        files = self._ranks.united(self._store.write_groups(groups))
        if self._ranks.rank == 0:
            self._before_checkpoint()
            path, size = self._store.write_manifest(self._tick, state, files)
            seconds = self._clock() - started
            self._meter.checkpointed(seconds)
            for task in self._roster.tasks:
                self._emit(CheckpointWritten(task.task_id, self._tick, str(path), size, seconds))
        # What ranks write from here on may not be taken for an old file and removed.
        self._ranks.united({})
        self._checkpointed_at, self._checkpointed_tick = self._clock(), self._tick

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["backbone_fingerprint"] != self._backbone.fingerprint:
            raise WrongBaseModelError(
                f"the checkpoint in {self._workdir} is of another backbone than {self._backbone.name_or_path}",
                "give the base model it was trained over, or another work folder",
            )
        if state["backbone_dtype"] != self._settings.backbone_dtype:
            raise WrongBaseModelError(
                f"the checkpoint in {self._workdir} is of the backbone in {state['backbone_dtype']}, not in "
                f"{self._settings.backbone_dtype}",
                f"load it in {state['backbone_dtype']}, or give another work folder",
            )
        if len(state["tasks"]) != len(self._roster.tasks):
            raise JobChangedError(
                f"the checkpoint in {self._workdir} holds {len(state['tasks'])} tasks, not {len(self._roster.tasks)}",
                "give the same jobs in the same order, or another work folder",
            )
        self._tick = checkpoint.tick
        # Never more than before: that may have run out of memory. Less, if less is asked for now.
        fitting = self._passes
        fitting.tokens_per_tick = min(fitting.tokens_per_tick, state["tokens_per_tick"])
        fitting.evaluation_tokens = min(fitting.evaluation_tokens, state["evaluation_tokens"])
        for number, (task, saved) in enumerate(zip(self._roster.tasks, state["tasks"], strict=True)):
            task.load_state(saved, checkpoint.groups, f"task{number}")
        self._roster.load_state(state["roster"])

    def _tell_progress(self, interval_s: float) -> None:
        if self._meter.due(interval_s):
            for task in self._roster.tasks:
                active = sum(self._roster.task_of(run) is task for run in self._roster)
                self._emit(self._meter.measure(task, self._tick, active, self._backbone.device))

    def _outcome(self, task: TaskRun) -> Outcome:
        if self._paused and not task.done:
            state = TaskState.PAUSED
        elif self._roster.cancelled:
            state = TaskState.CANCELLED
        elif task.best_trial_id is None:
            state = TaskState.FAILED
        else:
            state = TaskState.SUCCEEDED
        return Outcome(task.task_id, state, tuple(task.finished.values()), task.best_trial_id)
