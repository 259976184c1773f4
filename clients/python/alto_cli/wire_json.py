"""Messages as JSON for programs: every field there, numbers as numbers, enum values without their prefix.

Differs from protobuf's own mapping where that is awkward to read: 64-bit integers are numbers, durations are seconds,
timestamps ISO 8601, what is not set is null. Numbers that JSON does not have are "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import math
import re
from typing import Any

from google.protobuf import duration_pb2, json_format, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message


def as_json(message: Message) -> Any:
    """Return a message as what json.dumps takes."""
    if isinstance(message, timestamp_pb2.Timestamp):
        return message.ToJsonString()
    if isinstance(message, duration_pb2.Duration):
        return message.seconds + message.nanos / 1e9
    if isinstance(message, struct_pb2.Value | struct_pb2.ListValue | struct_pb2.Struct):
        return json_format.MessageToDict(message)
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields if _is_shown(message, field)}


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """Return an enum value without its prefix: "RUNNING" for TASK_STATE_RUNNING."""
    value = enum.values_by_number.get(number)
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return value.name.removeprefix(prefix) if value else str(number)


def _is_shown(message: Message, field: Any) -> bool:
    """Of a oneof only the member that is set is shown."""
    oneof = field.containing_oneof
    is_real_oneof = oneof is not None and not oneof.name.startswith("_")
    return not is_real_oneof or message.HasField(field.name)


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            item = field.message_type.fields_by_name["value"]
            return {str(key): _single(item, entry) for key, entry in sorted(value.items())}
        return [_single(field, entry) for entry in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
