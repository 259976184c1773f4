"""The folders of a search on this machine: one process works in a work folder, and no other adapter is written over."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alto_cli import exit_codes
from alto_cli.failures import CommandError


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold a work folder, made if it is not there; the kernel lets go of it when the process ends, however it does."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"{work} is in use: another process trains there",
                "wait for it, or give another folder with --work",
                exit_code=exit_codes.CONFLICT,
            ) from None
        yield


def check_writable(output: Path) -> None:
    """Refuse, before anything is trained, an output folder that could not be written."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir():
        raise CommandError(f"output: {there} is a file", "name a folder with --output")
    if not os.access(there, os.W_OK):
        raise CommandError(f"output: {there} cannot be written", "name another folder with --output")


def check_output(output: Path, work: Path, force: bool) -> None:
    """Refuse, before anything is trained, an output folder that could not be written or holds another adapter."""
    from alto_training.executor.peft_format import WEIGHTS_NAME

    check_writable(output)
    weights = output / WEIGHTS_NAME
    if force or not weights.exists():
        return
    held = weights.read_bytes()
    if not any(held == own.read_bytes() for own in (work / "adapters").glob(f"*/{WEIGHTS_NAME}")):
        raise CommandError(
            f"{output} holds another adapter",
            "name another folder with --output, or have it replaced with --force",
            exit_code=exit_codes.CONFLICT,
        )


def copy_files(source: Path, target: Path) -> None:
    """Copy an adapter's files, each aside and renamed."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            aside = target / f".{file.name}.part"
            shutil.copyfile(file, aside)
            os.replace(aside, target / file.name)
