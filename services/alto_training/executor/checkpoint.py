"""Checkpoints on disk: tensors in safetensors files, the rest in one JSON manifest, written last.

A tensor file is named by what it holds and its version and is never written twice, so what has not changed since the
last checkpoint costs nothing. The manifest names each file with its sha256 and size. Two generations are kept; a
reader takes the newest whose every file checks out, and nothing is overwritten when none does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alto_training.executor.durable_files import write_file
from alto_training.executor.errors import CheckpointError, WrongBaseModelError

_FORMAT = 3
_GENERATIONS = 2


def checkpoints_folder(task_folder: Path) -> Path:
    """Return where a task's checkpoints lie."""
    return task_folder / "checkpoints"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are written to one file; the same name and version always mean the same content."""

    name: str
    version: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.name}-v{self.version}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: the ticks that its task had then, its JSON state, and its tensors by group name."""

    tick: int
    state: dict[str, Any]
    groups: dict[str, dict[str, torch.Tensor]]

    def require_backbone(self, fingerprint: str, dtype: str, where: str) -> None:
        """Raise `WrongBaseModelError` when it was trained over another backbone, or in another number format."""
        if self.state["backbone_fingerprint"] != fingerprint:
            raise WrongBaseModelError(
                f"the checkpoint in {where} is of another backbone",
                "give the base model it was trained over, or another work folder",
            )
        if self.state["backbone_dtype"] != dtype:
            raise WrongBaseModelError(
                f"the checkpoint in {where} is of the backbone in {self.state['backbone_dtype']}, not in {dtype}",
                f"load it in {self.state['backbone_dtype']}, or give another work folder",
            )


class CheckpointStore:
    """The checkpoints of one task, in a folder of their own: whoever trains it next needs nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}  # file name -> sha256 and size, of files known to be good

    def write_groups(self, groups: list[TensorGroup]) -> dict[str, dict[str, Any]]:
        """Write the files of `groups`; return, by group, a file's name, sha256, size, and how much of it was new."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, dict[str, Any]] = {}
        for group in groups:
            name = group.file_name
            written = 0
            if name not in self._known:
                pieces = _safetensors(group.tensors)
                write_file(self._folder / name, *pieces)
                digest = hashlib.sha256()
                for piece in pieces:
                    digest.update(piece)
                written = sum(len(piece) for piece in pieces)
                self._known[name] = {"sha256": digest.hexdigest(), "size": written}
            files[group.name] = {"file": name, **self._known[name], "written": written}
        return files

    def write_manifest(
        self, tick: int, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Path, int]:
        """Make a checkpoint durable whose files are written; return its manifest's path and all bytes written."""
        written = sum(entry["written"] for entry in files.values())
        named = {group: {key: entry[key] for key in ("file", "sha256", "size")} for group, entry in files.items()}
        payload = json.dumps({"format": _FORMAT, "tick": tick, "files": named, "state": state}, sort_keys=True)
        manifest = {"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload}
        path = self._folder / f"manifest-{tick:012d}.json"
        content = json.dumps(manifest).encode()
        write_file(path, content)
        self._discard_old()
        return path, written + len(content)

    def read_groups(self, files: Mapping[str, Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of files that were just written, in their order. Raises `CheckpointError` for damage."""
        try:
            return [self._read_group(entry) for entry in files.values()]
        except _DamageError as error:
            raise CheckpointError(str(error), "look at the disk, and go on from the last checkpoint") from error

    def read(self) -> Checkpoint | None:
        """Return the newest good checkpoint, None if none was ever written.

        Raises `CheckpointError` when there are checkpoints and none is good: the damage of the newest is named.
        """
        damage: str | None = None
        damaged: list[Path] = []
        for path in self._manifests():
            try:
                checkpoint = self._read(path)
            except _DamageError as error:
                damage = damage or str(error)
                damaged.append(path)
                continue
            for bad in damaged:
                # Kept for whoever wants to look, but no generation any more.
                bad.rename(bad.with_suffix(".damaged"))
            return checkpoint
        if damage is None:
            return None
        raise CheckpointError(
            f"no checkpoint in {self._folder} is whole: {damage}",
            "restore the files, or start over in an empty work folder",
        )

    def _read(self, path: Path) -> Checkpoint:
        # Of a damaged generation nothing is known: what comes again under a name of its files may be something else.
        self._known = {}
        try:
            manifest = json.loads(path.read_bytes())
            payload = manifest["payload"]
            good = hashlib.sha256(payload.encode()).hexdigest() == manifest["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _DamageError(f"{path.name} cannot be read ({error})") from error
        if not good:
            raise _DamageError(f"{path.name} was altered")
        content = json.loads(payload)
        if content["format"] != _FORMAT:
            raise _DamageError(f"{path.name} has format {content['format']}, not {_FORMAT}")
        groups = {name: self._read_group(entry) for name, entry in content["files"].items()}
        return Checkpoint(content["tick"], content["state"], groups)

    def _read_group(self, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        from safetensors.torch import load

        try:
            raw = (self._folder / entry["file"]).read_bytes()
        except OSError as error:
            raise _DamageError(f"{entry['file']} is missing") from error
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise _DamageError(f"{entry['file']} was altered or cut short")
        self._known[entry["file"]] = {"sha256": entry["sha256"], "size": entry["size"]}
        tensors: dict[str, torch.Tensor] = load(raw)
        return tensors

    def _manifests(self) -> list[Path]:
        return sorted(self._folder.glob("manifest-*.json"), reverse=True)

    def _discard_old(self) -> None:
        kept = self._manifests()[:_GENERATIONS]
        for path in self._manifests()[_GENERATIONS:]:
            path.unlink()
        needed = set()
        for path in kept:
            payload = json.loads(json.loads(path.read_bytes())["payload"])
            needed |= {entry["file"] for entry in payload["files"].values()}
        for path in self._folder.glob("*.safetensors"):
            if path.name not in needed:
                path.unlink()
                self._known.pop(path.name, None)


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """Return the pieces of a safetensors file of fp32 tensors: its head, then views of the tensors, without a copy.

    `safetensors.torch.save` would hold them twice more, at the moment when memory is fullest.
    """
    head: dict[str, dict[str, Any]] = {}
    pieces: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().numpy().data.cast("B")
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
        pieces.append(content)
    described = json.dumps(head).encode()
    described += b" " * (-len(described) % 8)  # the format wants tensors aligned
    return [len(described).to_bytes(8, "little") + described, *pieces]


class _DamageError(Exception):
    """One generation cannot be trusted."""
