"""Random clusters and queues, drawn by hypothesis: does every plan keep what is promised of it?

    make bench NAME=planner_random ARGS="--count 10000"

The promises are those of tests/placement/planner/random_clusters.py, all of them for each snapshot drawn: feasible by
the independent checker, quotas kept, the same plan again, the same plan from a search's effort, and with memory.
The first broken one ends the run with the smallest snapshot that breaks it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "placement" / "planner"))

from alto_placement.planner import Snapshot
from random_clusters import PROMISES, snapshots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn = {"snapshots": 0, "waiting": 0, "running": 0}
    began = time.monotonic()

    @seed(options.seed)
    @settings(max_examples=options.count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(snapshots(), st.integers(0, 5))
    def keeps(snapshot: Snapshot, seed: int) -> None:
        drawn["snapshots"] += 1
        drawn["waiting"] += len(snapshot.waiting)
        drawn["running"] += len(snapshot.running)
        if drawn["snapshots"] % 1000 == 0:
            print(f"  {drawn['snapshots']} drawn, {time.monotonic() - began:.0f} s", file=sys.stderr)
        for promise in PROMISES:
            promise(snapshot, seed)

    keeps()
    result = {
        "benchmark": "planner_random",
        "snapshots": drawn["snapshots"],
        "waiting_tasks": drawn["waiting"],
        "running_tasks": drawn["running"],
        "promises": [promise.__name__ for promise in PROMISES],
        "broken": 0,
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
