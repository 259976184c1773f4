"""How many tokens a tick takes and how many adapters sit in slots, from what memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alto_common.base_models import ModelFacts
from alto_common.calibrations import CalibrationKey, load_calibration, shape_of
from alto_common.cost_model import (
    ENOUGH_GPU_TOKENS,
    CostModel,
    Load,
    adapter_parameters,
    enough_tokens,
    power_of_two_below,
    prior,
)
from alto_common.tuning import TrialConfig

from alto_training.executor.backbone import Backbone, layer_number
from alto_training.executor.settings import BackboneDtype, ExecutorSettings

_FLOPS_PER_S = {"cpu": 1e11, "cuda": 4e14}
_NF4_BYTES_PER_WEIGHT = 4.5 / 8
_SHARE_OF_FREE_MEMORY = 0.85
_UNKNOWN_MEMORY_BYTES = 4 * 2**30  # where the system does not tell


@dataclass(frozen=True)
class Budget:
    """What one executor may hold at a time."""

    tokens_per_tick: int
    slots: int
    spare_bytes: int = 0  # beside full ticks and the adapters of all trials


def choose_budget(
    settings: ExecutorSettings,
    facts: ModelFacts,
    costs: CostModel,
    configs: Sequence[TrialConfig],
    backbone_loaded: bool = True,
) -> Budget:
    """Return the settings' own numbers where given, else the most that memory allows by the cost model.

    Tokens come first, up to where more would not be faster; then as many slots as fit beside them, one at the least.
    But what a narrow backbone's ticks may have beyond others' is not taken from slots.
    """
    device = torch.device(settings.device)
    known = [config for config in configs if adapter_parameters(facts, config) > 0] or list(configs)
    costliest = max(known, key=lambda config: adapter_parameters(facts, config))
    limit = memory_limit_bytes(settings, facts, backbone_loaded)
    parameters = [adapter_parameters(facts, config) for config in configs]

    def slots_beside(tokens: int) -> int:
        return settings.slots or costs.slots_that_fit(limit, Load.of(facts, [(costliest, tokens)]), parameters)

    tokens = settings.tokens_per_tick
    if tokens is None:
        each = Load.of(facts, [(costliest, 1.0)])
        fitting_tokens = costs.tokens_that_fit(limit, each, adapter_parameters(facts, costliest))
        # A power of two: free memory is never twice the same, and two runs should have the same ticks.
        tokens = min(enough_tokens(device.type == "cpu", facts.hidden_size), power_of_two_below(fitting_tokens))
        while tokens > ENOUGH_GPU_TOKENS and slots_beside(tokens) < slots_beside(ENOUGH_GPU_TOKENS):
            tokens //= 2
    tokens = max(1, tokens)
    slots = slots_beside(tokens)
    full_tick = Load.of(facts, [(costliest, tokens)])
    spare_bytes = max(0, int(limit - costs.peak_bytes(full_tick, sum(parameters))))
    return Budget(tokens, max(1, min(slots, len(configs))), spare_bytes)


def memory_limit_bytes(settings: ExecutorSettings, facts: ModelFacts, backbone_loaded: bool = True) -> int:
    """Return the memory that an executor may use, its backbone included: as set, else most of what is free."""
    if settings.memory_limit_bytes is not None:
        return settings.memory_limit_bytes
    free = free_memory_bytes(torch.device(settings.device)) * _SHARE_OF_FREE_MEMORY
    # What is free is free beside the backbone.
    return int(free + (backbone_bytes(settings, facts) if backbone_loaded else 0))


def backbone_facts(backbone: Backbone) -> ModelFacts:
    """Return what the cost model asks of a loaded backbone."""
    numbers = {number for layer in backbone.layers if (number := layer_number(layer.path)) is not None}
    config: Any = backbone.decoder.config
    return ModelFacts(
        architecture=type(backbone.decoder).__name__,
        hidden_size=backbone.layers[0].frozen.in_features,
        layers=len(numbers),
        vocabulary=int(config.get_text_config().vocab_size),
        context_length=backbone.context_length,
        parameters=backbone.parameters,
        bytes=backbone.parameters * backbone.dtype.itemsize,
        linear_modules={layer.path: (layer.frozen.in_features, layer.frozen.out_features) for layer in backbone.layers},
        has_chat_template=False,
        tokenizer_vocabulary=0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def calibration_key(settings: ExecutorSettings, facts: ModelFacts) -> CalibrationKey:
    """Return what a measured cost model of this backbone on this device is kept under."""
    device = torch.device(settings.device)
    on_cpu = device.type == "cpu"
    kind = "cpu" if on_cpu else torch.cuda.get_device_name(device)
    threads = (settings.threads or torch.get_num_threads()) if on_cpu else 0
    return CalibrationKey(shape_of(facts), kind, threads, settings.backbone_dtype, settings.recompute, settings.backend)


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device; on a CPU what this machine or container gives without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([*_machine_memory(), *_container_memory()], default=_UNKNOWN_MEMORY_BYTES)


def _machine_memory() -> list[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _container_memory() -> list[int]:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
        return [int(limit) - int(used)]
    except (OSError, ValueError):  # no control group, or the limit is "max"
        return []


def known_costs(settings: ExecutorSettings, facts: ModelFacts) -> CostModel | None:
    """Return what was measured for this backbone on this device, None if nothing was."""
    folder = settings.calibrations or settings.cache_dir
    return load_calibration(folder, calibration_key(settings, facts)) if folder else None


def prior_costs(settings: ExecutorSettings, facts: ModelFacts) -> CostModel:
    """Return the cost model of a backbone before anything was measured."""
    flops_per_s = _FLOPS_PER_S[torch.device(settings.device).type]
    return prior(facts, _bytes_per_value(settings), flops_per_s, backbone_bytes(settings, facts))


def backbone_bytes(settings: ExecutorSettings, facts: ModelFacts) -> float:
    """Return what the frozen weights take while they are trained over; in NF4 linear layers alone are in 4 bits."""
    in_nf4 = settings.backbone_dtype is BackboneDtype.NF4
    linear = sum(width_in * width_out for width_in, width_out in facts.linear_modules.values()) if in_nf4 else 0
    return linear * _NF4_BYTES_PER_WEIGHT + (facts.parameters - linear) * _bytes_per_value(settings)


def _bytes_per_value(settings: ExecutorSettings) -> int:
    """Return the bytes of a dense weight and of an activation; NF4 computes in fp32 on a CPU, else in bf16."""
    if settings.backbone_dtype is BackboneDtype.NF4:
        return 4 if torch.device(settings.device).type == "cpu" else 2
    return 4 if settings.backbone_dtype is BackboneDtype.FLOAT32 else 2
