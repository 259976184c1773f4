"""The version of ALTO that is installed; its parts are released together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of the installed package; "unreleased" where it runs from sources alone."""
    try:
        return version("alto-tuning")
    except PackageNotFoundError:
        return "unreleased"
