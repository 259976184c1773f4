"""Frozen dataclasses to plain JSON and back, by their type hints: what processes of one run tell each other."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Return `value` as JSON can hold it; the type itself is not written down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    return value


def decode(kind: type[T], value: Any) -> T:
    """Return the `kind` that `encode` made `value` of."""
    decoded: T = _decode(kind, value)
    return decoded


def encode_named(value: Any) -> dict[str, Any]:
    """Return a dataclass with the name of its class, for one of several."""
    return {"kind": type(value).__name__, "fields": encode(value)}


def decode_named(kinds: Any, value: Mapping[str, Any]) -> Any:
    """Return what `encode_named` made `value` of; `kinds` is a union of dataclasses."""
    kind = next(kind for kind in get_args(kinds) if kind.__name__ == value["kind"])
    return _decode(kind, value["fields"])


def _decode(kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None else _decode(kinds[0], value)
    if origin in (tuple, list, Sequence):
        each = get_args(kind)[0]
        return (list if origin is list else tuple)(_decode(each, one) for one in value)
    if origin in (dict, Mapping):
        return {key: _decode(get_args(kind)[1], each) for key, each in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _decode(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    if isinstance(kind, type) and issubclass(kind, enum.Enum | Path):
        return kind(value)
    return value
