"""Settings of a service: from environment variables, unknown ones refused, with defaults that work on one machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# What settings of several services need, see `ServiceSettings.needed`.
DATABASE_CURE = (
    "start the database, or give the URL of one, postgresql://... or sqlite+aiosqlite:///..., that can be written"
)
FOLDER_CURE = "name a folder that can be written"
PORT_CURE = "give host:port of this machine, and a port that no other program has"


def home_folder() -> Path:
    """Return where ALTO keeps its state on this machine: ALTO_HOME, or ~/.alto."""
    return Path(os.environ.get("ALTO_HOME", Path.home() / ".alto"))


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there; raise OSError when nothing can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


# Empty is as good as not given.
GivenPath = Annotated[Path | None, BeforeValidator(lambda value: value or None)]


class SettingsError(ValueError):
    """Variables that will not do, by name."""


class ServiceSettings(BaseSettings):
    """Base of each service's settings. A subclass sets `prefix` and reads variables that begin with it.

    What is wrong with them is said without their values: some are secrets.

    `tls_certificate` and `tls_key` (PEM files) are what the service shows to whom it serves and to services that it
    connects to; without them it speaks plaintext. With `tls_roots` only services that show a certificate signed by
    these may call what services alone use, and the services that it connects to are verified by them. At
    `metrics_listen` (host:port; empty for none) Prometheus may read what the service measures, without a credential.
    """

    prefix: ClassVar[str] = "ALTO_"
    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    service_token: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    log_format: Literal["json", "text"] = "json"
    metrics_listen: str = ""
    tls_certificate: GivenPath = None
    tls_key: GivenPath = None
    tls_roots: GivenPath = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__()
        cls.model_config = SettingsConfigDict(**{**ServiceSettings.model_config, "env_prefix": cls.prefix})

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        self._require_pair("tls_certificate", "tls_key")
        if self.tls_roots is not None and self.tls_certificate is None:
            raise ValueError(
                f"{self._variable('tls_roots')} is set without a certificate: give "
                f"{self._variable('tls_certificate')} and {self._variable('tls_key')} too, or leave it out"
            )
        return self

    def _require_pair(self, certificate: str, key: str) -> None:
        """Raise ValueError when one of two settings is given without the other."""
        for given, missing in ((certificate, key), (key, certificate)):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise ValueError(
                    f"{self._variable(given)} is set without {self._variable(missing)}: give both, or leave both out"
                )

    @classmethod
    def load(cls, **given: object) -> Self:
        """Read the environment, but for the settings `given`.

        Raises SettingsError for variables that no setting has, and for those that will not do.
        """
        known = {cls._variable(name) for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(cls.prefix) and name not in known)
        if unknown:
            raise SettingsError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = [
                cls._fault(fault["loc"], fault["msg"].removeprefix("Value error, "))
                for fault in error.errors(include_input=False)
            ]
            raise SettingsError("; ".join(faults)) from None

    @contextmanager
    def needed(self, name: str, cure: str) -> Iterator[None]:
        """Turn what fails inside into a SettingsError: what the setting `name` points at will not do, and the cure."""
        try:
            yield
        except Exception as error:
            raise SettingsError(f"{self._fault((name,), _problem(error))}: {cure}") from error

    @classmethod
    def _fault(cls, path: tuple[int | str, ...], message: str) -> str:
        if not path:  # of several settings together, or text that is no JSON: the message names them
            return message
        name, *inner = path
        where = "".join(f"[{key!r}]" for key in inner)
        return f"{cls._variable(str(name))}{where}: {message}"

    @classmethod
    def _variable(cls, name: str) -> str:
        return f"{cls.prefix}{name}".upper()


def _problem(error: Exception) -> str:
    """Return an error in one line: of a database its driver's, which does not name the URL."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    cause = getattr(error, "orig", None) or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)
