"""Gathers of a sharded backbone alone and beside computation: how fast each engine brings layers to every rank.

    make bench NAME=gathers ARGS="--gpus 4"
    python benchmarks/gathers.py --gpus 3 --device cpu --engines fsdp2 --layer-mb 2 --rows 0,64      # a dry run

Every rank gathers `--gathers` layers of `--layer-mb`, one ahead, as a pass does, and uses each for `--products` matrix
products of ROWS x 4096 x 4096 (`--rows`; 0: none). With `--skews` rank r begins r x SKEW products of 1,024 rows after
rank 0, so that ranks come to the same GPUs at different times. `ms` is the slowest rank's, the median of `--rounds`,
`gb_per_s` what comes from others meanwhile, `products_ms` what the products take alone. Engine `peer:at-will` is `peer`
without turns. What is gathered is compared with what was cut, once for each engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from benchmark_ranks import finished, join, rank_environment

WIDTH = 4096  # of the products, and the input features of a layer
LAYERS = 8  # that ranks hold, used in turn
SKEW_ROWS = 1024


class Rank:
    """One of the processes: its device, and the group that tells times."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.device = join(asked.device, asked.rendezvous)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.clocks = dist.new_group(backend="gloo")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.weight = torch.randn(WIDTH, WIDTH, device=self.device, dtype=dtype)
        self.inputs = {rows: torch.randn(rows, WIDTH, device=self.device, dtype=dtype) for rows in asked.rows if rows}
        self.skewed = torch.randn(SKEW_ROWS, WIDTH, device=self.device, dtype=dtype)

    def multiply(self, rows: int, products: int) -> None:
        """Launch matrix products of so many rows, none without rows."""
        for _ in range(products if rows else 0):
            torch.mm(self.inputs[rows], self.weight)

    def slowest_ms(self, rounds: int, skew: int, work: Callable[[], None]) -> float:
        """Return the median over rounds of what `work` takes the slowest rank, the first round left out."""
        found = []
        for _ in range(rounds + 1):
            finished(self.device)
            dist.barrier(self.clocks)
            for _ in range(skew * self.rank):
                torch.mm(self.skewed, self.weight)
            began = finished(self.device)
            work()
            mine = torch.tensor(finished(self.device) - began)
            dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.clocks)
            found.append(1e3 * mine.item())
        return round(statistics.median(found[1:]), 2)


def make_engine(name: str, device: torch.device) -> Any:
    from alto_training.sharding import loading
    from alto_training.sharding.strategy import EngineName

    group = dist.new_group()
    if name != "peer:at-will":
        return loading.make_engine(EngineName(name), group, device)

    from alto_training.sharding.peer_units import PeerEngine

    class AtWill(PeerEngine):
        """Reads when it comes, whoever reads from there."""

        def _share_busy(self) -> list[torch.Tensor]:
            return []

    return AtWill(group, device)


def make_layers(engine: Any, rank: Rank, layer_bytes: int) -> tuple[list[Any], bool]:
    """Return units of one layer each, and whether a gather brings back what was cut."""
    units, right = [], True
    for number in range(LAYERS):
        draws = torch.Generator(device=rank.device).manual_seed(number)
        width = layer_bytes // (WIDTH * rank.weight.element_size())
        layer = nn.Linear(WIDTH, width, bias=False, device=rank.device, dtype=rank.weight.dtype)
        with torch.no_grad():
            layer.weight.normal_(generator=draws)
        expected = layer.weight.detach().sum(dtype=torch.float64).item()
        layer.requires_grad_(False)
        unit = engine.shard(f"layer {number}", nn.Sequential(layer))
        unit.start()
        unit.finish()
        right &= layer.weight.detach().sum(dtype=torch.float64).item() == expected
        unit.release()
        units.append(unit)
    return units, right


def gather(units: list[Any], count: int, use: Callable[[], None]) -> None:
    """Gather and use `count` layers in turn, the next one under way beforehand."""
    units[0].start()
    for position in range(count):
        if position + 1 < count:
            units[(position + 1) % len(units)].start()
        unit = units[position % len(units)]
        unit.finish()
        use()
        unit.release()


def results(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rank = Rank(asked)
    layer_bytes = int(asked.layer_mb * 1e6)
    for name in asked.engines.split(","):
        units, right = make_layers(make_engine(name, rank.device), rank, layer_bytes)
        for rows in asked.rows:
            use = partial(rank.multiply, rows, asked.products)
            alone = rank.slowest_ms(asked.rounds, 0, partial(rank.multiply, rows, asked.products * asked.gathers))
            for skew in asked.skews:
                ms = rank.slowest_ms(asked.rounds, skew, partial(gather, units, asked.gathers, use))
                others = asked.gathers * units[0].gathered_bytes * (rank.ranks - 1) / rank.ranks
                yield {
                    "engine": name,
                    "rows": rows,
                    "skew": skew,
                    "ms": ms,
                    "gb_per_s": round(others / ms / 1e6, 1),
                    "products_ms": alone,
                    "right": right,
                }


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--engines", default="peer:at-will,peer,fsdp2")
    parser.add_argument("--layer-mb", type=float, default=436.0, help="of a layer, in 10^6 bytes")
    parser.add_argument("--gathers", type=int, default=62)
    parser.add_argument("--rows", type=numbers, default=[0, 512, 1024, 2048])
    parser.add_argument("--products", type=int, default=14)
    parser.add_argument("--skews", type=numbers, default=[0, 17])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rendezvous:
        for result in results(asked):
            if int(os.environ["RANK"]) == 0:
                print(json.dumps(result), flush=True)
        sys.stdout.flush()
        os._exit(0)  # NCCL's own clean-up may wait for ranks that are gone
    if asked.device == "cuda" and torch.cuda.device_count() < asked.gpus:
        print(f"there are {torch.cuda.device_count()} GPUs here, not {asked.gpus}: give --gpus, or --device cpu")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--rendezvous", str(Path(folder) / "rendezvous")]
        first, *others = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, asked.gpus, asked.device),
                stdout=None if rank else subprocess.PIPE,
                text=True,
            )
            for rank in range(asked.gpus)
        ]
        found = []
        assert first.stdout is not None
        for line in first.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                found.append(json.loads(line))
        statuses = [process.wait() for process in (first, *others)]
    if asked.output:
        summary = {
            "benchmark": "gathers",
            "command": " ".join(["python", "benchmarks/gathers.py", *sys.argv[1:]]).split(" --output")[0],
            "gpus": asked.gpus,
            "device": torch.cuda.get_device_name(0) if asked.device == "cuda" else f"cpu x{os.cpu_count()}",
            "torch": torch.__version__,
            "results": found,
        }
        asked.output.write_text(json.dumps(summary, indent=1) + "\n")
    return max(statuses, key=abs) or int(not all(result["right"] for result in found))


if __name__ == "__main__":
    sys.exit(main())
