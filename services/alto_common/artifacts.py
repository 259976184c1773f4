"""The artifact store: datasets, adapters and checkpoints as files below one root, a folder or any fsspec URL.

A file appears whole or not at all. Paths come from ALTO, never from a caller, and cannot leave the root.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class StoredFile:
    """A file that is in the store. `path` is relative to the root, `sha256` in lower-case hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


class ArtifactStore:
    """Files below `root`. Raises ValueError for a path that would leave it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, base = fsspec.core.url_to_fs(root)
        self._base = str(base).rstrip("/")
        self._is_local = "file" in _protocols(self._fs)

    @property
    def local_root(self) -> Path | None:
        """The root's path on this host when the store is a local folder, else None."""
        return Path(self._base) if self._is_local else None

    def local_path(self, path: str) -> Path | None:
        """Return the file's or folder's path on this host when the store is a local folder, else None."""
        return Path(self._full(path)) if self._is_local else None

    def has_root(self) -> bool:
        """Return whether the root is there: without it, a file that is not found may exist all the same."""
        return bool(self._fs.exists(self._base))

    def exists(self, path: str) -> bool:
        """Return whether a file is there."""
        return bool(self._fs.exists(self._full(path)))

    def write(self, path: str, chunks: Iterable[bytes]) -> StoredFile:
        """Write a file: aside, to the disk, then renamed. Nothing is left of one that could not be written."""
        target = self._full(path)
        aside = f"{target}.{secrets.token_hex(6)}.part"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        digest = hashlib.sha256()
        size = 0
        try:
            with self._fs.open(aside, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                if self._is_local:
                    file.flush()
                    os.fsync(file.fileno())
            self._fs.mv(aside, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm(aside)
            raise
        if self._is_local:
            _sync_folder(Path(target).parent)
        return StoredFile(path, size, digest.hexdigest())

    def read(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from `offset` on, at most 1 MiB at a time. Raises FileNotFoundError."""
        with self._fs.open(self._full(path), "rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def delete(self, path: str) -> None:
        """Delete a file or a folder; one that is not there is no error."""
        full = self._full(path)
        if self._fs.exists(full):
            self._fs.rm(full, recursive=True)

    def _full(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or any(part in ("..", ".") for part in parts) or "\0" in path:
            raise ValueError(f"{path!r} is not a path inside the artifact store")
        return f"{self._base}/{'/'.join(parts)}"


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
