"""Where the planner's benchmarks find a trace of real jobs: --trace FILE, else the shared one beside the repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from alto_placement.simulator import Job, TraceError, read_trace
from alto_placement.simulator.trace import COLUMNS

SHARED_TRACE = Path(__file__).parents[2] / "shared" / "data" / "traces" / "philly_week45_mixed.csv"


def add_trace_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        default=SHARED_TRACE,
        help="CSV with job, submit_s, gpus, duration_s, vc (default: ../shared/data/traces/philly_week45_mixed.csv)",
    )


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of the trace asked for, or leave with what to do about it."""
    trace: Path = options.trace
    if not trace.is_file():
        raise SystemExit(
            f"there is no trace at {trace}. Give one by --trace FILE: CSV with the columns {', '.join(COLUMNS)}, such "
            "as a week of the Philly trace"
        )
    try:
        return read_trace(trace)
    except TraceError as error:
        raise SystemExit(str(error)) from None
