"""What `alto estimate --local` does: tell what `alto train-local` would take on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

from alto_client.task_file import load_task_file

from alto_cli.extras import needs_extra
from alto_cli.local_job import local_job, told_to_the_user
from alto_cli.local_training import LocalMachine, prepare_libraries
from alto_cli.output import print_facts, print_json, say
from alto_cli.view.wording import bytes_text, duration_text, plural


def estimate_file_locally(path: Path, machine: LocalMachine, json_output: bool) -> None:
    """Print what a search would take here; the first time over a base model, measure what its passes cost."""
    task_file = load_task_file(path)
    with needs_extra("training", "an estimate for this machine"):
        machine = prepare_libraries(machine)
        from alto_common.base_models import inspect
        from alto_common.calibrations import default_calibrations_folder
        from alto_training.executor.budget import known_costs
        from alto_training.executor.estimate import estimate_job, measure_costs
    settings = machine.settings()
    with told_to_the_user(), tempfile.TemporaryDirectory() as work:
        job = local_job(task_file, Path(work))
        facts = inspect(job.base_model)
        if known_costs(settings, facts) is None:
            say(f"measuring what passes over {task_file.base_model} cost on this machine (about a minute, once)")
            measure_costs(job, settings, default_calibrations_folder(), time.perf_counter, process_age_s)
        estimate = estimate_job(job, settings, Path(work) / "cache")
    if json_output:
        whole = dataclasses.asdict(estimate.load.training)
        print_json(
            {
                "trials": len(job.trials),
                "tokens": round(whole["tokens"]),
                "expected_seconds": estimate.expected_seconds,
                "upper_seconds": estimate.upper_seconds,
                "peak_memory_bytes": round(estimate.peak_memory_bytes),
                "slots": estimate.machine.slots,
                "tokens_per_tick": estimate.machine.tokens_per_tick,
            }
        )
        return
    print_facts(
        [
            ("trials", f"{len(job.trials):,}, {plural(estimate.machine.slots, 'slot')}"),
            ("tokens", f"{estimate.load.training.tokens:,.0f} if no trial stops early"),
            ("expected", duration_text(estimate.expected_seconds)),
            ("at most", duration_text(estimate.upper_seconds)),
            ("memory", bytes_text(round(estimate.peak_memory_bytes))),
            ("basis", f"passes over {task_file.base_model} measured on this machine"),
        ]
    )


def process_age_s() -> float:
    """Return the seconds since this process began; where the system does not tell, since Python counts its time."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.process_time()
    import os

    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")
