"""A cluster in virtual time: replays traces through the planner and through the policies it is compared with."""

from alto_placement.simulator.checker import violations
from alto_placement.simulator.cluster import Cluster, Job, Outcome, Policy, simulate
from alto_placement.simulator.planned import Planned
from alto_placement.simulator.trace import TraceError, read_trace, scaled_to_load

__all__ = [
    "Cluster",
    "Job",
    "Outcome",
    "Planned",
    "Policy",
    "TraceError",
    "read_trace",
    "scaled_to_load",
    "simulate",
    "violations",
]
