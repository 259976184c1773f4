"""The compiled core of the planner: reads a snapshot, searches for a schedule, answers row by row."""

from alto_planner._planner import Core, ReadError

__all__ = ["Core", "ReadError"]
