"""One tuning task within an executor: its data, its trials, its stopping policy, and what has become of each trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import Trial, TuningJob

from alto_training.early_exit import Observation, StoppingPolicy
from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone
from alto_training.executor.checkpoint import CheckpointStore, TensorGroup, checkpoints_folder
from alto_training.executor.data_source import DataSource
from alto_training.executor.errors import DatasetChangedError, EmptyDatasetError, JobChangedError
from alto_training.executor.events import Event, Outcome, TaskState, TrialEvaluated, TrialFinished, TrialState
from alto_training.executor.objectives import make_objective
from alto_training.executor.peft_format import read_adapter, write_adapter
from alto_training.executor.ranks import Ownership
from alto_training.executor.tick import Item, Share
from alto_training.executor.trial_run import TrialRun

_SAMPLED_ROWS = 64  # whose mean length stands for all


class TaskRun:
    """The state of one task. It never runs the backbone but for references and evaluation, and knows nothing of slots.

    `folder` receives adapters/ and checkpoints/, both the task's alone: others in the executor leave no trace in them.
    `ticks` are those of the executor while it had the task, earlier attempts included.
    `runs` holds the trials that train or may be revived, `finished` how trials ended, `parked` those that the policy
    paused, `unjudged` those that their user revived: no policy decides about them any more, `cancelled` those that
    ended with their task's cancellation.
    """

    def __init__(
        self,
        job: TuningJob,
        train: DataSource,
        validation: DataSource,
        backbone: Backbone,
        policy: StoppingPolicy,
        folder: Path,
        emit: Callable[[Event], None],
        reference_tokens_per_tick: int,
        ownership: Ownership,
    ) -> None:
        for data, path in ((train, job.train_path), (validation, job.validation_path)):
            if len(data) == 0:
                raise EmptyDatasetError(f"{path} has no rows", "give at least one row to train and one to validate on")
        self.job = job
        self.train = train
        self.validation = validation
        self.policy = policy
        self.runs: dict[str, TrialRun] = {}
        self.finished: dict[str, TrialFinished] = {}
        self.parked: set[str] = set()
        self.unjudged: set[str] = set()
        self.ticks = 0
        self.cancelled: set[str] = set()
        self.paused = False
        self.store = CheckpointStore(checkpoints_folder(folder))
        self.base_validation_loss: float | None = None
        self._backbone = backbone
        self._folder = folder
        self._emit = emit
        self._ownership = ownership
        self._objective = make_objective(job.objective)
        self._references: dict[tuple[str, int, int], tuple[float, ...]] = {}
        self._reference_tokens_per_tick = reference_tokens_per_tick
        self._validation_items: list[Item] = []
        self._mean_tokens: dict[int, float] = {}
        # One length for all trials: their validation losses are compared.
        self.validation_length = max(trial.config.max_length for trial in job.trials)

    @property
    def task_id(self) -> str:
        """The task's name."""
        return self.job.task_id

    @property
    def done(self) -> bool:
        """Whether every trial has ended."""
        return len(self.finished) == len(self.job.trials)

    @property
    def outcome(self) -> Outcome:
        """What has become of it so far."""
        if self.paused and not self.done:
            state = TaskState.PAUSED
        elif self.cancelled:
            state = TaskState.CANCELLED
        elif self.best_trial_id is None:
            state = TaskState.FAILED
        else:
            state = TaskState.SUCCEEDED
        return Outcome(self.task_id, state, tuple(self.finished.values()), self.best_trial_id)

    @property
    def rotates(self) -> bool:
        """Whether trials are compared, so that all of them are to warm up before any goes on."""
        return self.job.early_exit.policy != "none"

    def is_warm(self, run: TrialRun) -> bool:
        """Whether a trial has been measured at the end of its warm-up, or past it."""
        boundary = self.job.early_exit.warmup_fraction * run.total_steps
        return run.last_evaluated_step >= boundary - 1e-9

    def prepare(self, trial: Trial) -> TrialRun:
        """Make a trial ready to wait for a slot. Raises an `ExecutorError` when it cannot be trained.

        Until it has one it is its seed alone, but for an adapter that it starts from.
        """
        self._backbone.check_length(trial.config)
        adapter = Adapter(self._backbone.adapted_modules(trial.config), trial.config.lora_rank, trial.config.scaling)
        if trial.initial_adapter_path is not None:
            read_adapter(Path(trial.initial_adapter_path), adapter, trial.config, self._backbone)
        run = TrialRun(
            trial,
            self.train,
            self._objective,
            adapter,
            self.job.evaluation,
            self.job.early_exit.smoothing,
            self._train_references,
        )
        self.runs[trial.trial_id] = run
        return run

    def remaining_tokens(self, run: TrialRun) -> float:
        """Return about how many tokens a trial has left to train: its items left by the mean of some rows."""
        length = run.config.max_length
        if length not in self._mean_tokens:
            rows = range(0, len(self.train), math.ceil(len(self.train) / _SAMPLED_ROWS))
            tokens = [self._objective.item(self.train, row, length, row).tokens for row in rows]
            self._mean_tokens[length] = sum(tokens) / len(tokens)
        return (run.total_items - run.samples_trained) * self._mean_tokens[length]

    def evaluation_share(self, adapter: Adapter | None) -> Share:
        """Return the whole validation set as a share for one trial's adapter, or for the base model alone."""
        return Share(adapter, self._validation(), self._objective.item_loss)

    def note_base_losses(self, losses: Sequence[float]) -> None:
        """Take note of the validation items' losses over the base model without any adapter."""
        self.base_validation_loss = self._mean_validation_loss(losses)

    def note_evaluation(self, run: TrialRun, losses: Sequence[float]) -> Observation:
        """Take note of the validation items' losses; tell of it, and return what the policy is to see."""
        run.last_evaluated_step = run.step
        items = self._validation()
        loss = self._mean_validation_loss(losses)
        best = math.isfinite(loss) and run.note_validation(loss)
        self._emit(
            TrialEvaluated(
                self.task_id,
                run.trial_id,
                run.step,
                run.total_steps,
                run.samples_trained,
                loss,
                run.train_loss_smoothed,
                best=best,
            )
        )
        per_example = tuple(each / max(1, item.denominator) for each, item in zip(losses, items, strict=True))
        return Observation(
            run.step,
            run.total_steps,
            run.train_loss_smoothed,
            loss,
            finite=math.isfinite(loss),
            validation_losses=per_example,
        )

    def finish(self, run: TrialRun, state: TrialState, reason: str) -> None:
        """End a trial: write its best adapter, and tell of it."""
        written = None
        if run.best_step is not None:
            provenance = {
                "task_id": self.task_id,
                "trial_id": run.trial_id,
                "step": run.best_step,
                "validation_loss": run.best_validation_loss,
                "validation_length": self.validation_length,
                "train_fingerprint": self.train.fingerprint,
                "validation_fingerprint": self.validation.fingerprint,
            }
            written = self._ownership.of_owner(run, lambda: self._write_adapter(run, provenance))
        self._close(
            TrialFinished(
                self.task_id,
                run.trial_id,
                state,
                reason,
                run.step,
                run.total_steps,
                run.best_step,
                run.best_validation_loss,
                None if written is None else written[0],
                None if written is None else written[1],
                run.samples_trained,
                run.total_items - run.samples_trained,
            )
        )

    def _write_adapter(self, run: TrialRun, provenance: dict[str, Any]) -> tuple[str, str]:
        """Write the best weights; return the folder and their sha256."""
        assert run.best_param is not None
        folder = self._folder / "adapters" / run.trial_id
        name = self.job.base_model_name or self.job.base_model
        written = write_adapter(folder, run.adapter, run.best_param, run.config, self._backbone, name, provenance)
        return str(written.path), written.sha256

    def refuse(self, trial: Trial, reason: str) -> None:
        """End a trial that could not be prepared."""
        total = trial.config.total_steps(len(self.train))
        self._close(
            TrialFinished(
                self.task_id, trial.trial_id, TrialState.FAILED, reason, 0, total, None, None, None, None, 0, 0
            )
        )

    def forget_oldest(self, keep: int) -> None:
        """Let go of the state of ended trials but for the last `keep` that were stopped and may be revived."""
        ended = [trial_id for trial_id in self.finished if trial_id in self.runs]
        revivable = [trial_id for trial_id in ended if self.finished[trial_id].state is TrialState.STOPPED]
        for trial_id in set(ended) - set(revivable[-keep:] if keep else []):
            del self.runs[trial_id]

    @property
    def best_trial_id(self) -> str | None:
        """The ended trial with the lowest validation loss."""
        judged = [one for one in self.finished.values() if one.best_validation_loss is not None]
        return min(judged, key=lambda one: one.best_validation_loss or 0.0).trial_id if judged else None

    def state(self) -> dict[str, Any]:
        """Return the task's part of a checkpoint, as JSON."""
        return {
            "job_fingerprint": job_fingerprint(self.job),
            "train_fingerprint": self.train.fingerprint,
            "validation_fingerprint": self.validation.fingerprint,
            "base_validation_loss": self.base_validation_loss,
            "runs": {trial_id: run.state() for trial_id, run in self.runs.items()},
            "finished": [dataclasses.asdict(one) for one in self.finished.values()],
            "parked": sorted(self.parked),
            "unjudged": sorted(self.unjudged),
            "policy": self.policy.state_dict(),
            "references": [[*key, list(sums)] for key, sums in self._references.items()],
        }

    def tensor_groups(self, run: TrialRun) -> list[TensorGroup]:
        """Return a trial's tensors, grouped by what changes together: its buffers, then its best weights, if any.

        There are none of a trial that is its seed alone.
        """
        if run.adapter.is_empty:
            return []
        name = f"trial{self._number(run.trial_id)}"
        groups = [TensorGroup(f"{name}-state", run.version, run.adapter.buffers)]
        if run.best_param is not None and run.best_step is not None:
            groups.append(TensorGroup(f"{name}-best", run.best_step, {"param": run.best_param}))
        return groups

    def load_state(self, state: dict[str, Any], groups: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take up a checkpoint. Raises when it is of another job or another dataset."""
        if state["job_fingerprint"] != job_fingerprint(self.job):
            raise JobChangedError(
                f"the checkpoint is of another task or other trials than {self.task_id}",
                "give the job it was written for, or another work folder",
            )
        for which, name, data in (
            ("training", "train_fingerprint", self.train),
            ("validation", "validation_fingerprint", self.validation),
        ):
            if state[name] != data.fingerprint:
                raise DatasetChangedError(
                    f"the {which} rows of {self.task_id} have changed since the checkpoint was written",
                    "restore the dataset, or start over in another work folder",
                )
        self.base_validation_loss = state["base_validation_loss"]
        trials = {trial.trial_id: trial for trial in self.job.trials}
        for trial_id, saved in state["runs"].items():
            run = self.prepare(trials[trial_id])
            name = f"trial{self._number(trial_id)}"
            buffers = groups[f"{name}-state"] if saved["samples_trained"] else groups.get(f"{name}-state")
            run.load_state(saved, buffers, groups.get(f"{name}-best", {}).get("param"))
        for saved in state["finished"]:
            self.finished[saved["trial_id"]] = TrialFinished(**{**saved, "state": TrialState(saved["state"])})
        self.parked = set(state["parked"])
        self.unjudged = set(state["unjudged"])
        self.policy.load_state_dict(state["policy"])
        self._references = {(which, row, length): tuple(sums) for which, row, length, sums in state["references"]}

    def _mean_validation_loss(self, losses: Sequence[float]) -> float:
        return math.fsum(losses) / max(1, sum(item.denominator for item in self._validation()))

    def _number(self, trial_id: str) -> int:
        return next(number for number, trial in enumerate(self.job.trials) if trial.trial_id == trial_id)

    def _close(self, finished: TrialFinished) -> None:
        # Taken out first: a revived trial that ends again counts as the newest.
        self.finished.pop(finished.trial_id, None)
        self.finished[finished.trial_id] = finished
        self.parked.discard(finished.trial_id)
        self._emit(finished)

    def _validation(self) -> list[Item]:
        if not self._validation_items:
            limit = self.job.evaluation.max_examples
            rows = range(len(self.validation) if limit is None else min(limit, len(self.validation)))
            items = [self._objective.item(self.validation, row, self.validation_length, row) for row in rows]
            self._validation_items = self._with_references("validation", rows, items, self.validation_length)
        return self._validation_items

    def _train_references(self, rows: Sequence[int], items: Sequence[Item], length: int) -> list[Item]:
        return self._with_references("train", rows, items, length)

    def _with_references(self, which: str, rows: Sequence[int], items: Sequence[Item], length: int) -> list[Item]:
        """Give each item the frozen backbone's own sums, if the objective asks for them; each row is run once."""
        if not self._objective.needs_reference:
            return list(items)
        missing = {
            row: item for row, item in zip(rows, items, strict=True) if (which, row, length) not in self._references
        }
        sums = passes.reference_sums(self._backbone, list(missing.values()), self._reference_tokens_per_tick)
        self._references |= {(which, row, length): each for row, each in zip(missing, sums, strict=True)}
        return [
            dataclasses.replace(item, reference_nll=self._references[which, row, length])
            for row, item in zip(rows, items, strict=True)
        ]


def job_fingerprint(job: TuningJob) -> str:
    """Return a sha256 of what a job asks for.

    Neither where its files lie counts (their content has its own) nor what the base model is called.
    """
    described = dataclasses.asdict(dataclasses.replace(job, base_model="", train_path="", validation_path=""))
    del described["base_model_name"]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
