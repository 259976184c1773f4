"""Base models as admission sees them: known by name, inspected in a worker process, remembered until they change."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import structlog
from alto.v1 import error_pb2
from alto_common.base_models import DESCRIBING_FILES, BaseModelError, ModelFacts, resolve
from alto_common.errors import DomainError
from alto_common.violations import Violation

from alto_admission.heavy_work import ModelSources, UnusableModel, all_model_facts, model_facts, token_lengths
from alto_admission.worker import Worker

BASE_MODEL_FIELD = "spec.base_model"

log = structlog.get_logger("alto.admission.models")


@dataclass(frozen=True)
class KnownModel:
    """A base model that can be used. `location` is a folder, or a hub id."""

    name: str
    location: str
    facts: ModelFacts

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file, where it is on this host."""
        file = Path(self.location) / "tokenizer.json"
        return file if Path(self.location).is_absolute() and file.is_file() else None


class Models:
    """Answers questions about base models without holding up the server."""

    def __init__(self, worker: Worker, sources: ModelSources) -> None:
        self._worker = worker
        self._sources = sources
        self._known: dict[tuple[str, tuple[int, ...]], KnownModel] = {}

    async def get(self, name: str) -> KnownModel:
        """Return a base model; raise UNKNOWN_BASE_MODEL with the names that would be accepted."""
        sources = self._sources
        try:
            resolved = await asyncio.to_thread(
                resolve, name, sources.models_root, sources.allowed_folders, sources.allow_hub
            )
        except BaseModelError as error:
            raise _unknown(name, str(error), error.cure) from error
        key = (resolved.location, _version(resolved.location))
        known = self._known.get(key)
        if known is None or known.name != name:
            found = await self._worker.call(model_facts, name, sources)
            if isinstance(found, UnusableModel):
                log.warning("a base model cannot be used", location=resolved.location, problem=found.problem)
                raise _unknown(name, found.problem, found.cure)
            known = self._known[key] = KnownModel(name, found[0].location, found[1])
        return known

    async def all(self) -> list[tuple[str, ModelFacts]]:
        """Return every model below the models root that can be used, by name."""
        return await self._worker.call(all_model_facts, self._sources)

    async def token_lengths(self, rows: Path, model: KnownModel, timeout_s: float) -> tuple[int, ...] | None:
        """Return the lengths in tokens of some of the rows; None when that takes too long or cannot be done here."""
        if model.tokenizer_file is None:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                return tuple(await self._worker.call(token_lengths, rows, model.tokenizer_file))
        except TimeoutError:
            return None


def _version(location: str) -> tuple[int, ...]:
    files = (Path(location) / name for name in DESCRIBING_FILES)
    return tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)


def _unknown(name: str, problem: str, cure: str) -> DomainError:
    violation = Violation(BASE_MODEL_FIELD, name, cure)
    return DomainError(error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL, problem, violations=[violation])
