"""Opaque tokens: where a list or a watch carries on. Each is bound to what it was made for.

They are no secrets and open no doors: the tenant always comes from the credential. The binding only tells a caller that
mixes tokens up so, instead of answering with the wrong page.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from alto.v1 import error_pb2
from alto_common.errors import DomainError
from alto_common.violations import Violation

_BINDING_BYTES = 8
_SEQUENCE_BYTES = 8


def page_token(binding: bytes, key: tuple[int | str, ...]) -> str:
    """Return the token of the page behind `key` in the list that `binding` describes (AIP-158)."""
    return _encoded(_digest(binding) + json.dumps(key).encode())


def page_key(token: str, binding: bytes, kinds: tuple[type, ...]) -> tuple[Any, ...] | None:
    """Return the key, of parts of these `kinds`, in a page token; None for the first page. PAGE_TOKEN_INVALID."""
    if not token:
        return None
    raw = _decoded(token)
    try:
        key = json.loads(raw[_BINDING_BYTES:]) if raw[:_BINDING_BYTES] == _digest(binding) else None
    except ValueError:
        key = None
    if not isinstance(key, list) or tuple(map(type, key)) != kinds or not all(map(_is_storable, key)):
        violation = Violation("page_token", token, "give the next_page_token of the same list with the same filter")
        message = "the page token does not belong to this list"
        raise DomainError(error_pb2.ERROR_REASON_PAGE_TOKEN_INVALID, message, violations=[violation])
    return tuple(key)


def resume_token(task_id: str, sequence: int) -> str:
    """Return the token that carries on behind event `sequence` of a task."""
    return _encoded(_digest(task_id.encode()) + sequence.to_bytes(_SEQUENCE_BYTES, "big"))


def resumed_sequence(token: str, task_id: str, last: int) -> int:
    """Return the sequence in a resume token of a task whose last event is `last`. Raises RESUME_TOKEN_INVALID."""
    raw = _decoded(token)
    sequence = int.from_bytes(raw[_BINDING_BYTES:], "big")
    sound = len(raw) == _BINDING_BYTES + _SEQUENCE_BYTES and raw[:_BINDING_BYTES] == _digest(task_id.encode())
    if not sound or sequence > last:
        violation = Violation("resume_token", token, "give the resume_token of the last message about this task")
        message = "the resume token is not of this task"
        raise DomainError(error_pb2.ERROR_REASON_RESUME_TOKEN_INVALID, message, violations=[violation])
    return sequence


def _is_storable(part: int | str) -> bool:
    """Say whether a database can compare a column with it: a 64-bit number, or text without NUL that UTF-8 can hold."""
    if isinstance(part, int):
        return -(2**63) <= part < 2**63
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in part)


def _digest(binding: bytes) -> bytes:
    return hashlib.sha256(binding).digest()[:_BINDING_BYTES]


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decoded(token: str) -> bytes:
    """Return a token's bytes; none for what is no token, which no binding matches."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
