"""Measuring what ticks cost on this device, by a short profile over made-up tokens; kept for the next run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from alto_common.tuning import TrialConfig

from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone
from alto_training.executor.budget import backbone_facts, calibration_key, prior_cost_model
from alto_training.executor.memory_model import (
    CostModel,
    Load,
    Measurement,
    adapter_parameters,
    fit,
    save_calibration,
)
from alto_training.executor.optimizer import adamw_step, gradient_norm
from alto_training.executor.progress import peak_memory_bytes
from alto_training.executor.settings import ExecutorSettings
from alto_training.executor.tick import Item, PackedSequence, Share

_SEQUENCE_TOKENS = 128
_REPETITIONS = 2
_MOST_ADAPTERS = 8


def calibrate(
    settings: ExecutorSettings, backbone: Backbone, configs: Sequence[TrialConfig], most_tokens: int, folder: Path
) -> CostModel:
    """Return the measured cost model of ticks with up to `most_tokens` tokens, and keep it in `folder`.

    Takes a dozen ticks of training, with fewer tokens if memory runs out. The backbone's back end is the one it has.
    """
    while True:
        try:
            model = fit(prior_cost_model(backbone), _profile(backbone, configs, most_tokens))
        except passes.TickTooLargeError:
            if most_tokens < 8:
                raise
            most_tokens //= 2
            continue
        save_calibration(folder, calibration_key(settings, backbone), model)
        return model


def _profile(backbone: Backbone, configs: Sequence[TrialConfig], most_tokens: int) -> list[Measurement]:
    facts = backbone_facts(backbone)
    smallest = min(configs, key=lambda config: adapter_parameters(facts, config))
    measurements = []
    for tokens in (most_tokens // 4, most_tokens // 2, most_tokens):
        for mix in ([smallest], list(configs)[:_MOST_ADAPTERS]):
            pairs = [(config, max(1, tokens // len(mix))) for config in mix]
            measurements.append(_measure(backbone, Load.of(facts, pairs), pairs, is_evaluation=False))
        measurements.append(_measure(backbone, Load.of(facts, pairs), pairs, is_evaluation=True))
    return measurements


def _measure(
    backbone: Backbone, load: Load, pairs: Sequence[tuple[TrialConfig, int]], is_evaluation: bool
) -> Measurement:
    """Run ticks of this load; the time is that of the best, the peak that of all."""
    adapters, shares = [], []
    for seed, (config, tokens) in enumerate(pairs):
        adapter = Adapter(backbone.adapted_modules(config), config.lora_rank, config.scaling)
        adapter.initialise(seed)
        adapter.move(backbone.device)
        adapters.append((adapter, config, adapter.weights_on_host()))  # a run keeps its best weights too
        shares.append(Share(adapter, _items(tokens), batch_denominator=float(tokens)))
    evaluated = sum(item.tokens for share in shares for item in share.items)

    def train() -> None:
        passes.train_tick(backbone, shares)
        for adapter, config, _ in adapters:
            adamw_step(adapter, config, 0, 0.0, gradient_norm(adapter))

    def evaluate() -> None:
        passes.item_losses(backbone, shares, evaluated)

    _reset_peak(backbone.device)
    run = evaluate if is_evaluation else train
    seconds = min(_seconds(run, backbone.device) for _ in range(_REPETITIONS))
    return Measurement(load, float(_peak(backbone.device)), seconds, is_evaluation)


def _items(tokens: int) -> list[Item]:
    items = []
    while tokens > 0:
        places = np.arange(min(tokens, _SEQUENCE_TOKENS))
        ids = (places % 2).astype(np.int32)
        items.append(Item((PackedSequence(ids, places > len(ids) // 2),), denominator=1))
        tokens -= len(ids)
    return items


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


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


def _peak(device: torch.device) -> int:
    if device.type != "cuda":
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            pass
    return peak_memory_bytes(device)
