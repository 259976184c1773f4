"""The loop: pack a tick, train it, step whose batch is complete, evaluate, decide, fill freed slots, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch
from alto_common.tuning import TuningJob

from alto_training.early_exit import make_policy
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.budget import Budget, backbone_facts, choose_budget, memory_limit_bytes
from alto_training.executor.calibration import costs_of
from alto_training.executor.checkpoint import Checkpoint
from alto_training.executor.control import Command, Control, Join
from alto_training.executor.errors import CheckpointError, ExecutorError, OutOfMemoryError
from alto_training.executor.events import (
    CheckpointWritten,
    Event,
    Outcome,
    TaskLeft,
    TaskStarted,
    TickHalved,
    TrialProgress,
    TrialState,
    Verdict,
)
from alto_training.executor.fitting_passes import FittingPasses
from alto_training.executor.loading import OpenData, load_job_backbone, open_job_data
from alto_training.executor.passes import settle
from alto_training.executor.progress import ProgressMeter
from alto_training.executor.ranks import OneRank, Ownership, Ranks
from alto_training.executor.roster import Roster
from alto_training.executor.settings import Backend, ExecutorSettings
from alto_training.executor.task_run import TaskRun
from alto_training.executor.trial_run import TrialRun

log = structlog.get_logger("alto.executor")


class Executor:
    """Trains every trial of a job (and of `companions`, jobs over the same backbone) together, and returns how it went.

    `workdir` receives adapters/ (PEFT format, best validation loss) and checkpoints/; running again over the same
    folder carries on from the last good checkpoint. Each task has a folder of its own (companions below tasks/) and can
    be carried on with from there, alone or beside others. More tasks may `Join` through `control`; each leaves when it
    has ended. `events` is called on the executor's thread, in order. `backbone` saves loading one that is at hand;
    `open_data` replaces how datasets are opened. `ranks` says that other processes run the same over the same folder,
    and shares the trials out among all. `before_checkpoint` returns when whatever `events` was told is safe: a run that
    carries on from the checkpoint does not tell it again.
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
        self._ownership = Ownership(self._ranks)
        self._tick = 0
        self._outcomes: dict[str, Outcome] = {}

    def run(self) -> Outcome:
        """Train until every trial has ended, or until paused or cancelled; return the first job's outcome.

        Raises an `ExecutorError` when nothing can be trained: each names what is wrong and the cure.
        """
        return self.run_all()[0]

    def run_all(self) -> list[Outcome]:
        """Like `run`, with an outcome for each job; `run` is over when no task is left, of those that joined either."""
        self._prepare()
        while True:
            commands, checkpoint_due = self._ranks.first(self._commands(), self._checkpoint_due())
            if checkpoint_due:
                self._write_checkpoints(self._roster.tasks)
            self._obey(commands)
            for task in [task for task in self._roster.tasks if task.paused or task.done]:
                self._let_go(task)
            self._roster.fill_slots()
            if not any(True for _ in self._roster):
                break
            self._train_one_tick()
            if self._meter.due(self._settings.progress_interval_s):
                for task in self._roster.tasks:
                    self._tell_progress(task)
        for task in list(self._roster.tasks):
            self._let_go(task)
        return [self._outcomes[job.task_id] for job in self._jobs]

    # Setting up

    def _prepare(self) -> None:
        self._meter = ProgressMeter(self._clock)
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        backbone = self._given_backbone or load_job_backbone(self._jobs[0].base_model, self._settings)
        if self._settings.recompute:
            backbone.recompute_activations()
        self._backbone = backbone
        facts = backbone_facts(backbone)
        # Alone, for ranks would have to measure in step.
        self._costs = costs_of(self._settings, backbone, may_measure=self._ranks.size == 1)
        # What is free now: whoever joins later shares it with those who are here.
        self._memory_limit_bytes = memory_limit_bytes(self._settings, facts)
        budget = self._budget(self._jobs, self._settings.tokens_per_tick)
        evaluation_tokens = self._settings.evaluation_tokens_per_tick or budget.tokens_per_tick
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
        revivable = self._settings.revivable_trials
        self._roster = Roster(budget.slots, backbone.device, self._emit, revivable, self._ownership)
        opened = [
            self._open(job, job_folder(self._workdir, self._jobs, number)) for number, job in enumerate(self._jobs)
        ]
        found = [checkpoint.state for _, checkpoint in opened if checkpoint is not None]
        # Never more than before: that may have run out of memory. Less, if less is asked for now.
        fitting = self._passes
        fitting.tokens_per_tick = min([fitting.tokens_per_tick, *(state["tokens_per_tick"] for state in found)])
        fitting.evaluation_tokens = min([fitting.evaluation_tokens, *(state["evaluation_tokens"] for state in found)])
        trials = sum(len(job.trials) for job in self._jobs)
        self._roster.slots.grow(min(trials, max((state["roster"]["slots"] for state in found), default=0)))
        # A resumed run goes on with the back end it had: another rounds otherwise.
        before = found[0]["backend"] if found and self._settings.backend is Backend.AUTO else None
        self._use_backend(before or self._settings.backend)
        for task, _ in opened:
            self._measure_base(task)
        self._begin(opened)
        self._tick = max(task.ticks for task, _ in opened)
        self._checkpointed_at, self._checkpointed_tick = self._clock(), self._tick

    def _budget(self, jobs: Sequence[TuningJob], tokens_per_tick: int | None) -> Budget:
        """Return the budget of these jobs for all ranks: tokens that fit on each, and the slots of all together.

        What it leaves for guests is noted, and told with every progress.
        """
        limit = self._memory_limit_bytes
        settings = replace(self._settings, tokens_per_tick=tokens_per_tick, memory_limit_bytes=limit)
        configs = [trial.config for job in jobs for trial in job.trials]
        mine = choose_budget(settings, backbone_facts(self._backbone), self._costs, configs)
        self._spare_bytes = mine.spare_bytes if self._ranks.size == 1 and self._settings.slots is None else 0
        each = self._ranks.united({str(self._ranks.rank): (mine.tokens_per_tick, mine.slots)}).values()
        slots = self._settings.slots or sum(slots for _, slots in each)
        return Budget(min(tokens for tokens, _ in each), min(slots, len(configs)))

    def _use_backend(self, name: str) -> None:
        """Have one multiply the low-rank part that has a seat for the holder of each slot."""
        backbone, seats = self._backbone, len(self._roster.slots.places)
        self._backend = choose_backend(name, backbone.layers, seats, backbone.device, backbone.dtype)
        backbone.use_backend(self._backend)

    def _open(self, job: TuningJob, folder: Path) -> tuple[TaskRun, Checkpoint | None]:
        """Open a task's data and read its checkpoint, if it has one; nobody trains it yet."""
        policy = make_policy(job.early_exit, [trial.trial_id for trial in job.trials])
        train, validation = self._open_data(job, self._settings.cache_dir or folder / "cache")
        tokens = self._passes.evaluation_tokens
        task = TaskRun(job, train, validation, self._backbone, policy, folder, self._emit, tokens, self._ownership)
        self._meter.take_in(job.task_id)
        checkpoint = task.store.read()
        if checkpoint is not None:
            checkpoint.require_backbone(self._backbone.fingerprint, self._settings.backbone_dtype, str(folder))
            task.ticks = checkpoint.tick
            task.load_state(checkpoint.state["task"], checkpoint.groups)
        return task, checkpoint

    def _measure_base(self, task: TaskRun) -> None:
        if task.base_validation_loss is None:
            task.note_base_losses(self._passes.losses([task.evaluation_share(None)])[0])

    def _begin(self, opened: Sequence[tuple[TaskRun, Checkpoint | None]]) -> None:
        """Let the trials of opened tasks wait for slots, or be where their checkpoint says."""
        self._roster.take_up([(task, found.state["roster"]) for task, found in opened if found is not None])
        for task, checkpoint in opened:
            if checkpoint is None:
                self._roster.admit(task)
            self._meter.begin(task)
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
                    resumed_from_tick=None if checkpoint is None else checkpoint.tick,
                )
            )
            self._roster.tell_places(task)

    def _tell_halved(self, before: int, after: int) -> None:
        for task in self._roster.tasks:
            self._emit(TickHalved(task.task_id, before, after))

    # One tick

    def _train_one_tick(self) -> None:
        """Train a tick's worth of every active trial, then do all that follows from it."""
        started = self._clock()
        try:
            trained = self._passes.train(list(self._roster), turn=self._tick)
        except OutOfMemoryError as error:
            self._send_away_all_but_the_first(error)
            return
        self._tick += 1
        for task in self._roster.tasks:
            task.ticks += 1
        complete = [run for run, part in trained.items() if run.count(part.items, part.loss)]
        stepped = [run for run in complete if self._finish_batch(run, trained[run].gradient_norm)]
        tokens = sum(part.tokens for part in trained.values())
        self._meter.trained(tokens, sum(run.config.lora_rank for run in trained), self._clock() - started)
        self._evaluate([run for run in stepped if run.evaluation_due])
        for run in stepped:
            if self._roster.has(run) and run.finished and run.trial_id not in self._roster.task_of(run).finished:
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
                samples_trained=run.samples_trained,
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
        try:
            losses = self._passes.validation_losses(
                due, lambda run: self._roster.task_of(run).evaluation_share(run.adapter)
            )
        except OutOfMemoryError as error:
            self._send_away_all_but_the_first(error)
            self._evaluate([run for run in due if self._roster.has(run)])
            return
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
            if isinstance(command, Join):
                self._take_in(command)
            else:
                self._roster.obey(command)

    def _take_in(self, join: Join) -> None:
        """Take in a task between two ticks. Whatever is wrong with it is told of it, and costs nobody else anything."""
        task_id = join.job.task_id
        try:
            if self._ranks.size > 1:
                raise ExecutorError("a task can only join a single worker rank", "let it train alone")
            opened = self._open(join.job, join.workdir)
            self._measure_base(opened[0])
        except (OutOfMemoryError, CheckpointError) as error:
            self._emit(TaskLeft(task_id, None, str(error)))
        except ExecutorError as error:
            self._emit(TaskLeft(task_id, None, str(error), is_own_trouble=self._ranks.size == 1))
        except Exception as error:
            log.exception("a task could not be taken in", task_id=task_id)
            self._emit(TaskLeft(task_id, None, f"it could not be taken in ({type(error).__name__})"))
        else:
            jobs = [join.job, *(task.job for task in self._roster.tasks)]
            self._roster.slots.grow(self._budget(jobs, self._passes.tokens_per_tick).slots)
            self._use_backend(self._backend.name)
            self._begin([opened])

    def _send_away_all_but_the_first(self, error: OutOfMemoryError) -> None:
        """Have the first task go on alone where memory does not do for all: the others may go on elsewhere.

        They carry on from their last checkpoints: this tick is not over for them. Raises `error` when it is alone.
        """
        if len(self._roster.tasks) == 1 or self._ranks.size > 1:
            raise error
        for task in self._roster.tasks[1:]:
            task.paused = True
            self._let_go(task, str(error))

    def _let_go(self, task: TaskRun, trouble: str = "") -> None:
        """Let go of a task that has ended or is to leave, and tell what has become of it here."""
        if not trouble:
            self._write_checkpoints([task])
        self._tell_progress(task)
        self._roster.let_go(task)
        if self._roster.tasks:
            self._budget([one.job for one in self._roster.tasks], self._passes.tokens_per_tick)
        outcome = self._outcomes[task.task_id] = task.outcome
        self._emit(TaskLeft(task.task_id, outcome, trouble))

    def _checkpoint_due(self) -> bool:
        every = self._settings.checkpoint_every_ticks
        by_count = every is not None and self._tick % every == 0 and self._tick != self._checkpointed_tick
        return by_count or self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_s

    def _write_checkpoints(self, tasks: Sequence[TaskRun]) -> None:
        """Write a checkpoint of each of these tasks, into its own folder."""
        for task in tasks:
            self._write_checkpoint(task)
        # What ranks write from here on may not be taken for an old file and removed.
        self._ranks.united({})
        if len(tasks) == len(self._roster.tasks):
            self._checkpointed_at, self._checkpointed_tick = self._clock(), self._tick

    def _write_checkpoint(self, task: TaskRun) -> None:
        settle(self._backbone)
        started = self._clock()
        state: dict[str, Any] = {
            "backbone_fingerprint": self._backbone.fingerprint,
            "backbone_dtype": self._settings.backbone_dtype,
            "backend": self._backend.name,
            "tokens_per_tick": self._passes.tokens_per_tick,
            "evaluation_tokens": self._passes.evaluation_tokens,
            "roster": self._roster.state(task),
            "task": task.state(),
        }
        runs = [run for run in task.runs.values() if self._ownership.owns(run)]
        groups = [group for run in runs for group in task.tensor_groups(run)]
        files = self._ranks.united(task.store.write_groups(groups))
        if self._ranks.rank == 0:
            self._before_checkpoint()
            path, size = task.store.write_manifest(task.ticks, state, files)
            seconds = self._clock() - started
            self._meter.checkpointed(seconds)
            self._emit(CheckpointWritten(task.task_id, task.ticks, str(path), size, seconds))

    def _tell_progress(self, task: TaskRun) -> None:
        active = sum(self._roster.task_of(run) is task for run in self._roster)
        self._emit(self._meter.measure(task, task.ticks, active, self._backbone, self._spare_bytes))


def job_folder(workdir: Path, jobs: Sequence[TuningJob], number: int) -> Path:
    """Return the folder of the job with this number, of those that an executor is given: the first has all of it."""
    return workdir / "tasks" / jobs[number].task_id if number else workdir
