"""The low-rank part of a layer on one GPU: time beyond the frozen product ("LoRA tax"), ours and what peers do.

    python benchmarks/kernels.py --output benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --quick

Each cell is one bundle of linear layers, forward and backward with the gradients of x and of all adapters, bf16, 8192
tokens. Columns: the frozen product alone; `loop`: one adapter after another, as PEFT would; `grouped_mm`: two
torch._grouped_mm over stacked weights padded to the largest rank; `ours`, which adds to the gradients of A and B in
place, and `ours_fresh`, which overwrites them (the first tick of an effective batch). Eager and replayed from a CUDA
graph, both under load that lasts, as in training: the GPU has come down to the clock of its power limit, which columns
share that take turns (kernels_parts.py has them each alone). `rested` is the graph's step after a pause of 3 ms each
time, at the highest clock; `clock_mhz` says which that was. `--gradients bf16` gives ours and AdamW gradients of that
format. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from alto_kernels import AdapterStep, AdapterTable, TickPlan, adamw_step, cuda_available, lora_linears

TOKENS = 8192
BUNDLES = {
    "4096->4096": [(4096, 4096)],
    "4096->1024": [(4096, 1024)],
    "4096->14336": [(4096, 14336)],
    "14336->4096": [(14336, 4096)],
    "q,k,v": [(4096, 4096), (4096, 1024), (4096, 1024)],
    "gate,up": [(4096, 14336), (4096, 14336)],
}
RANKS = {"16": (16,), "64": (64,), "8-128": (8, 16, 32, 64, 128)}
GRADIENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_S = 0.2
PAUSE_CYCLES = 6_000_000
CLOCK_CYCLES = 400_000
Step = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """One combination that is measured."""

    bundle: str
    adapters: int
    ranks: str
    tokens: str

    def lora_ranks(self) -> list[int]:
        cycle = RANKS[self.ranks]
        return [cycle[i % len(cycle)] for i in range(self.adapters)]

    def offsets(self) -> list[int]:
        if self.tokens == "equal":
            return [TOKENS * i // self.adapters for i in range(self.adapters + 1)]
        draws = torch.Generator().manual_seed(self.adapters)
        shares = torch.rand(self.adapters, generator=draws) + 0.1
        cuts = (shares.cumsum(0) / shares.sum() * TOKENS).round().long().tolist()
        return [0, *cuts[:-1], TOKENS]


@dataclass
class Problem:
    """Tensors of a cell on the GPU: x [T, K], frozen weights [N, K], output gradients [T, N], fp32 masters of A, B."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    dys: list[torch.Tensor]
    a: list[list[torch.Tensor]]
    b: list[list[torch.Tensor]]


def make_problem(cell: Cell) -> Problem:
    shapes = BUNDLES[cell.bundle]
    draws = torch.Generator("cuda").manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", generator=draws) * scale

    return Problem(
        x=normal(TOKENS, shapes[0][0], 1.0).bfloat16().requires_grad_(),
        weights=[normal(n, k, k**-0.5).bfloat16() for k, n in shapes],
        dys=[normal(TOKENS, n, 1.0).bfloat16() for _, n in shapes],
        a=[[normal(r, k, k**-0.5) for r in cell.lora_ranks()] for k, _ in shapes],
        b=[[normal(n, r, r**-0.5) for r in cell.lora_ranks()] for _, n in shapes],
    )


