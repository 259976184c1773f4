"""The task that is meant when none is named."""

from __future__ import annotations

from alto_client import AltoClient

from alto_cli import exit_codes
from alto_cli.failures import CommandError


def task_or_newest(client: AltoClient, task_id: str) -> str:
    """Return `task_id`, or the newest task's when it is empty."""
    if task_id:
        return task_id
    newest = next(client.tasks(), None)
    if newest is None:
        raise CommandError("there is no task yet", "submit one: alto tune FILE.yaml", exit_code=exit_codes.NOT_FOUND)
    return newest.task_id
