"""What a worker rank is told when it starts, and what it leaves behind when it ends: JSON files in the run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from alto_common.tuning import TuningJob

from alto_training.executor.settings import ExecutorSettings
from alto_training.sharding.plain_json import decode, encode
from alto_training.sharding.strategy import EngineName, Strategy

ORDER_FILE = "order.json"
BEATS_FILE = "beats"
RENDEZVOUS_FILE = "rendezvous"


@dataclass(frozen=True)
class RankOrder:
    """The same for every rank. Rank 0 writes events to the descriptor `events_fd` and reads commands from its input.

    Without an `engine` ranks take the best that there is. `ranks_per_host` says how many share a host (or are to be
    treated so). A rank of a sharded backbone keeps decoder layers whole as far as its weights take no more than
    `room_for_weights_bytes`. A collective that takes longer than `collective_timeout_s` ends its rank. `count_traffic`
    has every collective counted, for measurements.
    """

    jobs: tuple[TuningJob, ...]
    workdir: Path
    settings: ExecutorSettings
    strategy: Strategy
    engine: EngineName | None
    ranks: int
    ranks_per_host: int
    parent_process_id: int
    collective_timeout_s: float = 1800.0
    room_for_weights_bytes: int = 0
    count_traffic: bool = False

    def write(self, folder: Path) -> None:
        """Write the order into the run's folder."""
        (folder / ORDER_FILE).write_text(json.dumps(encode(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> RankOrder:
        """Read the order of a run."""
        return decode(cls, json.loads((folder / ORDER_FILE).read_text()))


@dataclass(frozen=True)
class RankFailure:
    """Why a rank gave up: an `ExecutorError` by the name of its class; the tick's size where memory ran out."""

    kind: str
    message: str
    cure: str
    tokens_per_tick: int | None = None


@dataclass(frozen=True)
class RankReport:
    """What a rank measured: `gather_bytes` of a training pass and of one without gradients, 0 without sharding.

    `kept_bytes` is what it keeps of the backbone: its shares, and layers whole. Passes count those without work, which
    are `idle_passes` (in lock step they gather as others do), and those that were begun ahead and dropped; `moves` are
    trials that changed their rank. `traffic_calls` and `traffic_bytes` are by collective, empty when they were not
    counted. `memory_bytes` is the largest of the accelerator, or of the process on a CPU, `idle_memory_bytes` its
    anonymous memory before the backbone was loaded.
    """

    rank: int
    training_gather_bytes: int
    inference_gather_bytes: int
    kept_bytes: int
    backbone_bytes: int
    memory_bytes: int
    idle_memory_bytes: int
    training_passes: int
    inference_passes: int
    idle_passes: int
    moves: int
    traffic_calls: dict[str, int]
    traffic_bytes: dict[str, int]


def failure_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes why it gave up."""
    return folder / f"failure-{rank}.json"


def report_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes what it measured."""
    return folder / f"report-{rank}.json"
