"""Failures as the user sees them: what, which field, which value, the cure. Never a traceback for a user's mistake."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from alto_cli import exit_codes

CONFLICTS = ("STATE_CONFLICT", "ETAG_MISMATCH", "REQUEST_ID_REUSED", "DATASET_IN_USE", "EPOCH_STALE")
BY_REASON = {
    "RESOURCE_NOT_FOUND": exit_codes.NOT_FOUND,
    "CREDENTIAL_INVALID": exit_codes.PERMISSION,
    "PERMISSION_DENIED": exit_codes.PERMISSION,
    "QUOTA_EXCEEDED": exit_codes.QUOTA,
    "UNAVAILABLE": exit_codes.UNREACHABLE,
    **dict.fromkeys(CONFLICTS, exit_codes.CONFLICT),
}
BY_STATUS = {
    "INVALID_ARGUMENT": exit_codes.USAGE,
    "OUT_OF_RANGE": exit_codes.USAGE,
    "DEADLINE_EXCEEDED": exit_codes.UNREACHABLE,
    "UNAVAILABLE": exit_codes.UNREACHABLE,
}


class CommandError(Exception):
    """A command that cannot go on; `message` says why, `cures` what to do, `exit_code` what a script sees."""

    def __init__(self, message: str, *cures: str, exit_code: int = exit_codes.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.cures = cures
        self.exit_code = exit_code


@contextmanager
def failures(json_output: bool) -> Iterator[None]:
    """Turn what goes wrong inside into a message on stderr (one JSON object with `json_output`) and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(exit_codes.INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output went away, as `head` does: nobody is left to tell.
        sys.stderr.close()
        raise typer.Exit(exit_codes.SUCCESS) from None
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        text, lines, exit_code, facts = message
        if json_output:
            print(json.dumps({"error": {"message": text, **facts}}), file=sys.stderr)
        else:
            from alto_cli.view.wording import in_task_file

            told = in_task_file("\n  ".join((f"error: {text}", *lines)))
            print(told, file=sys.stderr)
        raise typer.Exit(exit_code) from None


def _message(error: Exception) -> tuple[str, Sequence[str], int, Mapping[str, Any]] | None:
    """Return (message, lines below it, exit code, facts for programs); None for what is a bug of ours."""
    if isinstance(error, CommandError):
        return error.message, error.cures, error.exit_code, {"cures": list(error.cures)}
    if isinstance(error, OSError) and error.strerror is not None:
        return _system_message(error)
    # Imported here: a command that failed before it needed the SDK has not paid for it.
    from alto_client.errors import AltoError
    from alto_client.task_file import TaskFileError

    if isinstance(error, TaskFileError):
        problems = [{"line": p.line, "field": p.field, "cure": p.cure} for p in error.problems]
        text = "the task file cannot be used" if len(problems) > 1 else error.sentences()[0]
        lines = error.sentences() if len(problems) > 1 else ()
        return text, lines, exit_codes.USAGE, {"file": str(error.path), "problems": problems}
    if isinstance(error, AltoError):
        return _call_message(error)
    return None


def _system_message(error: OSError) -> tuple[str, Sequence[str], int, Mapping[str, Any]]:
    text = str(error.strerror) if error.filename is None else f"{error.filename}: {error.strerror}"
    facts = {} if error.filename is None else {"file": str(error.filename)}
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space, or name a folder on another disk; what was written whole is kept"
        return text, [cure], exit_codes.FAILURE, facts
    return text, (), exit_codes.USAGE, facts


def _call_message(error: Any) -> tuple[str, Sequence[str], int, Mapping[str, Any]]:
    from alto_cli.view.wording import printable

    violations = [{"field": found.field, "description": found.description} for found in error.violations]
    text = printable(error.message)
    sentences = [
        printable(found.description if found.field in found.description else f"{found.field}: {found.description}")
        for found in error.violations
    ]
    lines = _unsaid(sentences, text)
    if error.retry_after_s is not None:
        lines.append(f"try again in {error.retry_after_s:.0f} s")
    if error.reason_name == "CREDENTIAL_INVALID":
        lines.append(
            "give a valid key with --api-key or ALTO_API_KEY, operators a token with --service-token or "
            "ALTO_SERVICE_TOKEN; or start your own server with `alto up`"
        )
    if error.reason_name == "UNAVAILABLE" and error.message.startswith("cannot reach"):
        lines.append(
            "is it running? see `alto status`; start one with `alto up`, or name another with --server or --placement"
        )
    exit_code = BY_REASON.get(error.reason_name, BY_STATUS.get(error.status_code.name, exit_codes.FAILURE))
    facts = {
        "reason": error.reason_name,
        "status": error.status_code.name,
        "violations": violations,
        "retry_after_s": error.retry_after_s,
        "metadata": error.metadata,
    }
    return text, lines, exit_code, facts


def _unsaid(sentences: Sequence[str], text: str) -> list[str]:
    """Return those of "field = value: cure" that `text` does not say: the first, or the only one's cure in other words.

    The server leaves out the middle of long texts, so their ends are compared.
    """
    if len(sentences) == 1:
        cure = sentences[0].partition(": ")[2] or sentences[0]
        return [] if cure.rpartition(" ... ")[2] in text else list(sentences)
    return [sentence for sentence in sentences if sentence.partition(" ... ")[0] not in text]
