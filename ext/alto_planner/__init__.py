"""The compiled core of the planner: reads a snapshot, searches for a schedule, answers row by row."""

from alto_planner._planner import FirstCome, Reader, ReadError, ReadSnapshot, Solution, solve

__all__ = ["FirstCome", "ReadError", "ReadSnapshot", "Reader", "Solution", "solve"]
