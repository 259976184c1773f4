"""What can go wrong between worker ranks, each with its name and the cure."""

from __future__ import annotations

from alto_training.executor.errors import ExecutorError


class LockStepError(ExecutorError):
    """A worker rank was about to gather another part of the backbone than the others."""


class ShardedLoadError(ExecutorError):
    """A model's files do not hold what its architecture asks for, name by name."""


class StrategyError(ExecutorError):
    """A strategy does not fit the number of worker ranks, the memory, or what is installed."""


class RankFailedError(ExecutorError):
    """A worker rank died or hung, again and again; the message names it."""


class InputRefusedError(ExecutorError):
    """The base model cannot be used; the message is that of the error that says so."""