def backward(problem: Problem, ys: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Differentiate by x and the adapters' leaves; gradients are dropped, which favours the peers."""
    torch.autograd.grad(ys, [problem.x, *leaves], problem.dys)


def frozen_step(problem: Problem) -> Step:
    def step() -> None:
        backward(problem, [torch.nn.functional.linear(problem.x, weight) for weight in problem.weights], [])

    return step


def loop_step(cell: Cell, problem: Problem) -> Step:
    offsets = cell.offsets()
    a = [[m.bfloat16().requires_grad_() for m in row] for row in problem.a]
    b = [[m.bfloat16().requires_grad_() for m in row] for row in problem.b]

    def step() -> None:
        ys = []
        for weight, a_row, b_row in zip(problem.weights, a, b, strict=True):
            parts = []
            for i in range(cell.adapters):
                inside = problem.x[offsets[i] : offsets[i + 1]]
                parts.append(2.0 * ((inside @ a_row[i].t()) @ b_row[i].t()))
            ys.append(torch.nn.functional.linear(problem.x, weight) + torch.cat(parts))
        backward(problem, ys, [m for rows in (a, b) for row in rows for m in row])

    return step


def grouped_step(cell: Cell, problem: Problem) -> Step:
    widest = max(cell.lora_ranks())
    ends = torch.tensor(cell.offsets()[1:], dtype=torch.int32, device="cuda")

    def stacked(matrices: list[torch.Tensor], along: int) -> torch.Tensor:
        padded = [
            torch.nn.functional.pad(m, (0, 0, 0, widest - m.shape[0]) if along == 0 else (0, widest - m.shape[1]))
            for m in matrices
        ]
        return torch.stack(padded).bfloat16().requires_grad_()

    a = [stacked(row, 0) for row in problem.a]
    b = [stacked([2.0 * m for m in row], 1) for row in problem.b]

    def step() -> None:
        ys = []
        for weight, a_GRK, b_GNR in zip(problem.weights, a, b, strict=True):
            s_TR = torch._grouped_mm(problem.x, a_GRK.transpose(1, 2), ends)
            low_rank = torch._grouped_mm(s_TR, b_GNR.transpose(1, 2), ends)
            ys.append(torch.nn.functional.linear(problem.x, weight) + low_rank)
        backward(problem, ys, [*a, *b])

    return step


def our_step(
    cell: Cell,
    problem: Problem,
    fresh: bool = False,
    dropout: float = 0.0,
    gradient_dtype: torch.dtype = torch.float32,
) -> Step:
    table = AdapterTable(BUNDLES[cell.bundle], cell.adapters, "cuda", "cutlass", gradient_dtype=gradient_dtype)
    for slot, rank in enumerate(cell.lora_ranks()):
        weights = {}
        for module, (a, b) in enumerate(zip(problem.a, problem.b, strict=True)):
            gradients = (torch.zeros_like(m[slot], dtype=gradient_dtype) for m in (a, b))
            weights[module] = (a[slot], b[slot], *gradients)
        table.set_slot(slot, rank=rank, scale=2.0, weights=weights, dropout=dropout)
    row_keys = torch.arange(TOKENS, dtype=torch.int32)
    plan = TickPlan(table, range(cell.adapters), cell.offsets(), row_keys, fresh=range(cell.adapters) if fresh else ())
    modules = range(len(problem.weights))

    def step() -> None:
        backward(problem, lora_linears(problem.x, problem.weights, plan, modules), [])

    return step


def captured(step: Step) -> Step:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keeps: Step = step) -> None:  # the tensors behind the step, which the graph reads
        graph.replay()

    return replay


def milliseconds(steps: dict[str, Step], rounds: int, pause_cycles: int = 0) -> dict[str, list[float]]:
    """Return each step's times on the device, the host running ahead where it can.

    The steps take turns, every other round backwards: the clock of a GPU at its power limit drifts by more than what is
    measured here, and depends on what ran just before. With `pause_cycles` all but one multiprocessor rest before each.
    """

    def rest() -> None:
        if pause_cycles:
            torch.cuda._sleep(pause_cycles)

    warm_at = time.monotonic() + WARM_UP_S
    while time.monotonic() < warm_at:
        for step in steps.values():
            rest()
            step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        events = []
        for name in list(steps) if turn % 2 == 0 else reversed(steps):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            rest()
            before.record()
            steps[name]()
            after.record()
            events.append((name, before, after))
        torch.cuda.synchronize()
        for name, before, after in events:
            times[name].append(before.elapsed_time(after))
    return times


