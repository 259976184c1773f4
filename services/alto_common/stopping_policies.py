"""The names of stopping policies: those that ship with every node, and those that other packages register."""

from __future__ import annotations

from importlib.metadata import EntryPoints, entry_points

# Each has a class of its own in alto_training.early_exit.
BUILT_IN_POLICIES = ("alto", "asha", "hyperband", "median", "none", "paper")
PLUGIN_GROUP = "alto.early_exit"


def plugins() -> EntryPoints:
    """Return the policies that installed packages register."""
    return entry_points(group=PLUGIN_GROUP)


def policy_names() -> list[str]:
    """Return the names that a task may give."""
    return sorted({*BUILT_IN_POLICIES, *plugins().names})
