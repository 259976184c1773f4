"""Reading and writing the artifact store through its outages: what fails is tried again for a while.

Stops are not heard meanwhile: a node ends a worker that does not stop in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import BinaryIO

import structlog
from alto_common.artifacts import CHUNK_BYTES, ArtifactStore, StoredFile

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
LONGEST_OUTAGE_S = 600.0
# What no waiting cures: a path outside the store, what may not be done there, mistakes of ours.
_LASTING = (ValueError, PermissionError, NotImplementedError, TypeError)

log = structlog.get_logger("alto.worker")


class StoreUnreachableError(Exception):
    """An outage of the artifact store outlasted LONGEST_OUTAGE_S. The message may be shown to tenants."""


def read(store: ArtifactStore, path: str) -> Iterator[bytes]:
    """Yield a file's bytes. Raises FileNotFoundError for one that the store does not have, StoreUnreachableError."""
    offset = 0
    outage = None
    while True:
        try:
            for chunk in store.read(path, offset):
                outage = None
                offset += len(chunk)
                yield chunk
            return
        except _LASTING:
            raise
        except Exception as error:  # each file system of fsspec has errors of its own
            if isinstance(error, FileNotFoundError) and _is_here(store):
                raise
            outage = outage or _Outage()
            outage.wait(path, error)


def write(store: ArtifactStore, path: str, content: BinaryIO) -> StoredFile:
    """Write a file, from the beginning of `content`. Raises StoreUnreachableError."""
    outage = None
    while True:
        try:
            content.seek(0)
            return store.write(path, iter(lambda: content.read(CHUNK_BYTES), b""))
        except _LASTING:
            raise
        except Exception as error:
            outage = outage or _Outage()
            outage.wait(path, error)


def _is_here(store: ArtifactStore) -> bool:
    try:
        return store.has_root()
    except Exception:
        return False


class _Outage:
    """One outage, from its first error on."""

    def __init__(self) -> None:
        self._last_try_s = time.monotonic() + LONGEST_OUTAGE_S
        self._wait_s = FIRST_WAIT_S

    def wait(self, path: str, error: Exception) -> None:
        """Wait before the next try, each time longer. Raises StoreUnreachableError when there is none."""
        left_s = self._last_try_s - time.monotonic()
        if left_s <= 0:
            raise StoreUnreachableError(
                f"the artifact store could not be reached for {LONGEST_OUTAGE_S:g} s"
            ) from error
        wait_s = min(self._wait_s, left_s)
        log.warning(
            "the artifact store cannot be reached; trying again",
            path=path,
            error=f"{type(error).__name__}: {error}",
            wait_s=wait_s,
        )
        time.sleep(wait_s)
        self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)
