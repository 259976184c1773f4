"""Measuring what ticks cost on this device, by a short profile over made-up tokens; kept for the next run."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from alto_common.base_models import ModelFacts
from alto_common.calibrations import save_calibration
from alto_common.cost_model import CostModel, Load, Measurement, adapter_parameters, enough_tokens, fit
from alto_common.tuning import TrialConfig

from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.budget import (
    backbone_facts,
    calibration_key,
    known_costs,
    prior_costs,
)
from alto_training.executor.optimizer import adapter_step, take_steps
from alto_training.executor.progress import peak_memory_bytes
from alto_training.executor.settings import ExecutorSettings
from alto_training.executor.tick import Item, PackedSequence, Share

# Most adapters on a tick of the profile: the back end must have as many seats.
PROFILE_SEATS = 3
_WIDE_RANK = 64
_SMALL = TrialConfig(lora_rank=8)
_WIDE = TrialConfig(lora_rank=_WIDE_RANK)


@dataclass(frozen=True)
class _Probe:
    """One tick of the profile: a part of the most tokens, in sequences of a length, with a share of targets."""

    adapters: tuple[TrialConfig, ...]
    part: float
    length: int = 128
    target_share: float = 0.5
    is_evaluation: bool = False


def profile(facts: ModelFacts) -> list[_Probe]:
    """Return the ticks to measure: each coefficient of the cost model is seen at two sizes at least.

    Evaluations come first, as a run begins with the base model's: training leaves gaps in the heap, in which what comes
    after it hides.
    """
    first = next(iter(facts.linear_modules))
    partial = dataclasses.replace(_SMALL, target_modules=(first,))
    length = min(512, facts.context_length)
    return [
        _Probe((_SMALL,), 0.5, is_evaluation=True),
        _Probe((_SMALL,), 1.0, is_evaluation=True),
        _Probe((_SMALL,), 0.25),
        _Probe((_SMALL,), 1.0),
        _Probe((_SMALL,), 0.5, length=length),
        _Probe((_SMALL,), 0.5, target_share=1.0),
        _Probe((partial,), 0.5),
        _Probe((_WIDE, _WIDE, _SMALL), 0.25),
        _Probe((_WIDE, _WIDE, _SMALL), 0.75),
    ]


def costs_of(settings: ExecutorSettings, backbone: Backbone, may_measure: bool) -> CostModel:
    """Return what ticks cost: as measured before, or now if the settings ask for it, else as the model's shape says."""
    facts = backbone_facts(backbone)
    known = known_costs(settings, facts)
    if known is not None:
        return known
    folder = settings.calibrations or settings.cache_dir
    asked = backbone.device.type == "cuda" if settings.calibrate is None else settings.calibrate
    if folder is None or not asked or not may_measure:
        return prior_costs(settings, facts)
    backbone.use_backend(
        choose_backend(settings.backend, backbone.layers, PROFILE_SEATS, backbone.device, backbone.dtype)
    )
    most_tokens = enough_tokens(backbone.device.type == "cpu", facts.hidden_size)
    return calibrate(settings, backbone, most_tokens, folder)


def calibrate(
    settings: ExecutorSettings,
    backbone: Backbone,
    most_tokens: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
    start_seconds: float | None = None,
) -> CostModel:
    """Return the measured cost model of ticks with up to `most_tokens` tokens, and keep it in `folder`.

    Takes a dozen ticks of training, with fewer tokens if memory runs out. The backbone's back end is the one it has.
    `start_seconds` is what passed until the backbone was loaded, where the caller knows.
    """
    facts = backbone_facts(backbone)
    loading_bytes = float(_peak(backbone))
    while True:
        try:
            measurements = [_measure(backbone, facts, probe, most_tokens, clock) for probe in profile(facts)]
        except passes.TickTooLargeError:
            if most_tokens < 8:
                raise
            most_tokens //= 2
            continue
        model = dataclasses.replace(fit(prior_costs(settings, facts), measurements), loading_bytes=loading_bytes)
        if start_seconds is not None:
            model = dataclasses.replace(model, start_seconds=start_seconds)
        # A cache: a folder that cannot be written costs the next run a minute, not this run its life.
        with suppress(OSError):
            save_calibration(folder, calibration_key(settings, facts), model)
        return model


def _measure(
    backbone: Backbone, facts: ModelFacts, probe: _Probe, most_tokens: int, clock: Callable[[], float]
) -> Measurement:
    """Run a tick twice: the time is their mean, for a run meets fresh memory too; the peak is that of both."""
    tokens = max(2, int(probe.part * most_tokens / len(probe.adapters)))
    adapters, shares = [], []
    for seed, config in enumerate(probe.adapters):
        adapter = Adapter(backbone.adapted_modules(config), config.lora_rank, config.scaling)
        adapter.initialise(seed, backbone.device)
        adapters.append((adapter, config, adapter.weights_on_host()))  # a run keeps its best weights too
        shares.append(Share(adapter, _items(tokens, probe), batch_denominator=float(tokens), begins_batch=True))
    every_token = sum(item.tokens for share in shares for item in share.items)

    def train() -> None:
        losses = passes.train_tick(backbone, passes.lay_out(backbone, shares))
        steps = [adapter_step(adapter, config, 0, 0.0) for adapter, config, _ in adapters]
        take_steps(list(zip(steps, losses, strict=True)))

    def evaluate() -> None:
        passes.item_losses(backbone, shares, every_token)

    if probe.is_evaluation:  # moments and gradients that a trial has when it is evaluated
        for adapter, _, _ in adapters:
            for buffer in adapter.buffers.values():
                buffer.add_(0.0)
    _reset_peak(backbone.device)
    run = evaluate if probe.is_evaluation else train
    seconds = sum(_seconds(run, backbone.device, clock) for _ in range(2)) / 2
    pairs = [(config, float(tokens)) for config in probe.adapters]
    load = Load.of(facts, pairs, float(min(probe.length, tokens)), probe.target_share)
    parameters = sum(adapter_parameters(facts, config) for config in probe.adapters)
    return Measurement(load, parameters, float(_peak(backbone)), seconds, probe.is_evaluation)


def _items(tokens: int, probe: _Probe) -> list[Item]:
    items = []
    while tokens > 0:
        places = np.arange(min(tokens, probe.length))
        ids = (places % 2).astype(np.int32)
        items.append(Item((PackedSequence(ids, places >= math.ceil(len(ids) * (1.0 - probe.target_share))),), 1))
        tokens -= len(ids)
    return items


def _seconds(run: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return  # not this kind of system: the peak is that of the process's whole life


def _peak(backbone: Backbone) -> int:
    if backbone.device.type != "cuda":
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            pass
    return peak_memory_bytes(backbone)