def clock_mhz() -> int:
    """Return the multiprocessors' clock at the end of what was launched last."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CLOCK_CYCLES)  # the host is ahead by the second: its own pauses are not timed
    before.record()
    torch.cuda._sleep(CLOCK_CYCLES)
    after.record()
    torch.cuda.synchronize()
    took_ms: float = before.elapsed_time(after)
    return round(CLOCK_CYCLES / took_ms / 1e3)


def bytes_beyond_frozen(cell: Cell, gradient_dtype: torch.dtype) -> int:
    """Return what the low-rank part must move at least: weights read thrice in bf16, gradients read and written."""
    total = 0
    for k, n in BUNDLES[cell.bundle]:
        total += sum(rank * (k + n) * (2 * 2 + 2 * gradient_dtype.itemsize) for rank in cell.lora_ranks())
    return total


def measure(cell: Cell, rounds: int, peers: bool, gradient_dtype: torch.dtype) -> dict[str, Any]:
    problem = make_problem(cell)
    # Each against the frozen product in turns of its own: after a step that leaves the GPU cool, the next one is fast.
    turns: list[dict[str, Callable[[], Step]]] = [
        {
            "ours": lambda: our_step(cell, problem, gradient_dtype=gradient_dtype),
            "ours_fresh": lambda: our_step(cell, problem, fresh=True, gradient_dtype=gradient_dtype),
        }
    ]
    if peers:
        turns += [{"grouped_mm": lambda: grouped_step(cell, problem)}, {"loop": lambda: loop_step(cell, problem)}]
    row: dict[str, Any] = asdict(cell)
    for mode in ("eager", "graph", "rested"):
        figures: dict[str, float] = {}
        for makers in turns[:1] if mode == "rested" else turns:
            steps = {name: make() for name, make in ({"frozen": lambda: frozen_step(problem)} | makers).items()}
            if mode != "eager":
                steps = {name: captured(step) for name, step in steps.items()}
            times = milliseconds(steps, rounds, PAUSE_CYCLES if mode == "rested" else 0)
            frozen = times.pop("frozen")
            if "frozen_ms" not in figures:
                figures["clock_mhz"] = clock_mhz()
                low, *_, high = statistics.quantiles(frozen, n=10)
                figures["frozen_ms"] = round(statistics.median(frozen), 4)
                figures["frozen_spread_percent"] = round((high - low) / statistics.median(frozen) * 100, 1)
            for name, values in times.items():
                ratio = statistics.median(value / base for value, base in zip(values, frozen, strict=True))
                figures[f"{name}_ms"] = round(statistics.median(values), 4)
                figures[f"{name}_tax_percent"] = round((ratio - 1) * 100, 1)
        row[mode] = figures
    floor_ms = bytes_beyond_frozen(cell, gradient_dtype) / 3.0e9
    row["floor_tax_percent"] = round(floor_ms / row["graph"]["frozen_ms"] * 100, 1)
    return row


def measure_adamw(adapters: int, elements: int, gradient_dtype: torch.dtype) -> dict[str, float]:
    """Time one step of `adapters` adapters against reading and writing their state once.

    That is 28 bytes an element with fp32 gradients, 26 with bf16 ones: the gradient is read and not written.
    """
    steps = []
    for i in range(adapters):
        buffers = torch.randn(4, elements, device="cuda")
        buffers[3].square_()
        param, grad, exp_avg, exp_avg_sq = buffers.unbind()
        grad = grad.to(gradient_dtype)
        steps.append(
            AdapterStep(
                param, grad, exp_avg, exp_avg_sq, 3 + i, lr=1e-4, lr_b=1e-4, b_start=elements // 2, max_grad_norm=1.0
            )
        )
    moved = 24 + gradient_dtype.itemsize
    source = torch.empty(adapters * elements * moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = milliseconds({"ours": lambda: adamw_step(steps), "floor": lambda: target.copy_(source)}, 20)
    ours, floor = (statistics.median(times[name]) for name in ("ours", "floor"))
    return {"adapters": adapters, "elements": elements, "ours_ms": ours, "floor_ms": floor, "ratio": ours / floor}


def cells(quick: bool) -> list[Cell]:
    counts = (1, 8, 64) if quick else (1, 4, 8, 32, 64)
    ranks = ("16", "8-128") if quick else tuple(RANKS)
    return [
        Cell(bundle, count, rank, tokens)
        for bundle in BUNDLES
        for count in counts
        for rank in ranks
        for tokens in (("ragged",) if quick else ("equal", "ragged"))
        if count > 1 or tokens == "equal" or quick
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cells, no peers")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--only", default="", help="bundles whose name contains this")
    parser.add_argument("--gradients", choices=GRADIENTS, default="fp32", help="the format of the adapters' gradients")
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    options = parser.parse_args()
    if not cuda_available():
        print("benchmarks/kernels.py: needs the CUDA build and a GPU of compute capability 9.0", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    result: dict[str, object] = {
        "benchmark": "kernels",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "gradients": options.gradients,
        "rows": rows,
    }
    for cell in cells(options.quick):
        if options.only not in cell.bundle:
            continue
        row = measure(cell, options.rounds, peers=not options.quick, gradient_dtype=GRADIENTS[options.gradients])
        rows.append(row)
        figures = " ".join(
            f"{mode}: {row[mode]['frozen_ms']:.3f} "
            + " ".join(f"{k[:-12]} {v}%" for k, v in row[mode].items() if k.endswith("tax_percent"))
            for mode in ("eager", "graph", "rested")
        )
        print(f"{cell.bundle:12} n={cell.adapters:<3} r={cell.ranks:6} {cell.tokens:7} {figures}", flush=True)
        torch.cuda.empty_cache()
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    # r = 16 over the seven projections of an 8B model is 42 million elements; 32 such adapters at a third of that size
    # fit beside the copy they are held against.
    result["adamw"] = measure_adamw(32, 14_000_000, GRADIENTS[options.gradients])
    print(result["adamw"], flush=True)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
