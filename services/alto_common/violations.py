"""A violation: one field of a request that cannot be accepted, its value, and the cure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: `field` is its path as the caller wrote it, `cure` what would be accepted."""

    field: str
    value: object
    cure: str

    def __str__(self) -> str:
        """Return the sentence a person reads."""
        return f"{self.field} = {self.value!r}: {self.cure}"
