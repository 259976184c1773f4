"""Moments and spans as they travel, in microseconds. What is no moment, or out of range, counts as not given."""

from __future__ import annotations

from google.protobuf import duration_pb2, timestamp_pb2


def moment_us(message: timestamp_pb2.Timestamp) -> int | None:
    """Return a moment after the epoch, UTC; None for any other."""
    try:
        time_us = message.ToMicroseconds()
    except ValueError:
        return None
    return time_us if time_us > 0 else None


def span_us(message: duration_pb2.Duration) -> int | None:
    """Return a span of time, not negative; None for any other."""
    try:
        return max(0, message.ToMicroseconds())
    except ValueError:
        return None
