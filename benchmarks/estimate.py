"""What `alto estimate --local` says, against what `alto train-local` then takes, over searches that differ.

    make bench NAME=estimate
    make bench NAME=estimate ARGS="--cases rank_64,many_trials --cpu-time --threads 1"

SmolLM2-135M in fp32 on this CPU over rows of GSM8K. The passes are measured once, in a process of its own; then each
case is estimated and really run, each in a fresh process, from its first instruction to its last. Prints a line for
each case and one with the worst errors: peak memory (resident, as the system counts it) and seconds. `--cpu-time`
counts processor seconds in place of wall time: for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples" / "gsm8k-small"
BASE = {"batch_size": 4, "max_steps": 6, "max_length": 256, "target_modules": "all-linear"}
NO_EXIT = {"policy": "none"}


def search(grid: dict[str, Any], count: int = 1, early_exit: dict[str, Any] = NO_EXIT, **base: Any) -> dict[str, Any]:
    return {
        "base_model": "smollm2-135m-instruct",
        "dataset": str(EXAMPLES / "train.jsonl"),
        "validation": str(EXAMPLES / "validation.jsonl"),
        "search": {"base": BASE | base, "grid": grid},
        "early_exit": early_exit,
        "evaluation": {"count": count},
    }


RATES = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4]
CASES: dict[str, dict[str, Any]] = {
    "one_trial": search({"learning_rate": RATES[:1], "lora_rank": [8]}, max_steps=12),
    "rank_64": search({"learning_rate": RATES[:2], "lora_rank": [64]}),
    "rank_128": search({"learning_rate": RATES[:1], "lora_rank": [128]}, max_steps=10),
    "mixed_ranks": search({"learning_rate": RATES[:1], "lora_rank": [4, 16, 64]}),
    "small_batch": search({"learning_rate": RATES[:2], "lora_rank": [16]}, batch_size=1, max_steps=24),
    "large_batch": search({"learning_rate": RATES[:2], "lora_rank": [8]}, batch_size=16, max_steps=2),
    "short_rows": search({"learning_rate": RATES[:3], "lora_rank": [16]}, max_length=96, max_steps=8),
    "long_rows": search({"learning_rate": RATES[:2], "lora_rank": [16]}, max_length=512),
    "attention_only": search({"learning_rate": RATES[:3], "lora_rank": [16]}, target_modules=["q_proj", "v_proj"]),
    "much_evaluation": search({"learning_rate": RATES[:2], "lora_rank": [8]}, count=6),
    "many_trials": search({"learning_rate": RATES, "lora_rank": [16]}, max_steps=3),
    "early_exit": search(
        {"learning_rate": RATES, "lora_rank": [8]},
        count=4,
        early_exit={"policy": "paper", "warmup_fraction": 0.25, "keep_fraction": 0.25, "gap_threshold": 100.0},
        max_steps=8,
        batch_size=2,
    ),
}


@dataclass(frozen=True)
class Taken:
    """What a process took."""

    seconds: float
    peak_bytes: int


def run(command: list[str], environment: dict[str, str], cpu_time: bool) -> Taken:
    """Run a command to its end; raise if it failed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{words}")
    return Taken(usage.ru_utime + usage.ru_stime if cpu_time else wall, usage.ru_maxrss * 1024)


def measure_costs(arguments: argparse.Namespace, task: Path) -> None:
    """Measure the passes once, as `alto estimate --local` does at its first use; runs in a process of its own."""
    from alto_cli.local_estimate import process_age_s
    from alto_cli.local_job import local_job
    from alto_cli.local_training import LocalMachine, prepare_libraries
    from alto_client.task_file import load_task_file
    from alto_common.calibrations import default_calibrations_folder
    from alto_training.executor.estimate import measure_costs as measure

    settings = prepare_libraries(LocalMachine(device="cpu", threads=arguments.threads)).settings()
    clock, age = (time.process_time,) * 2 if arguments.cpu_time else (time.perf_counter, process_age_s)
    with tempfile.TemporaryDirectory() as work:
        job = local_job(load_task_file(task), Path(work))
        print(measure(job, settings, default_calibrations_folder(), clock, age), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas between")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds: for a machine that is busy")
    parser.add_argument("--calibrations", type=Path, help="keep what is measured here, and use it the next time")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_costs(arguments, arguments.measure)
        return 0
    import torch
    import transformers

    alto = str(Path(sys.executable).with_name("alto"))
    options = ["--threads", str(arguments.threads), "--device", "cpu"]
    worst = {"peak_memory_error": 0.0, "seconds_error": 0.0}
    names = arguments.cases.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        calibrations = arguments.calibrations or folder / "calibrations"
        environment = os.environ | {"ALTO_CALIBRATIONS": str(calibrations)}
        for name in names:
            task = folder / f"{name}.yaml"
            task.write_text(json.dumps({"name": name.replace("_", "-"), **CASES[name]}))  # JSON is YAML too
            if not list(calibrations.glob("*.json")):
                own = [sys.executable, __file__, "--measure", str(task), "--threads", str(arguments.threads)]
                run([*own, "--cpu-time"] if arguments.cpu_time else own, environment, arguments.cpu_time)
            answer = subprocess.run(
                [alto, "estimate", str(task), "--local", "--json", *options],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            estimate = json.loads(answer.stdout)
            output = ["--output", str(folder / name), "--work", str(folder / f"{name}.work")]
            taken = run([alto, "train-local", str(task), *output, "--json", *options], environment, arguments.cpu_time)
            line = {
                "case": name,
                "predicted_seconds": round(estimate["expected_seconds"], 2),
                "seconds": round(taken.seconds, 2),
                "predicted_peak_bytes": estimate["peak_memory_bytes"],
                "peak_bytes": taken.peak_bytes,
                "peak_memory_error": round(estimate["peak_memory_bytes"] / taken.peak_bytes - 1, 4),
                "seconds_error": round(estimate["expected_seconds"] / taken.seconds - 1, 4),
            }
            worst = {key: max(value, abs(line[key])) for key, value in worst.items()}
            print(json.dumps(line), flush=True)
    result = {
        **{f"worst_{key}": value for key, value in worst.items()},
        "cases": len(names),
        "threads": arguments.threads,
        "seconds": "processor" if arguments.cpu_time else "wall",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))
    return 0 if worst["peak_memory_error"] <= 0.1 and worst["seconds_error"] <= 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())
