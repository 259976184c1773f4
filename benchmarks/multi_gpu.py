"""Several GPUs of one host: our strategies against one GPU, and against data-parallel PEFT under FSDP2 and ZeRO-3.

    make bench NAME=multi_gpu ARGS="--gpus 2 --shape 8b --cells 8x2x256,8x8x256"
    python benchmarks/multi_gpu.py --gpus 2 --device cpu --shape tiny --cells 4x2x16     # a dry run without a GPU

Weights are random, of the shape named: nothing is fetched. First **parity**: one search (ragged rows, exits, backfill,
dropout, a trial that becomes NaN) on one GPU and with each strategy, in fp32 (`max_rel_weight_err` of final weights)
and in bf16 (`max_loss_difference`, beside the `spread` of one GPU: the largest between two of its tick sizes, which
change the order of sums). Then **throughput** of cells TRIALSxBATCHxLENGTH (lora_rank 16, all seven projections, no
early exit): ours is the executor itself, on every rank, with all that it does between ticks. Strategy `single` is each
GPU in turn while the others idle (`gpu`: they differ), and ratios are to the sum of all, each alone; it also runs each
cell with its share of the trials, the load that a GPU has among N. The others train one adapter at a time, BATCH
sequences on *each* GPU, and so count N times the tokens of a step: that favours them; `_split` compares with their
BATCH / N on each GPU, which is the trial's own batch. Warm-up is not timed. Speeds are those of the median round
(`round_s`: all trials' steps); `mean_tokens_per_s` is that of all rounds.

`bytes_per_tick` are the gathers of a training pass on a rank, `adapter_bytes` what collectives sent beyond gathers and
the fixed small messages, `exchange_shares` the part of its time that each rank's host spends on those messages (waiting
for others' hosts included, while its GPU has the next pass to work on), `gather_s` how long all gathers of a pass take
with nothing else to do. NVLink multicast stays as the environment sets it. One set of processes runs everything; a
strategy that fails or hangs is named, with where its ranks were, and the rest goes on in a new set. `--output` is
written after each result.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import multi_gpu_others as others
import multi_gpu_ours as ours
from benchmark_ranks import join, rank_environment
from multi_gpu_ours import World
from multi_gpu_shapes import SHAPES

OTHERS = ("fsdp_peft", "zero3_peft")
ALL = "parity,whole,sharded:deepspeed,sharded:fsdp2,sharded:peer,hybrid:deepspeed,fsdp_peft,zero3_peft"
PARITY_TICKS = (256, 160, 400, 320)  # tokens; the strategies run with the first
TEXT_TOLD = 30_000  # characters, of what failed ranks wrote
Cell = tuple[int, int, int]
Results = Iterator[dict[str, Any]]


class Run:
    """What a rank knows of the whole run: the order, its world, and whether there is time left."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.device = join(asked.device, asked.rendezvous)
        self.rank = dist.get_rank()
        self.world = ours.together(self.device, dist.new_group(backend="gloo"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def has_time(self) -> bool:
        """Whether the budget is not spent, by rank 0's clock."""
        left = {"left": self.asked.ends_at - time.time()} if self.rank == 0 else {}
        return bool(self.world.ranks.united(left)["left"] > 0.0)

    def backend(self, dtype: torch.dtype) -> Any:
        """Return whose kernels multiply the low-rank part."""
        import alto_kernels
        from alto_training.executor.settings import Backend

        if self.asked.backend != "auto":
            return Backend(self.asked.backend)
        wanted = Backend.CPU if self.device.type == "cpu" else Backend.CUTLASS
        usable = wanted in alto_kernels.backends(dtype)
        return wanted if usable else Backend.REFERENCE

    def load(self, shape: str, strategy: str, engine: str, world: World, dtype: torch.dtype) -> Any:
        ranks_per_host = self.asked.ranks_per_host or world.size
        return ours.load(shape, strategy, engine, world, dtype, ranks_per_host, self.asked.prefetch)


def parity(run: Run, kinds: list[tuple[str, str]]) -> Results:
    """Compare each strategy with one GPU."""
    shape = "parity" if run.device.type == "cuda" else "tiny"
    for dtype in dict.fromkeys((torch.float32, run.dtype)):
        backend = run.backend(dtype)
        named = {"dtype": str(dtype).removeprefix("torch."), "backend": str(backend)}
        single: list[Any] = []
        if run.rank == 0:
            one = ours.alone(run.device)
            backbone = run.load(shape, "single", "", one, dtype)
            single = [ours.curves_and_weights(one, backbone, backend, tokens) for tokens in PARITY_TICKS]
            spread = max(ours.largest_loss_difference(one[0], other[0]) for one, other in combinations(single, 2))
            yield {"parity": "single", **named, "spread": spread, "steps": len(single[0][0])}
        for strategy, engine in kinds:
            run.world.ranks.united({})
            backbone = run.load(shape, strategy, engine, run.world, dtype)
            losses, weights, ends = ours.curves_and_weights(run.world, backbone, backend, PARITY_TICKS[0])
            result: dict[str, Any] = {"parity": strategy, "engine": engine, **named}
            if run.rank == 0:
                result["max_rel_weight_err"] = ours.largest_weight_error(weights, single[0][1])
                result["max_loss_difference"] = ours.largest_loss_difference(losses, single[0][0])
                result["same_ends"] = sorted(ends) == sorted(single[0][2])
            yield result


def throughput(run: Run, strategy: str, engine: str, those: list[Cell]) -> Results:
    """Measure these cells with one of our strategies; `whole` is single, then replicated, over the same backbones."""
    whole = strategy == "whole"
    named = {"strategy": "replicated" if whole else strategy, "engine": engine}
    backbone = run.load(run.asked.shape, named["strategy"], engine, run.world, run.dtype)
    traffic = ours.count_traffic(run.world, backbone, run.backend(run.dtype))
    yield {**named, **traffic, "gather_s": ours.gather_seconds(run.world, backbone)}
    alone = ours.alone(run.device)
    for cell in single_cells(those, run.world.size, run.asked) if whole else []:
        for gpu in range(run.world.size):
            found = speed_of(run, alone if gpu == run.rank else None, backbone, cell)
            told = run.world.ranks.united({"found": found} if gpu == run.rank else {})
            yield {"strategy": "single", "gpu": gpu, "cell": cell, **told["found"]}
    for cell in those:
        yield {**named, "cell": cell, **speed_of(run, run.world, backbone, cell)}


def speed_of(run: Run, world: World | None, backbone: Any, cell: Cell) -> dict[str, Any]:
    """Measure a cell, if there is time; without a world of its own a rank waits for those that have one."""
    if not run.has_time():
        return {"not_run": "no time left"}
    found: dict[str, Any] = {}
    if world is not None:
        backend = run.backend(run.dtype)
        measure = partial(ours.measure, world, backbone, cell, backend, run.asked.tokens_per_tick)
        found = peak(run, measure, backbone.weights.uncounted_bytes)
        found["backend"] = str(backend)
    run.world.ranks.united({})
    return found


def single_cells(cells: list[Cell], gpus: int, asked: argparse.Namespace) -> list[Cell]:
    """Return what one GPU is measured on: each cell with its share of the trials, and whole where it has few."""
    shares = [(trials // gpus, batch, length) for trials, batch, length in cells if trials % gpus == 0]
    found = [*shares, *(cells if asked.singles == "all" else [])]
    return list(dict.fromkeys(cell for cell in found if cell[0] <= asked.single_trials))


def plain(run: Run, strategy: str, those: list[Cell]) -> Results:
    """Measure PEFT under FSDP2 or ZeRO-3 with the batches of these cells."""
    step = others.make_step(strategy, run.asked.shape, run.device, run.dtype)
    loads = {(1, batch, length) for _, batch, length in those}
    for cell in sorted(loads, key=lambda one: one[1] * one[2]):
        if cell[1] * cell[2] > run.asked.plain_tokens:
            found: dict[str, Any] = {"not_run": "would not fit"}
        elif not run.has_time():
            found = {"not_run": "no time left"}
        else:
            found = peak(run, partial(others.measure, step, cell[1], cell[2], run.device))
        yield {"strategy": strategy, "cell": cell, **found}


def peak(run: Run, measure: Callable[[], dict[str, Any]], uncounted_bytes: int = 0) -> dict[str, Any]:
    """Return what `measure` does, with the most memory that was in use on this rank's device.

    `uncounted_bytes` are there all the time, and not in torch's own count.
    """
    if run.device.type != "cuda":
        return measure()
    torch.cuda.reset_peak_memory_stats(run.device)
    found = measure()
    bytes_in_use = torch.cuda.max_memory_allocated(run.device) + uncounted_bytes
    return {**found, "peak_gb": round(bytes_in_use / 1e9, 2)}


# Processes


def run_rank(asked: argparse.Namespace) -> None:
    """Be one rank: run the stages one after the other; rank 0 writes results as JSON lines."""
    faulthandler.register(signal.SIGUSR1)
    run = Run(asked)
    torch.manual_seed(0)
    with Path(asked.results).open("a") as results:

        def tell(result: dict[str, Any]) -> None:
            if run.rank == 0:
                results.write(json.dumps(result) + "\n")
                results.flush()

        for stage in asked.stages.split(","):
            tell({"begun": stage})
            started = time.time()
            kind, _, own = stage.partition("@")
            name, _, engine = kind.partition(":")
            those = cells(own.replace("+", ",")) if own else asked.cells
            if name == "parity":
                kinds = [tuple(other.partition(":")[::2]) for other in asked.parity.split(",")]
                found = parity(run, kinds)
            else:
                found = plain(run, name, those) if name in OTHERS else throughput(run, name, engine, those)
            for result in found:
                tell(result)
            del found
            gc.collect()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            tell({"finished": stage, "seconds": round(time.time() - started, 1)})
    # NCCL's own clean-up may wait for ranks that are gone.
    os._exit(0)


def launch(asked: argparse.Namespace, stages: list[str], folder: Path, take: Callable[[dict[str, Any]], None]) -> None:
    """Run the stages on one set of processes; start another for what is left when one fails."""
    for number in range(len(stages)):
        results, log = folder / f"results-{number}", folder / f"log-{number}"
        results.touch()
        command = [sys.executable, __file__, *sys.argv[1:], "--stages", ",".join(stages), "--results", str(results)]
        command += ["--rendezvous", str(folder / f"rendezvous-{number}"), "--ends-at", str(asked.ends_at)]
        processes = [start(command, rank, asked, log) for rank in range(asked.gpus)]
        begun, seen, heard_at = stages[0], 0, time.monotonic()
        while True:
            running = [process.poll() is None for process in processes]
            for line in results.read_text().splitlines(keepends=True)[seen:]:
                if not line.endswith("\n"):
                    break
                seen, heard_at, result = seen + 1, time.monotonic(), json.loads(line)
                begun = result.get("begun", begun)
                if "finished" in result:
                    stages = [stage for stage in stages if stage != result["finished"]]
                take(result)
            failed = any(process.poll() for process in processes) or time.monotonic() - heard_at > asked.silence_s
            if failed or not any(running):
                break
            time.sleep(0.2)
        for rank, process in enumerate(processes):
            if process.poll() is None and failed:
                ask_where(rank, process, log)
            if process.poll() is None:
                process.kill()
            process.wait()
        if not failed or not stages:
            return
        text = log.read_text(errors="replace")
        take({"failed": begun, "why": "out of memory" if "OutOfMemoryError" in text else text[-TEXT_TOLD:]})
        stages = [stage for stage in stages if stage != begun]
        if not stages or time.time() > asked.ends_at:
            return


def ask_where(rank: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Have a rank that hangs write into the log where its threads are."""
    with log.open("a") as output:
        output.write(f"rank {rank}:\n")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)


def start(command: list[str], rank: int, asked: argparse.Namespace, log: Path) -> subprocess.Popen[bytes]:
    environment = rank_environment(rank, asked.gpus, asked.device)
    with log.open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def missing(asked: argparse.Namespace) -> dict[str, str]:
    """Return the stages that cannot be run here, and why."""
    found = {}
    if importlib.util.find_spec("peft") is None:
        found |= dict.fromkeys(OTHERS, "peft is not installed")
    if importlib.util.find_spec("deepspeed") is None:
        found |= dict.fromkeys(("zero3_peft", "sharded:deepspeed", "hybrid:deepspeed"), "deepspeed is not installed")
    if asked.device == "cpu":
        found |= dict.fromkeys(("sharded:peer", "hybrid:peer"), "needs GPUs")
    if asked.gpus < 4 or asked.ranks_per_host in (None, asked.gpus):
        found |= dict.fromkeys(
            ("hybrid:deepspeed", "hybrid:fsdp2", "hybrid:peer"),
            "needs 4 GPUs at the least and --ranks-per-host below their number",
        )
    return found


def cells(text: str) -> list[Cell]:
    """Return the cells, those that need most memory last: a set of ranks whose memory runs out is lost."""
    found = [tuple(int(number) for number in cell.split("x")) for cell in text.split(",")]
    every = [(trials, batch, length) for trials, batch, length in found]
    return sorted(every, key=lambda cell: (cell[0], cell[1] * cell[2]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cells", type=cells, default=cells("8x1x256,8x2x256,8x4x256,8x8x256,8x2x1024,32x2x256"))
    parser.add_argument(
        "--stages", default=ALL, help="with cells of their own: whole@32x2x256+8x8x256, with room: sharded:peer+13"
    )
    parser.add_argument("--parity", default="replicated,sharded:deepspeed,sharded:fsdp2,sharded:peer")
    parser.add_argument("--backend", default="auto", help="alto_kernels' back end")
    parser.add_argument("--ranks-per-host", type=int, help="for hybrid: share the backbone among so many")
    parser.add_argument("--prefetch", type=int, help="gathers under way beforehand, else as many as the service has")
    parser.add_argument("--tokens-per-tick", type=int, default=8192)
    parser.add_argument("--single-trials", type=int, default=8, help="the most that one GPU has room for")
    parser.add_argument("--singles", choices=["all", "shares"], default="all", help="whole cells on one GPU too?")
    parser.add_argument("--plain-tokens", type=int, default=4096, help="the most that PEFT has room for on a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="after that no new cell is begun")
    parser.add_argument("--silence-s", type=float, default=120.0, help="a set of ranks silent for so long hangs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    parser.add_argument("--ends-at", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.results:
        run_rank(asked)
    if asked.device == "cuda" and torch.cuda.device_count() < asked.gpus:
        print(f"there are {torch.cuda.device_count()} GPUs here, not {asked.gpus}: give --gpus, or --device cpu")
        return 2
    asked.ends_at = time.time() + asked.budget_s
    absent = missing(asked)
    results: list[dict[str, Any]] = []

    def take(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(summary(asked, results, absent), indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        stages = [stage for stage in asked.stages.split(",") if stage.partition("@")[0].partition("+")[0] not in absent]
        launch(asked, stages, Path(folder), take)
    print(json.dumps(summary(asked, results, absent)))
    return 1 if any("failed" in result for result in results) else 0


def summary(asked: argparse.Namespace, results: list[dict[str, Any]], absent: dict[str, str]) -> dict[str, Any]:
    return {
        "benchmark": "multi_gpu",
        "command": " ".join(["python", "benchmarks/multi_gpu.py", *sys.argv[1:]]),
        "shape": asked.shape,
        "gpus": asked.gpus,
        "device": torch.cuda.get_device_name(0) if asked.device == "cuda" else f"cpu x{os.cpu_count()}",
        "torch": torch.__version__,
        "missing": absent,
        "ratios": ratios(results, asked.gpus),
        "results": [result for result in results if "begun" not in result],
    }


def ratios(results: list[dict[str, Any]], gpus: int) -> list[dict[str, Any]]:
    """Return what each cell gives: scaling over one GPU, sharded over replicated, and ours over the others."""
    speed: dict[tuple[str, Cell], float] = {}
    alone: defaultdict[Cell, list[float]] = defaultdict(list)  # each GPU
    for one in results:
        if "tokens_per_s" in one:
            name = f"{one['strategy']}:{one['engine']}" if one.get("engine") else one["strategy"]
            speed[name, tuple(one["cell"])] = one["tokens_per_s"]
            if name == "single":
                alone[tuple(one["cell"])].append(one["tokens_per_s"])
    all_alone = {cell: sum(speeds) / len(speeds) * gpus for cell, speeds in alone.items()}
    found = []
    for cell in dict.fromkeys(cell for name, cell in speed if name not in (*OTHERS, "single")):
        trials, batch, length = cell
        here = {name: value for (name, one), value in speed.items() if one == cell and name != "single"}
        row: dict[str, Any] = {"cell": cell}
        for name in here:
            rows = {
                "weak_scaling": all_alone.get((trials // gpus, batch, length)),
                "strong_scaling": all_alone.get(cell),
                "over_replicated": here.get("replicated"),
                "over_fsdp_peft": speed.get(("fsdp_peft", (1, batch, length))),
                "over_fsdp_peft_split": speed.get(("fsdp_peft", (1, batch // gpus, length))),
                "over_zero3_peft": speed.get(("zero3_peft", (1, batch, length))),
            }
            row[name] = {key: round(here[name] / base, 3) for key, base in rows.items() if base}
        found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
