"""What the service asks of the duration model: how long a task will take, and how much of it is left.

It follows the runs that nodes report, learns from each window of them, and at a task's natural end learns what share of
its full work it did and how far the prediction at its beginning was off. What was learned is handed out as records, for
the store to keep over restarts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from alto_placement.durations import NOTHING_DONE, DurationModel, Hardware, HardwareModel, Measured, Work
from alto_placement.moves import TOLERANCE, Basis, Moves, hardware_basis
from alto_placement.planner import Duration
from alto_placement.state import AssignmentRow, Moment, Outcome, Progress, TaskRow, WorkSize

log = structlog.get_logger("alto.placement")

LONGEST_NAME = 512
# A record of what was learned: its name (JSON, at most LONGEST_NAME characters) and its content.
Records = Mapping[str, Any]

# Weights of a size that is not known: a task of unknown size is taken for a small one.
UNKNOWN_TOKENS = 100_000
# A run this short says little about speeds.
LEAST_RUN_TICKS = 20
# Of what was left when it was last heard of: a task that outlives its prediction is late, not over.
LEAST_LEFT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Outlook:
    """What was left of a task that has a place at `at_s` (Unix seconds), when last something was heard of it."""

    at_s: float
    left: Duration

    @property
    def least_s(self) -> float:
        """The least that is left of it at any time."""
        return LEAST_LEFT_SHARE * self.left.expected_s

    def left_at(self, now_s: float) -> Duration:
        """Return what is left at another time."""
        gone_s, left = now_s - self.at_s, self.left
        ends = (left.expected_s, left.upper_s, left.low_s, left.high_s)
        return Duration(*(max(self.least_s, s - gone_s) for s in ends))


@dataclass
class _Run:
    """An assignment that is heard of: what it had done when last heard, and the model as it was at its beginning.

    What a shared executor has done is not the task's alone.
    """

    model_then: HardwareModel
    heard: Measured = NOTHING_DONE
    start_s: float = float("inf")
    share_trained: float = 0.0
    is_shared: bool = False
    # The task, the progress and the slowdown that the last answer was about, and this.
    answered: tuple[tuple[TaskRow, Progress, float], Outlook] | None = None


class Forecasts:
    """Predicts for tasks, and learns from their runs; `model` is what was learned, `moves` what of it has moved."""

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self.model = DurationModel()
        self.moves = Moves(self.model, tolerance)
        self._runs: dict[str, _Run] = {}
        self._changed: set[Hardware | tuple[str, str]] = set()
        self._told: set[Hardware | tuple[str, str]] = set()

    def whole(self, task: TaskRow, gpu_kind: str) -> Duration:
        """Return how long a task takes from its beginning."""
        prior = task.size.expected_share
        return self.model.predict(_hardware(task, gpu_kind), _work(task.size), task.tenant, task.size.shape, prior)

    def rest(self, task: TaskRow, gpu_kind: str, can_resume: bool) -> Duration:
        """Return how long a waiting task will hold its GPUs: all of it, or what is left of it after its checkpoint."""
        if not can_resume or task.fraction_done <= 0.0:
            return self.whole(task, gpu_kind)
        hardware, size = _hardware(task, gpu_kind), task.size
        left = self.model.remaining(
            hardware,
            _work(size),
            _work(size, 1.0 - task.fraction_done),
            Measured(),
            task.fraction_done,
            task.tenant,
            size.shape,
            size.expected_share,
        )
        start_s = self.model.model(hardware).start_s
        return Duration(left.expected_s + start_s, left.upper_s + start_s, left.low_s + start_s, left.high_s + start_s)

    def throughput_share(self, task: TaskRow, gpu_kind: str) -> float:
        """Return the part of an executor's full speed that a task uses when alone."""
        return self.model.throughput_share(_hardware(task, gpu_kind), _work(task.size))

    def start_s(self, task: TaskRow, gpu_kind: str) -> float:
        """Return how long it takes until a task that has a place is trained."""
        return self.model.model(_hardware(task, gpu_kind)).start_s

    def outlook(
        self,
        task: TaskRow,
        row: AssignmentRow,
        gpu_kind: str,
        progress: Progress | None,
        now: Moment,
        slowdown: float = 1.0,
        anew: bool = True,
    ) -> Outlook:
        """Return what was left of a task that has a place, as of its start or of what its node last said.

        With others in its executor it takes `slowdown` times longer than alone. Unless `anew`, the last answer about
        the same progress is good enough, whatever was learned since.
        """
        if progress is None or progress.measured.ticks <= 0:
            whole = _times(self.rest(task, gpu_kind, can_resume=row.node_id == task.ran_on), slowdown)
            return Outlook(min(row.started_s, now.wall_s), whole)
        run = self._runs.get(row.assignment_id)
        about = task, progress, slowdown
        if not anew and run is not None and run.answered is not None and run.answered[0] == about:
            return run.answered[1]
        size = task.size
        steps_left = progress.longest_steps_left / max(1, size.longest_steps)
        left = self.model.remaining(
            _hardware(task, gpu_kind),
            _work(size),
            _work(size, max(0.0, 1.0 - progress.fraction_done), steps_left),
            NOTHING_DONE if self.is_shared(row) else progress.measured,
            progress.share_trained,
            task.tenant,
            size.shape,
            size.expected_share,
        )
        heard_s = max(0.0, now.monotonic_s - progress.heard_s)
        found = Outlook(now.wall_s - heard_s, _times(left, slowdown))
        if run is not None:
            run.answered = about, found
        return found

    def is_shared(self, row: AssignmentRow) -> bool:
        """Return whether an assignment is known to have shared its executor."""
        run = self._runs.get(row.assignment_id)
        return run is not None and run.is_shared

    def bases(self, task: TaskRow, gpu_kinds: Sequence[str], is_begun: bool) -> tuple[Basis, ...]:
        """Return what predictions for a task on these kinds of GPU rest on; when it has begun, those of its rest."""
        tenant, shape = task.tenant, task.size.shape
        found: list[Basis] = [("hardware", task.base_model, kind, task.gpus) for kind in gpu_kinds]
        found.append(("shares", tenant, shape))
        if not self.model.shares.knows(tenant, shape):
            found.append(("shares", None, shape))
        if is_begun:
            found.append(("trained", tenant, shape))
            if not self.model.trained.knows(tenant, shape):
                found.append(("trained", None, shape))
        return tuple(found)

    def basis(self, base_model: str, gpu_kind: str, gpus: int) -> str:
        """Return in words what an estimate rests on."""
        hardware = Hardware(base_model, gpu_kind, gpus)
        place = f"{gpus} x {gpu_kind or 'a place here'}"
        if not self.model.is_measured(hardware):
            return f"the number of weights and the kind of device: {base_model} was never measured on {place}"
        model = self.model.model(hardware)
        tokens_per_s = model.fullest / model.training.seconds((1.0, model.fullest, 0.0))
        return f"{tokens_per_s:,.0f} training tokens a second, measured for {base_model} on {place}"

    def begun(self, task: TaskRow, row: AssignmentRow, gpu_kind: str) -> None:
        """Note that an assignment was made: what is known now is what its prediction rests on."""
        self._runs[row.assignment_id] = _Run(copy.deepcopy(self.model.model(_hardware(task, gpu_kind))))

    def heard(
        self,
        task: TaskRow,
        row: AssignmentRow,
        gpu_kind: str,
        progress: Progress,
        now: Moment,
        has_guests: bool = False,
    ) -> None:
        """Learn from what a node says of a run. A guest's executor is learned from once, by its host."""
        if row.assignment_id not in self._runs:
            self.begun(task, row, gpu_kind)
        run = self._runs[row.assignment_id]
        run.is_shared = run.is_shared or has_guests or bool(row.host_assignment_id)
        done = progress.measured.since(run.heard)
        if done.ticks <= 0 and done.evaluation_tokens <= 0:
            return
        hardware = _hardware(task, gpu_kind)
        run.heard, run.share_trained = progress.measured, progress.share_trained
        if row.host_assignment_id:
            return
        self.model.observe(hardware, done)
        # Words travel for seconds: the earliest that came gives the best idea of when training began.
        run.start_s = min(run.start_s, now.wall_s - row.started_s - progress.measured.seconds)
        self._note(hardware)

    def ended(self, task: TaskRow, row: AssignmentRow, gpu_kind: str) -> None:
        """Learn from the end of a run, however it ended."""
        run = self._runs.pop(row.assignment_id, None)
        if run is None or run.heard.ticks < LEAST_RUN_TICKS:
            return
        hardware, done = _hardware(task, gpu_kind), run.heard
        if not row.host_assignment_id:
            self.model.observe_start(hardware, run.start_s)
            if run.model_then.training.ticks > 0:
                then_s = run.model_then.seconds(done.training, done.evaluation_tokens)
                self.model.observe_run(hardware, then_s, done.seconds)
            self._note(hardware)
        if row.outcome is Outcome.COMPLETED and not task.stopped_trial_ids and task.size.train_tokens:
            key = (task.tenant, task.size.shape)
            if task.attempts == 1 and not run.is_shared:
                self.model.observe_share(hardware, _work(task.size), done, *key)
            else:
                # This attempt did a part only, or not it alone; the node knows how many of the planned samples were
                # trained in all.
                self.model.shares.observe(*key, run.share_trained)
            self.model.trained.observe(*key, run.share_trained)
            self._note(key)

    def changed(self) -> Records:
        """Return what was learned since the last call."""
        records: dict[str, Any] = {}
        for key in self._changed:
            contents: list[tuple[list[Any], Any]]
            if isinstance(key, Hardware):
                name = ["hardware", key.backbone, key.gpu_kind, key.gpus, key.parameters]
                contents = [(name, self.model.hardware[key].state())]
            else:
                contents = [
                    (["share", *key], self.model.shares.state(*key)),
                    (["trained", *key], self.model.trained.state(*key)),
                ]
            for name, content in contents:
                if len(text := json.dumps(name, ensure_ascii=False)) <= LONGEST_NAME:
                    records[text] = content
        self._told, self._changed = self._changed, set()
        return records

    def not_kept(self) -> None:
        """Note that what `changed` returned last could not be kept: it is returned again."""
        self._changed |= self._told

    def _note(self, key: Hardware | tuple[str, str]) -> None:
        """Note that something was learned: it is to be kept, and what rests on it may have moved."""
        self._changed.add(key)
        self._touch(key)

    def _touch(self, key: Hardware | tuple[str, str]) -> None:
        if isinstance(key, Hardware):
            self.moves.touch(hardware_basis(key))
        else:
            tenant, shape = key
            self.moves.touch(*((name, one, shape) for name in ("shares", "trained") for one in (tenant, None)))

    def load(self, records: Records) -> None:
        """Take up what `changed` returned at some time."""
        for name, content in records.items():
            kind, *key = json.loads(name)
            try:
                if kind == "hardware":
                    self.model.hardware[Hardware(*key)] = HardwareModel.from_state(content)
                    self._touch(Hardware(*key))
                elif kind == "share":
                    self.model.shares.load(key[0], key[1], content)
                    self._touch((key[0], key[1]))
                elif kind == "trained":
                    self.model.trained.load(key[0], key[1], content)
                    self._touch((key[0], key[1]))
            except (TypeError, ValueError, KeyError, IndexError, ArithmeticError):
                # Of another version, or damaged: it is learned again.
                log.warning("what was learned cannot be read; it is learned again", name=name)


def _times(duration: Duration, factor: float) -> Duration:
    return Duration(*(factor * s for s in (duration.expected_s, duration.upper_s, duration.low_s, duration.high_s)))


def _hardware(task: TaskRow, gpu_kind: str) -> Hardware:
    return Hardware(task.base_model, gpu_kind, task.gpus, task.size.base_parameters)


def _work(size: WorkSize, share: float = 1.0, steps_share: float | None = None) -> Work:
    """Return a share of a task's work; `steps_share` is that of its longest trial."""
    steps = max(1, size.steps)
    rank_steps = size.total_lora_rank * steps / max(1, size.trials)
    return Work(
        (size.train_tokens or UNKNOWN_TOKENS) * share,
        max(1, size.longest_steps) * (share if steps_share is None else min(1.0, steps_share)),
        rank_steps * share,
        size.evaluation_tokens * share,
    )
