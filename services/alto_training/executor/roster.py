"""Where each trial of all tasks is: in a slot, waiting, parked or ended; and how verdicts and commands move it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from alto_training.early_exit import Decision
from alto_training.executor.checkpoint import CheckpointStore, TensorGroup
from alto_training.executor.control import Cancel, Command, Pause, ReviveTrial, StopTrial
from alto_training.executor.errors import ExecutorError
from alto_training.executor.events import Event, TrialDecided, TrialPaused, TrialStarted, TrialState, Verdict
from alto_training.executor.ranks import Ownership
from alto_training.executor.slots import Slots
from alto_training.executor.task_run import TaskRun
from alto_training.executor.trial_run import TrialRun


class Roster:
    """Moves trials between slots, queue and car park, and tells of it.

    Adapters outside of slots lie on the host, those of trials that never had one nowhere.
    `revivable_trials` is how many stopped trials of a task keep their state.
    """

    def __init__(
        self,
        slots: int,
        device: torch.device,
        emit: Callable[[Event], None],
        revivable_trials: int,
        ownership: Ownership,
    ) -> None:
        self.tasks: list[TaskRun] = []
        self.slots: Slots[TrialRun] = Slots(slots)
        self._device = device
        self._emit = emit
        self._revivable_trials = revivable_trials
        self._ownership = ownership
        # Weak: an ended trial that nobody may revive is let go of with its adapter.
        self._task_of: WeakKeyDictionary[TrialRun, TaskRun] = WeakKeyDictionary()
        self._balanced: list[TrialRun] = []

    def __iter__(self) -> Iterator[TrialRun]:
        """Iterate over the trials in slots, in slot order."""
        return iter(self.slots)

    def task_of(self, run: TrialRun) -> TaskRun:
        """Return the task that a trial belongs to."""
        return self._task_of[run]

    def has(self, run: TrialRun) -> bool:
        """Whether a trial's task is still here."""
        return run in self._task_of

    def admit(self, task: TaskRun) -> None:
        """Make every trial of a task ready and let it wait for a slot; one that cannot be trained fails alone."""
        self.tasks.append(task)
        for trial in task.job.trials:
            try:
                run = task.prepare(trial)
            except ExecutorError as error:
                task.refuse(trial, str(error))
                self.apply(task, task.policy.trial_ended(trial.trial_id))
            else:
                self._task_of[run] = task
                self._give_owner(run)
                self.slots.enqueue(run)

    def let_go(self, task: TaskRun) -> None:
        """Let go of a task and all its trials; their slots are free."""
        self.tasks.remove(task)
        for run in [run for run, owner in self._task_of.items() if owner is task]:
            self.slots.leave(run)
            del self._task_of[run]

    def apply(self, task: TaskRun, decisions: Sequence[Decision]) -> None:
        """Act on a policy's decisions."""
        for decision in decisions:
            run = task.runs.get(decision.trial_id)
            if run is None or decision.trial_id in task.finished or decision.trial_id in task.unjudged:
                continue
            verdict = Verdict(decision.verdict.value)
            self.decided(
                task, run, verdict, decision.rule, decision.reason, dict(decision.evidence), decision.threshold
            )
            if verdict is Verdict.STOP:
                self.end(run, TrialState.STOPPED, decision.reason)
            elif verdict is Verdict.PAUSE:
                self._give_up_slot(run)
                task.parked.add(run.trial_id)
            elif run.trial_id in task.parked:
                task.parked.discard(run.trial_id)
                self.slots.enqueue(run)

    def rotate(self, run: TrialRun) -> None:
        """Let a trial whose warm-up is over give its slot to one that waits for its own warm-up, and queue up again.

        Nobody goes on beyond warm-up before all have come as far, whatever the policy and however few the slots are.
        """
        task = self._task_of[run]
        if run.finished or run not in list(self.slots) or not task.rotates or not task.is_warm(run):
            return
        if all(self._task_of[other] is not task or task.is_warm(other) for other in self.slots.waiting):
            return
        reason = f"Paused after warm-up, at step {run.step}: others of its task wait for a slot to warm up in."
        self.decided(task, run, Verdict.PAUSE, "rotation", reason)
        self._give_up_slot(run)
        self.slots.enqueue(run)

    def decided(
        self,
        task: TaskRun,
        run: TrialRun,
        verdict: Verdict,
        rule: str,
        reason: str,
        evidence: dict[str, float] | None = None,
        threshold: float | None = None,
    ) -> None:
        """Tell of a verdict."""
        self._emit(TrialDecided(task.task_id, run.trial_id, run.step, verdict, rule, reason, evidence or {}, threshold))

    def end(self, run: TrialRun, state: TrialState, reason: str) -> None:
        """End a trial: its slot is free, its best adapter is written, and the policy may release others."""
        task = self._task_of[run]
        self._close(task, run, state, reason)
        self.apply(task, task.policy.trial_ended(run.trial_id))
        task.forget_oldest(self._revivable_trials)

    def _close(self, task: TaskRun, run: TrialRun, state: TrialState, reason: str) -> None:
        self.slots.leave(run)
        run.adapter.move(torch.device("cpu"))
        task.finish(run, state, reason)

    def _give_up_slot(self, run: TrialRun) -> None:
        self.slots.leave(run)
        run.adapter.move(torch.device("cpu"))
        self._tell_paused(run)

    def fill_slots(self) -> None:
        """Give free slots to waiting trials."""
        self._release_parked()
        for slot, run in self.slots.fill():
            self._tell_started(slot, run)
        active = list(self.slots)
        if active != self._balanced:
            loads = [self._task_of[run].remaining_tokens(run) for run in active]
            self._ownership.balance(active, loads, self._files_of)
            self._balanced = active
        for run in active:
            if self._ownership.owns(run):
                run.take_slot(self._device)

    def _files_of(self, run: TrialRun) -> tuple[CheckpointStore, list[TensorGroup]]:
        task = self._task_of[run]
        return task.store, task.tensor_groups(run)

    def _give_owner(self, run: TrialRun) -> None:
        loads = {other: task.remaining_tokens(other) for other, task in self._task_of.items()}
        self._ownership.admit(run, loads.pop(run), loads)

    def _release_parked(self) -> None:
        """Carry on with parked trials that no one is left to release: a policy must not be able to hang its task."""
        moving = {self._task_of[run].task_id for run in (*self.slots, *self.slots.waiting)}
        for task in self.tasks:
            if task.task_id not in moving:
                for trial_id in sorted(task.parked):
                    self.slots.enqueue(task.runs[trial_id])
                task.parked.clear()

    def obey(self, command: Command) -> None:
        """Carry out a command about tasks that are here, or about their trials."""
        if isinstance(command, Cancel | Pause):
            for task in self.tasks:
                if command.task_id in (None, task.task_id):
                    if isinstance(command, Cancel):
                        self._cancel(task, command.reason)
                    else:
                        task.paused = True
        elif isinstance(command, StopTrial):
            for task, run in self._named(command.task_id, command.trial_id):
                if run.trial_id not in task.finished:
                    self.decided(task, run, Verdict.STOP, "user", command.reason)
                    self.end(run, TrialState.CANCELLED, command.reason)
        elif isinstance(command, ReviveTrial):
            for task, run in self._named(command.task_id, command.trial_id):
                self._revive(task, run)

    def _named(self, task_id: str | None, trial_id: str) -> list[tuple[TaskRun, TrialRun]]:
        return [
            (task, task.runs[trial_id])
            for task in self.tasks
            if trial_id in task.runs and task_id in (None, task.task_id)
        ]

    def _cancel(self, task: TaskRun, reason: str) -> None:
        task.cancelled = task.runs.keys() - task.finished.keys()
        for trial_id in sorted(task.cancelled):  # no policy is asked: it would judge who is left
            self._close(task, task.runs[trial_id], TrialState.CANCELLED, reason)
        task.forget_oldest(self._revivable_trials)

    def _revive(self, task: TaskRun, run: TrialRun) -> None:
        ended = task.finished.get(run.trial_id)
        if run.trial_id not in task.parked and (ended is None or ended.state is not TrialState.STOPPED):
            return
        task.finished.pop(run.trial_id, None)
        task.parked.discard(run.trial_id)
        task.unjudged.add(run.trial_id)
        # A trial that was not finite ended with a complete batch and no step: it tries that batch again.
        run.restart_batch()
        self.decided(task, run, Verdict.REVIVE, "user", "revived by its user; no policy judges it any more")
        self.slots.enqueue(run, first=True)

    def state(self, task: TaskRun) -> dict[str, Any]:
        """Return where a task's trials are, as JSON; its own state is apart."""
        return {
            "slots": len(self.slots.places),
            "in_slot": self._numbers_of(task, self.slots.places),
            "in_line": self._numbers_of(task, self.slots.waiting),
        }

    def take_up(self, states: Sequence[tuple[TaskRun, dict[str, Any]]]) -> None:
        """Put the trials of tasks that have taken up their own states where they were, as far as that is free.

        Those that had a slot come first in line for another, then those that waited, in the order of them all.
        """
        in_line: list[tuple[int, int, TrialRun]] = []
        for task, state in states:
            self.tasks.append(task)
            for run in task.runs.values():
                self._task_of[run] = task
                self._give_owner(run)
            for trial_id, slot in state["in_slot"].items():
                if slot < len(self.slots.places) and self.slots.places[slot] is None:
                    self.slots.places[slot] = task.runs[trial_id]
                else:
                    in_line.append((0, slot, task.runs[trial_id]))
            in_line.extend((1, place, task.runs[trial_id]) for trial_id, place in state["in_line"].items())
        for _, _, run in sorted(in_line, key=lambda one: one[:2]):
            self.slots.enqueue(run)

    def tell_places(self, task: TaskRun) -> None:
        """Tell which of a task's trials have a slot, and which have begun and have none, after `take_up`."""
        seated = {run: slot for slot, run in enumerate(self.slots.places) if run is not None}
        for run in task.runs.values():
            if run in seated:
                self._tell_started(seated[run], run)
            elif run.samples_trained and run.trial_id not in task.finished:
                self._tell_paused(run)

    def _tell_started(self, slot: int, run: TrialRun) -> None:
        task_id, size = self._task_of[run].task_id, run.adapter.size
        self._emit(TrialStarted(task_id, run.trial_id, slot, run.step, run.total_steps, run.samples_trained, size))

    def _tell_paused(self, run: TrialRun) -> None:
        task_id = self._task_of[run].task_id
        self._emit(TrialPaused(task_id, run.trial_id, run.step, run.total_steps, run.samples_trained))

    def _numbers_of(self, task: TaskRun, runs: Sequence[TrialRun | None]) -> dict[str, int]:
        numbered = [(number, run) for number, run in enumerate(runs) if run is not None]
        return {run.trial_id: number for number, run in numbered if self._task_of[run] is task}
