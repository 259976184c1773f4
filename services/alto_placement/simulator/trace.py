"""Traces of real jobs: job, submit_s, gpus, duration_s, vc (the columns of the Philly trace as derived for Pollux)."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from alto_placement.simulator.cluster import Job

COLUMNS = ("job", "submit_s", "gpus", "duration_s", "vc")


class TraceError(ValueError):
    """A trace cannot be replayed. Names the file, the line, the column and what would be right."""


def read_trace(path: Path) -> list[Job]:
    """Return the jobs of a trace by submission. Predicted and actual durations are both the recorded one.

    A job without GPUs or without duration did nothing and is left out. Raises TraceError.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return _read(csv.DictReader(file), path)
        except (UnicodeDecodeError, csv.Error) as error:
            raise TraceError(f"{path}: {error}; give CSV in UTF-8") from error


def _read(reader: csv.DictReader[str], path: Path) -> list[Job]:
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise TraceError(f"{path}: no column {missing[0]}; the first line must name {', '.join(COLUMNS)}")
    jobs: dict[str, Job] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        submit_s, gpus, duration_s = (_number(row, column, where) for column in ("submit_s", "gpus", "duration_s"))
        if gpus != int(gpus):
            raise TraceError(f"{where}: gpus is {gpus:g}: give whole GPUs")
        if not row["job"]:
            raise TraceError(f"{where}: no job: give each a name of its own")
        if row["job"] in jobs:
            raise TraceError(f"{where}: job {row['job']!r} is there twice: give each a name of its own")
        if gpus and duration_s:
            jobs[row["job"]] = Job(row["job"], submit_s, int(gpus), duration_s, duration_s, row["vc"] or "")
    if not jobs:
        raise TraceError(f"{path}: no job that ran: give rows with gpus and duration_s above 0")
    return sorted(jobs.values(), key=lambda job: (job.submit_s, job.job_id))


def _number(row: Mapping[str, str | None], column: str, where: str) -> float:
    try:
        number = float(row[column] or "")
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise TraceError(f"{where}: {column} is {row[column]!r}: give a number, 0 or more")
    return number


def scaled_to_load(jobs: Sequence[Job], gpus: int, load: float) -> list[Job]:
    """Return the jobs with submission times stretched so that their work is `load` of what `gpus` GPUs can do.

    The order and the relative gaps of the arrivals stay. Load counts actual durations. Raises TraceError when all are
    submitted at once: no stretching gives those a load.
    """
    first = min((job.submit_s for job in jobs), default=0.0)
    span = max((job.submit_s for job in jobs), default=0.0) - first
    if span <= 0.0:
        raise TraceError(f"{len(jobs)} jobs, none submitted after another: give jobs whose submit_s differ")
    work = sum(job.gpus * job.actual_s for job in jobs)
    stretch = work / (load * gpus) / span
    return [dataclasses.replace(job, submit_s=(job.submit_s - first) * stretch) for job in jobs]
