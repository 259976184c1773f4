"""The settings of admission, from environment variables that begin with ALTO_ADMISSION_."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar, Self

from alto_common.base_models import default_models_root
from alto_common.configuration import GivenPath, ServiceSettings, home_folder
from alto_common.dataset_rows import DatasetLimits
from pydantic import Field, model_validator


class AdmissionSettings(ServiceSettings):
    """What an operator decides. Defaults run everything on one machine.

    Folders below `models_root` are base models by name; `model_folders` (separated by commas or the system's path
    separator) are further roots of which tenants may name folders by absolute path. `local_key_file`, when set, gets a
    key of the tenant "local" if it is not there yet. Spans are in seconds; `plan_grace_s` is how long an unfinished
    task may be missing from placement's plan before it counts as forgotten. `max_stored_dataset_bytes`,
    `max_unfinished_tasks` and `max_watches` are a tenant's. `public_tls_certificate` and `public_tls_key` are what
    tenants are shown, in place of the service's own; they are asked for no certificate, but for their API key.
    """

    prefix: ClassVar[str] = "ALTO_ADMISSION_"

    listen: str = "127.0.0.1:7410"
    internal_listen: str = "127.0.0.1:7411"
    database_url: str = Field(default_factory=lambda: f"sqlite+aiosqlite:///{home_folder() / 'admission.db'}")
    artifact_root: str = Field(default_factory=lambda: str(home_folder() / "artifacts"))
    upload_folder: Path = Field(default_factory=lambda: home_folder() / "uploads")
    models_root: Path = Field(default_factory=default_models_root)
    model_folders: str = ""
    allow_hub: bool = False
    placement_address: str = "127.0.0.1:7412"
    local_key_file: Path | None = None
    public_tls_certificate: GivenPath = None
    public_tls_key: GivenPath = None

    max_dataset_bytes: int = Field(default=1 << 30, ge=1)
    max_dataset_rows: int = Field(default=1_000_000, ge=1)
    max_stored_dataset_bytes: int = Field(default=100 << 30, ge=1)
    max_trials: int = Field(default=1000, ge=1, le=5000)
    max_unfinished_tasks: int = Field(default=1000, ge=1)

    heartbeat_s: float = Field(default=15.0, gt=0)
    poll_s: float = Field(default=0.5, gt=0)
    max_watch_lag: int = Field(default=5000, ge=1)
    max_watches: int = Field(default=1000, ge=1)
    events_kept: int = Field(default=100_000, ge=1)
    drain_s: float = Field(default=5.0, ge=0)
    plan_grace_s: float = Field(default=15.0, gt=0)

    @model_validator(mode="after")
    def _public_tls_is_whole(self) -> Self:
        self._require_pair("public_tls_certificate", "public_tls_key")
        return self

    @property
    def allowed_folders(self) -> tuple[Path, ...]:
        """The roots of `model_folders`."""
        parts = re.split(f"[,{re.escape(os.pathsep)}]", self.model_folders)
        return tuple(Path(part).expanduser() for part in parts if part)

    @property
    def dataset_limits(self) -> DatasetLimits:
        """What an uploaded file may cost."""
        return DatasetLimits(max_bytes=self.max_dataset_bytes, max_rows=self.max_dataset_rows)
