"""What one launch of kernels.py moves, by ncu's counters: cuBLAS's product, and ours with few adapters and with many.

    python benchmarks/kernels_ncu.py --output benchmarks/results/kernels_ncu-h100.json

On one GPU whose counters may be read, with ncu on the PATH; 8192 tokens, bf16. Bytes into the multiprocessors are what
comes from the L2 cache, to each that gets it. Times are of single launches under ncu, at the clock that it finds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import torch
from kernels import Cell, make_problem
from kernels_parts import our_launches

METRICS = {
    "gpu__time_duration.sum": "us",
    "l1tex__m_xbar2l1tex_read_bytes.sum": "into_multiprocessors_gb",
    "dram__bytes.sum": "dram_mb",
    "sm__inst_executed_pipe_tensor.sum": "tensor_instructions",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_active_percent",
}
SCALES = {"us": 1e-3, "into_multiprocessors_gb": 1e-9, "dram_mb": 1e-6}
CELLS = [
    Cell(bundle, adapters, ranks, tokens)
    for bundle in ("4096->4096", "4096->14336", "14336->4096")
    for adapters, ranks, tokens in ((1, "16", "equal"), (8, "16", "ragged"), (64, "16", "ragged"), (64, "64", "ragged"))
]


def launch_each() -> None:
    """Launch what is counted once, between marks for ncu, after a launch that is not."""
    for cell in CELLS:
        problem = make_problem(cell)
        forward, backward = our_launches(cell, problem, with_adapters=True)
        x, weight, dy = problem.x.detach(), problem.weights[0], problem.dys[0]
        for step in (
            lambda x=x, w=weight: torch.nn.functional.linear(x, w),
            lambda w=weight, dy=dy: dy @ w,
            forward,
            backward,
        ):
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def counted() -> list[dict[str, object]]:
    command = [
        "ncu",
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
    ]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--launch"]
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if ran.returncode != 0:
        sys.exit(f"benchmarks/kernels_ncu.py: ncu failed: {ran.stdout[-2000:]}")
    told = ran.stdout
    rows = list(csv.DictReader(io.StringIO(told[told.index('"ID"') :])))[1:]  # the first has the units
    names = [
        (cell, name)
        for cell in CELLS
        for name in ("cuBLAS forward", "cuBLAS backward", "ours forward", "ours backward")
    ]
    found: list[dict[str, object]] = []
    for (cell, name), row in zip(names, rows, strict=True):
        figures = {
            ours: float(row[theirs].replace(",", "")) * SCALES.get(ours, 1.0)
            for theirs, ours in METRICS.items()
            if row.get(theirs)
        }
        found.append(
            {"bundle": cell.bundle, "adapters": cell.adapters, "ranks": cell.ranks, "tokens": cell.tokens}
            | {"launch": name}
            | {key: round(value, 3) for key, value in figures.items()}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    options = parser.parse_args()
    if options.launch:
        launch_each()
        return
    result = {
        "benchmark": "kernels_ncu",
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "launches": counted(),
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
