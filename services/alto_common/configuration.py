"""Settings of a service: from environment variables, unknown ones refused, with defaults that work on one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Self

from pydantic_settings import BaseSettings, SettingsConfigDict


def home_folder() -> Path:
    """Return where ALTO keeps its state on this machine: ALTO_HOME, or ~/.alto."""
    return Path(os.environ.get("ALTO_HOME", Path.home() / ".alto"))


class ServiceSettings(BaseSettings):
    """Base of each service's settings. A subclass sets `prefix` and reads variables that begin with it."""

    prefix: ClassVar[str] = "ALTO_"
    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    service_token: str
    log_format: str = "json"

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__()
        cls.model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=cls.prefix)

    @classmethod
    def load(cls, **given: object) -> Self:
        """Read the environment, but for the settings `given`.

        Raises ValueError for a variable with the prefix that no setting has.
        """
        known = {f"{cls.prefix}{name}".upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(cls.prefix) and name not in known)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls.model_validate(given)
