"""Where the extra time of kernels.py comes from: forward and backward apart, and what a lasting load does to the clock.

    python benchmarks/kernels_parts.py --output parts.json

`parts`: one launch each as a CUDA graph, by turns with cuBLAS's product of the same shape; *none* is our launch without
an adapter, its tiles alone. `lasting` under load without a pause, `rested` after one of 3 ms each. `alone`: a step of
the frozen layer, forward and backward, and one of ours, each by itself for half a second, in turn: at its power limit a
GPU lowers its clock for what takes more energy, which steps that take turns share. On one GPU; 8192 tokens, bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from alto_kernels import AdapterTable, TickPlan
from alto_kernels.cuda_products import linears_backward, linears_forward
from kernels import (
    BUNDLES,
    PAUSE_CYCLES,
    TOKENS,
    Cell,
    Problem,
    Step,
    captured,
    clock_mhz,
    frozen_step,
    make_problem,
    milliseconds,
    our_step,
)

NONE = "none"
PARTS = {
    "4096->4096": [
        (1, "16", "equal"),
        (1, "64", "equal"),
        (4, "16", "ragged"),
        (8, "16", "equal"),
        (8, "16", "ragged"),
        (8, "64", "ragged"),
        (8, "8-128", "ragged"),
        (32, "16", "ragged"),
        (64, "16", "equal"),
        (64, "64", "ragged"),
    ],
    "4096->14336": [(1, "16", "equal"), (8, "16", "ragged")],
    "14336->4096": [(1, "16", "equal"), (8, "16", "ragged")],
}
ALONE = [
    Cell("4096->4096", 1, "16", "equal"),
    Cell("4096->4096", 8, "64", "ragged"),
    Cell("4096->4096", 32, "16", "ragged"),
    Cell("4096->14336", 8, "16", "ragged"),
]


def our_launches(cell: Cell, problem: Problem, with_adapters: bool) -> tuple[Step, Step]:
    """Return forward and backward of one layer, without autograd."""
    table = AdapterTable(BUNDLES[cell.bundle], cell.adapters, "cuda", "cutlass")
    for slot, rank in enumerate(cell.lora_ranks()):
        a, b = problem.a[0][slot], problem.b[0][slot]
        table.set_slot(slot, rank=rank, scale=2.0, weights={0: (a, b, torch.zeros_like(a), torch.zeros_like(b))})
    slots, offsets = (range(cell.adapters), cell.offsets()) if with_adapters else ([-1], [0, TOKENS])
    plan = TickPlan(table, slots, offsets, torch.arange(TOKENS, dtype=torch.int32))
    x = problem.x.detach()

    def forward() -> list[torch.Tensor]:
        return linears_forward(x, problem.weights, [None], plan, [0])

    saved = forward()[1:]
    torch.cuda.synchronize()  # launches of one plan must not meet, and graphs are captured on streams of their own

    def backward() -> object:
        return linears_backward(problem.dys, x, problem.weights, saved, plan, [0], True)

    return forward, backward


def measure_parts(bundle: str, rounds: int) -> list[dict[str, Any]]:
    base = make_problem(Cell(bundle, 1, "16", "equal"))
    x, weight, dy = base.x.detach(), base.weights[0], base.dys[0]
    steps: dict[str, Step] = {
        "cublas forward": captured(lambda: torch.nn.functional.linear(x, weight)),
        "cublas backward": captured(lambda: dy @ weight),
    }
    first = PARTS[bundle][0]
    for name, (adapters, ranks, tokens) in [(NONE, first)] + [(" ".join(map(str, one)), one) for one in PARTS[bundle]]:
        cell = Cell(bundle, adapters, ranks, tokens)
        drawn = make_problem(cell)
        problem = Problem(base.x, base.weights, base.dys, drawn.a, drawn.b)
        forward, backward = our_launches(cell, problem, with_adapters=name != NONE)
        steps |= {f"{name} forward": captured(forward), f"{name} backward": captured(backward)}
    found = []
    for mode, pause in (("lasting", 0), ("rested", PAUSE_CYCLES)):
        times = milliseconds(steps, rounds, pause)
        microseconds = {name: round(statistics.median(values) * 1e3, 2) for name, values in times.items()}
        found.append({"bundle": bundle, "mode": mode, "clock_mhz": clock_mhz(), "us": microseconds})
    return found


def measure_alone(cell: Cell) -> dict[str, Any]:
    problem = make_problem(cell)
    steps = {"frozen": captured(frozen_step(problem)), "ours": captured(our_step(cell, problem))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    clocks: dict[str, list[int]] = {name: [] for name in steps}
    count = 250 if cell.bundle == "4096->4096" else 80
    for _ in range(4):
        for name, step in steps.items():
            for _ in range(2):  # the first for the clock to settle
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                for _ in range(count):
                    step()
                after.record()
                torch.cuda.synchronize()
            times[name].append(before.elapsed_time(after) / count)
            clocks[name].append(clock_mhz())
    turns = milliseconds(steps, 100)
    medians = {name: statistics.median(values) for name, values in times.items()}
    by_turns = statistics.median(ours / frozen for ours, frozen in zip(turns["ours"], turns["frozen"], strict=True))
    return {
        "cell": [cell.bundle, cell.adapters, cell.ranks, cell.tokens],
        "alone_ms": {name: round(value, 4) for name, value in medians.items()},
        "alone_tax_percent": round((medians["ours"] / medians["frozen"] - 1) * 100, 1),
        "clock_mhz": {name: statistics.median(values) for name, values in clocks.items()},
        "turns_tax_percent": round((by_turns - 1) * 100, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    options = parser.parse_args()
    parts, alone = [], []
    for bundle in PARTS:
        parts += measure_parts(bundle, options.rounds)
        torch.cuda.empty_cache()
        print(json.dumps(parts[-2:]), flush=True)
    for cell in ALONE:
        alone.append(measure_alone(cell))
        print(json.dumps(alone[-1]), flush=True)
    result = {
        "benchmark": "kernels_parts",
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "parts": parts,
        "alone": alone,
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
