"""What can go wrong in an executor, each with its name and the cure."""

from __future__ import annotations

from collections.abc import Sequence

from alto_common.violations import Violation


class ExecutorError(Exception):
    """Base of the executor's errors: `message` says what is wrong and `cure` what to do about it."""

    def __init__(self, message: str, cure: str) -> None:
        super().__init__(f"{message}; {cure}")
        self.message = message
        self.cure = cure


class CheckpointError(ExecutorError):
    """No generation of a checkpoint can be trusted: a file is missing, cut short or altered."""


class DatasetChangedError(ExecutorError):
    """The dataset is not the one that the checkpoint was trained on."""


class DatasetRefusedError(ExecutorError):
    """A dataset has rows that this model cannot be trained on; `violations` names them, line by line."""

    def __init__(self, message: str, cure: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message, cure)
        self.violations = tuple(violations)


class WrongBaseModelError(ExecutorError):
    """The backbone is not the one that an adapter or a checkpoint belongs to."""


class JobChangedError(ExecutorError):
    """The work folder belongs to a job with other trials or settings."""


class AdapterFormatError(ExecutorError):
    """An adapter folder is not what PEFT writes, or does not fit the trial that starts from it."""


class UnsupportedBackboneError(ExecutorError):
    """The model's architecture has a part that the executor cannot train over."""


class TargetModulesError(ExecutorError):
    """A trial names modules or layers that the backbone does not have."""


class ContextLengthError(ExecutorError):
    """A trial asks for sequences longer than the backbone's context."""


class EmptyDatasetError(ExecutorError):
    """A dataset has no row to train or to validate on."""


class OutOfMemoryError(ExecutorError):
    """Memory ran out with a single sequence on the tick: nothing is left to halve."""


class TickOutOfMemoryError(ExecutorError):
    """Memory ran out on one worker rank in the middle of a pass that others are in too."""

    def __init__(self, message: str, cure: str, tokens_per_tick: int | None = None) -> None:
        super().__init__(message, cure)
        self.tokens_per_tick = tokens_per_tick
