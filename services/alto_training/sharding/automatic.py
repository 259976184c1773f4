"""Training on as many places as there are: in this process on one, else on worker ranks by the strategy that suits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from alto_common.tuning import TuningJob

from alto_training.executor.control import Control
from alto_training.executor.events import Event, Outcome, TaskProgress
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from alto_training.sharding.places import Places
from alto_training.sharding.run import RankedRun, RankSettings
from alto_training.sharding.strategy import (
    Strategy,
    StrategyRecords,
    backbone_bytes,
    choose_strategy,
    room_for_weights,
)

_BYTES_PER_WEIGHT = {BackboneDtype.FLOAT32: 4, BackboneDtype.BFLOAT16: 2}


def train(
    job: TuningJob,
    workdir: Path,
    events: Callable[[Event], None],
    settings: ExecutorSettings,
    control: Control | None,
    places: Places,
    records: StrategyRecords,
    strategy: Strategy | None = None,
    keep_open: Sequence[int] = (),
) -> Outcome:
    """Do what `Executor(job, workdir, events, settings, control).run()` does, on all places; one rank on each.

    Unless `strategy` says how, it is the fastest of those that fit, by `records`, to which this run's speed is added;
    and where it shares the backbone out, layers are kept whole as far as memory goes. A run that was stopped carries on
    with any strategy and number of places. Every rank inherits the descriptors `keep_open`: a lock on one of them lasts
    until the last rank is gone.
    """
    if places.count == 1:
        from alto_training.executor.executor import Executor

        return Executor(job, workdir, events, settings, control).run()
    chosen = strategy or automatic_strategy(job, settings, places, records)
    speed = 0.0

    def listen(event: Event) -> None:
        nonlocal speed
        if isinstance(event, TaskProgress):
            speed = event.tokens_per_s
        events(event)

    # Who asks for shares wants the memory; else it is for weights, as far as it goes.
    keeps_whole = chosen.shares_out and strategy is None
    room_bytes = room_for_weights(places.memory_bytes) if keeps_whole else 0
    how = RankSettings(places.count, chosen, room_for_weights_bytes=room_bytes, keep_open=tuple(keep_open))
    run = RankedRun(job, workdir, listen, settings, control, how)
    outcome = run.run_all()[0]
    # What shares alone reach says nothing of shares beside whole layers.
    is_as_chosen = strategy is None or not strategy.shares_out
    if speed > 0.0 and len(run.reports) == places.count and is_as_chosen:
        records.note(job.base_model, places.kind, places.count, chosen, speed)
    return outcome


def automatic_strategy(
    job: TuningJob, settings: ExecutorSettings, places: Places, records: StrategyRecords
) -> Strategy:
    """Return the strategy that `train` takes. Raises `StrategyError` when the backbone fits nowhere."""
    from alto_training.sharding.loading import local_folder

    if settings.backbone_dtype is BackboneDtype.NF4:
        return Strategy.REPLICATED  # shares are of dense weights
    size = backbone_bytes(local_folder(job.base_model), _BYTES_PER_WEIGHT[settings.backbone_dtype])
    measured = records.read(job.base_model, places.kind, places.count)
    return choose_strategy(places.count, places.count, size, places.memory_bytes, measured)
