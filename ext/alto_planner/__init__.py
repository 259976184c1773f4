"""The compiled core of the planner: reads a snapshot, searches for a schedule, answers row by row."""

from alto_planner._planner import Reader, ReadError, ReadSnapshot, Solution, solve

__all__ = ["ReadError", "ReadSnapshot", "Reader", "Solution", "solve"]
