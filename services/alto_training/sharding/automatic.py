"""Training on as many places as there are: in this process on one, else on worker ranks by the strategy that suits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alto_common.tuning import TuningJob

from alto_training.executor.control import Control
from alto_training.executor.events import Event, Outcome, TaskProgress
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from alto_training.sharding.run import RankedRun, RankSettings
from alto_training.sharding.strategy import EngineName, Strategy, StrategyRecords, backbone_bytes, choose_strategy

_BYTES_PER_WEIGHT = {BackboneDtype.FLOAT32: 4, BackboneDtype.BFLOAT16: 2}


@dataclass(frozen=True)
class Places:
    """GPUs of one host (or shares of its CPUs) that an assignment has: their number, kind, and memory of each."""

    count: int
    kind: str
    memory_bytes: int


def train(
    job: TuningJob,
    workdir: Path,
    events: Callable[[Event], None],
    settings: ExecutorSettings,
    control: Control | None,
    places: Places,
    records: StrategyRecords,
    engine: EngineName = EngineName.DEEPSPEED,
) -> Outcome:
    """Do what `Executor(job, workdir, events, settings, control).run()` does, on all places; one rank on each.

    The strategy is the fastest of those that fit, by `records`, to which this run's speed is added. A run that was
    stopped carries on with any strategy and number of places.
    """
    if places.count == 1:
        from alto_training.executor.executor import Executor

        return Executor(job, workdir, events, settings, control).run()
    strategy = automatic_strategy(job, settings, places, records)
    speed = 0.0

    def listen(event: Event) -> None:
        nonlocal speed
        if isinstance(event, TaskProgress):
            speed = event.tokens_per_s
        events(event)

    run = RankedRun(job, workdir, listen, settings, control, RankSettings(places.count, strategy, engine))
    outcome = run.run_all()[0]
    if speed > 0.0 and len(run.reports) == places.count:
        records.note(job.base_model, places.kind, places.count, strategy, speed)
    return outcome


def automatic_strategy(
    job: TuningJob, settings: ExecutorSettings, places: Places, records: StrategyRecords
) -> Strategy:
    """Return the strategy that `train` takes. Raises `StrategyError` when the backbone fits nowhere."""
    from alto_training.sharding.loading import local_folder

    size = backbone_bytes(local_folder(job.base_model), _BYTES_PER_WEIGHT.get(settings.backbone_dtype, 1))
    measured = records.read(job.base_model, places.kind, places.count)
    return choose_strategy(places.count, places.count, size, places.memory_bytes, measured)
