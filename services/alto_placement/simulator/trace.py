"""Traces of real jobs: job, submit_s, gpus, duration_s, vc (the columns of the Philly trace as derived for Pollux)."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from alto_placement.simulator.cluster import Job


def read_trace(path: Path) -> list[Job]:
    """Return the jobs of a trace by submission. Predicted and actual durations are both the recorded one."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    jobs = [
        Job(
            row["job"],
            float(row["submit_s"]),
            int(row["gpus"]),
            float(row["duration_s"]),
            float(row["duration_s"]),
            row["vc"],
        )
        for row in rows
    ]
    return sorted(jobs, key=lambda job: (job.submit_s, job.job_id))


def scaled_to_load(jobs: Sequence[Job], gpus: int, load: float) -> list[Job]:
    """Return the jobs with submission times stretched so that their work is `load` of what `gpus` GPUs can do.

    The order and the relative gaps of the arrivals stay. Load counts actual durations.
    """
    first = min(job.submit_s for job in jobs)
    span = max(job.submit_s for job in jobs) - first
    work = sum(job.gpus * job.actual_s for job in jobs)
    stretch = work / (load * gpus) / span
    return [dataclasses.replace(job, submit_s=(job.submit_s - first) * stretch) for job in jobs]
