"""Parts of ALTO that a client may be without: the services and the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alto_cli.failures import CommandError


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a missing import into a sentence that says which extra to install for `what`."""
    try:
        yield
    except ImportError as error:
        raise CommandError(
            f"{what} needs ALTO's {extra} part, and {error.name} is not installed",
            f"install it: pip install 'alto-tuning[{extra}]'",
        ) from None
