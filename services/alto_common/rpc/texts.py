"""The texts of a message, wherever they are in it: finding those that PostgreSQL cannot keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

NUL = "\0"

# Where in its field a value is: an index, a key, or None for the only one.
Key: TypeAlias = int | str | None


class _Texts(NamedTuple):
    """A field's texts, or its messages with texts in them: `values` reads them from a message, with their keys."""

    field: str
    values: Callable[[Any], Iterable[tuple[Key, Any]]]
    are_messages: bool


def texts_with_nul(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of each text in a message that holds U+0000, keys and values of maps included."""
    for field, values, are_messages in _texts(message.DESCRIPTOR):
        for key, value in values(message):
            if are_messages:
                for path, text in texts_with_nul(value):
                    yield f"{field}{subscript(key)}.{path}", text
            elif NUL in value:
                yield field + subscript(key), value


def subscript(key: Key) -> str:
    """Return what a path has behind the name of a field: [3], ["key"], or nothing for None."""
    return "" if key is None else f"[{json.dumps(key, ensure_ascii=False)}]"


@cache
def _texts(kind: Descriptor) -> tuple[_Texts, ...]:
    """Return where messages of a kind have texts; every other field costs nothing."""
    return tuple(found for field in kind.fields for found in _texts_of(field))


def _texts_of(field: FieldDescriptor) -> Iterator[_Texts]:
    name, kind = field.name, field.message_type
    if not _has_text(field):
        return
    if kind is not None and kind.GetOptions().map_entry:
        if _has_text(kind.fields_by_name["key"]):
            yield _Texts(name, lambda message: ((key, key) for key in getattr(message, name)), False)
        value = kind.fields_by_name["value"]
        if _has_text(value):
            yield _Texts(name, lambda message: getattr(message, name).items(), value.message_type is not None)
    elif field.is_repeated:
        yield _Texts(name, lambda message: enumerate(getattr(message, name)), kind is not None)
    elif kind is None:
        yield _Texts(name, lambda message: ((None, getattr(message, name)),), False)
    else:
        yield _Texts(name, lambda message: ((None, getattr(message, name)),) if message.HasField(name) else (), True)


def _has_text(field: FieldDescriptor, around: frozenset[Descriptor] = frozenset()) -> bool:
    kind = field.message_type
    if kind is None:
        return field.type == FieldDescriptor.TYPE_STRING
    return kind not in around and any(_has_text(inner, around | {kind}) for inner in kind.fields)
