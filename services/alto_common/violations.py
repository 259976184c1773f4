"""A violation: one field of a request that cannot be accepted, its value, and the cure."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

_SHOWN_CHARACTERS = 1000
_SHOWN_ITEMS = 100


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: `field` is its path as the caller wrote it, `cure` what would be accepted."""

    field: str
    value: object
    cure: str

    def __str__(self) -> str:
        """Return the sentence a person reads."""
        return f"{self.field} = {_shown(self.value)}: {self.cure}"


def _shown(value: object) -> str:
    """Return what a person is shown of a value; of what has many parts only how many: to print millions takes long."""
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN_CHARACTERS])
    if isinstance(value, Sized) and len(value) > _SHOWN_ITEMS:
        return f"{len(value):,} values"
    return repr(value)[:_SHOWN_CHARACTERS]
