"""The contract of a stopping policy: what it sees of a trial, what it may answer, and when it is asked."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

State = dict[str, Any]
"""What `state_dict` returns: only what JSON can hold."""


class Verdict(enum.StrEnum):
    """What to do with a trial."""

    KEEP = "keep"
    PAUSE = "pause"
    STOP = "stop"


@dataclass(frozen=True)
class Observation:
    """One evaluation of one trial, after optimiser step `step` (counted from 1) of its `total_steps`.

    Losses are means over target tokens. `finite` is False once anything of the trial (a loss, a gradient, a weight) is
    not a number any more. `validation_losses`, where the executor has them, are those of the single validation
    examples, in the same order for every trial: they let a policy compare trials example by example.
    """

    step: int
    total_steps: int
    train_loss_smoothed: float
    validation_loss: float
    finite: bool = True
    validation_losses: tuple[float, ...] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every number of the observation may be calculated with."""
        return self.finite and math.isfinite(self.train_loss_smoothed) and math.isfinite(self.validation_loss)

    @property
    def is_last(self) -> bool:
        """Whether the trial has no steps left, so that nothing is saved by stopping it."""
        return self.step >= self.total_steps

    def has_reached(self, fraction: float) -> bool:
        """Return whether this is at or past `fraction` of the trial's own steps."""
        return self.step >= fraction * self.total_steps - 1e-9


@dataclass(frozen=True)
class Decision:
    """A verdict on one trial that explains itself.

    `rule` is a stable identifier ("divergence"), `reason` a sentence for the tenant, `evidence` the numbers that the
    rule looked at (all finite, so that JSON holds them), `threshold` what they were compared with, if anything.
    """

    trial_id: str
    verdict: Verdict
    rule: str
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None


class StoppingPolicy(Protocol):
    """Judges the trials of one task. One instance a task, fed in the order in which evaluations happen.

    The caller's side of the contract:

    - It calls `observe` after each evaluation of a running trial and acts on every decision it gets back; they may
      concern other trials than the one observed, and one trial more than once: they hold in their order. No decision
      about a trial means: carry on as before.
    - PAUSE parks a trial, with its optimiser state, and frees its slot. A later KEEP puts it back in the queue, a later
      STOP ends it. KEEP for a trial that is running is a remark for its log.
    - It calls `trial_ended` once a trial will make no more steps, whoever decided that (steps completed, stopped by a
      decision, cancelled, failed), and acts on the decisions it gets back: others may have been waiting for this one.
      Calling it twice is harmless.
    - When a user vetoes a STOP, the caller lets the trial run on: from then on only a non-finite loss stops it.

    The policy's side: as long as the caller keeps to this, a paused trial is sooner or later kept or stopped; the
    decisions depend only on the sequence of calls; the state survives `json.dumps` and `json.loads`.
    """

    def observe(self, trial_id: str, observation: Observation) -> list[Decision]:
        """Take note of an evaluation; return what follows from it, for any of the trials."""
        ...

    def trial_ended(self, trial_id: str) -> list[Decision]:
        """Take note that a trial makes no more steps; return what follows for the others."""
        ...

    def state_dict(self) -> State:
        """Return all that a checkpoint must hold, in types that JSON knows."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state; raise `PolicyStateError` if it is not one of this policy and these trials."""
        ...


class PolicyStateError(ValueError):
    """A saved state that belongs to another policy or to other trials."""


def check_state(state: State, policy: str, trial_ids: list[str]) -> None:
    """Raise `PolicyStateError` unless `state` was saved by `policy` over `trial_ids`."""
    if state.get("policy") != policy:
        raise PolicyStateError(f"the saved state is of policy {state.get('policy')!r}, not of {policy!r}")
    if state.get("trial_ids") != trial_ids:
        raise PolicyStateError(f"the saved state is of trials {state.get('trial_ids')}, not of {trial_ids}")


def non_finite(trial_id: str, observation: Observation) -> Decision:
    """Return the decision that every policy takes on a trial whose numbers are not finite."""
    return Decision(
        trial_id,
        Verdict.STOP,
        "non_finite",
        f"Stopped at step {observation.step}: its loss, gradient or weights are no longer finite numbers (train loss "
        f"{observation.train_loss_smoothed:g}, validation loss {observation.validation_loss:g}). A lower learning rate "
        "usually cures this.",
        {"step": float(observation.step)},
    )
