"""How a backbone lies on several worker ranks, and which way to take: of those that fit, the fastest measured."""

from __future__ import annotations

import enum
import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alto_training.executor.durable_files import write_file
from alto_training.sharding.errors import StrategyError

WORKING_SHARE = 0.4  # of a rank's memory, for adapters and activations


class Strategy(enum.StrEnum):
    """Where the backbone's weights are.

    `single`: one rank. `replicated`: whole on each rank, which then exchange nothing but losses. `sharded`: in equal
    shares on all ranks. `hybrid`: in equal shares on the ranks of a host, and so on each host.
    """

    SINGLE = "single"
    REPLICATED = "replicated"
    SHARDED = "sharded"
    HYBRID = "hybrid"

    @property
    def shares_out(self) -> bool:
        """Whether no rank need hold the whole backbone."""
        return self in (Strategy.SHARDED, Strategy.HYBRID)


class EngineName(enum.StrEnum):
    """Who cuts and gathers a sharded backbone. `peer` needs CUDA and the build for it, and ranks that share a host."""

    DEEPSPEED = "deepspeed"
    FSDP2 = "fsdp2"
    PEER = "peer"


@dataclass(frozen=True)
class Layout:
    """A strategy on `ranks` worker ranks; a shared-out backbone lies on `shard_ranks` of them."""

    strategy: Strategy
    ranks: int
    shard_ranks: int

    def group_of(self, rank: int) -> range:
        """Return the ranks that share one copy of the backbone with `rank`."""
        first = rank - rank % self.shard_ranks
        return range(first, first + self.shard_ranks)


def make_layout(strategy: Strategy, ranks: int, ranks_per_host: int) -> Layout:
    """Return the layout of a strategy. Raises `StrategyError` where it does not fit the number of ranks."""
    if strategy is Strategy.SINGLE:
        if ranks != 1:
            raise StrategyError(f"strategy single is for one worker rank, not {ranks}", "choose another strategy")
        return Layout(strategy, 1, 1)
    if strategy is Strategy.REPLICATED:
        return Layout(strategy, ranks, 1)
    if strategy is Strategy.SHARDED:
        return Layout(strategy, ranks, ranks)
    if ranks % ranks_per_host:
        raise StrategyError(
            f"strategy hybrid needs hosts of equally many worker ranks, not {ranks} in groups of {ranks_per_host}",
            "choose strategy sharded",
        )
    return Layout(strategy, ranks, ranks_per_host)


def room_for_weights(memory_bytes: int) -> int:
    """Return what weights may take of a rank's memory; the rest is for adapters and activations."""
    return int(memory_bytes * (1.0 - WORKING_SHARE))


def choose_strategy(
    ranks: int,
    ranks_per_host: int,
    backbone_bytes: int,
    memory_bytes_per_rank: int,
    tokens_per_s: Mapping[Strategy, float],
) -> Strategy:
    """Return the fastest of the strategies that fit; one that was never measured comes after those that were.

    Unmeasured, less communication is taken for faster: replicated, hybrid, sharded. Raises `StrategyError` when not
    even shares on all ranks fit.
    """
    if ranks == 1:
        return Strategy.SINGLE
    room = room_for_weights(memory_bytes_per_rank)
    copies = {Strategy.REPLICATED: 1, Strategy.SHARDED: ranks}
    if 1 < ranks_per_host < ranks and ranks % ranks_per_host == 0:
        copies[Strategy.HYBRID] = ranks_per_host
    fitting = [strategy for strategy, shares in copies.items() if backbone_bytes / shares <= room]
    if not fitting:
        raise StrategyError(
            f"a backbone of {backbone_bytes / 2**30:.1f} GiB does not fit on {ranks} worker ranks of "
            f"{memory_bytes_per_rank / 2**30:.1f} GiB, of which {WORKING_SHARE:.0%} are for training",
            "use more GPUs, or a backbone in fewer bits",
        )
    return max(fitting, key=lambda one: (tokens_per_s.get(one, 0.0), -copies[one]))


class StrategyRecords:
    """Tokens per second of strategies that were run, in a JSON file, by backbone, device and number of ranks.

    Several processes may note at once: a lock beside the file lets one after the other.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, base_model: str, device_kind: str, ranks: int) -> dict[Strategy, float]:
        """Return what was measured for this combination."""
        found = self._read().get(_key(base_model, device_kind, ranks), {})
        return {Strategy(name): float(speed) for name, speed in found.items() if name in list(Strategy)}

    def note(self, base_model: str, device_kind: str, ranks: int, strategy: Strategy, tokens_per_s: float) -> None:
        """Note a measurement in place of an earlier one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._read()
            records.setdefault(_key(base_model, device_kind, ranks), {})[strategy.value] = tokens_per_s
            write_file(self._path, json.dumps(records, indent=1, sort_keys=True).encode())

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            records: Any = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return records if isinstance(records, dict) else {}


def _key(base_model: str, device_kind: str, ranks: int) -> str:
    return f"{base_model} {device_kind} x{ranks}"


def backbone_bytes(folder: Path, bytes_per_weight: int) -> int:
    """Return what a model folder's weights take in memory, from the headers of its safetensors files."""
    weights = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for extent in entry["shape"]:
                    size *= extent
                weights += size
    return weights * bytes_per_weight
