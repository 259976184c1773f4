"""How many tokens a tick takes and how many adapters sit in slots, from what memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from alto_common.base_models import ModelFacts
from alto_common.tuning import TrialConfig

from alto_training.executor.backbone import Backbone, layer_number
from alto_training.executor.memory_model import (
    CalibrationKey,
    CostModel,
    Load,
    adapter_parameters,
    load_calibration,
    prior,
)
from alto_training.executor.settings import ExecutorSettings

# More tokens on a tick make it no faster: matrix products are at their best speed.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 8192}
_FLOPS_PER_S = {"cpu": 1e11, "cuda": 4e14}
_SHARE_OF_FREE_MEMORY = 0.85
_UNKNOWN_MEMORY_BYTES = 4 * 2**30  # where the system does not tell


@dataclass(frozen=True)
class Budget:
    """What one executor may hold at a time."""

    tokens_per_tick: int
    slots: int


def choose_budget(
    settings: ExecutorSettings, backbone: Backbone, configs: Sequence[TrialConfig], calibrations: Path | None
) -> Budget:
    """Return the settings' own numbers where given, else the most that memory allows.

    Tokens come first, up to where more would not be faster; then as many slots as fit beside them, one at the least.
    `calibrations` is the folder of measured cost models; without one for this model and device the prior is taken.
    """
    facts = backbone_facts(backbone)
    known = [config for config in configs if adapter_parameters(facts, config) > 0] or list(configs)
    known_costs = load_calibration(calibrations, calibration_key(settings, backbone)) if calibrations else None
    model = known_costs or prior_cost_model(backbone)
    limit = settings.memory_limit_bytes or free_memory_bytes(backbone.device) * _SHARE_OF_FREE_MEMORY
    if settings.memory_limit_bytes is None:
        # What is free is free beside the backbone, which is loaded.
        limit += facts.parameters * _bytes_per_value(backbone)
    largest = max(known, key=lambda config: adapter_parameters(facts, config))
    enough = enough_tokens(backbone.device)
    tokens = settings.tokens_per_tick or min(enough, model.tokens_that_fit(limit, Load.of(facts, [(largest, enough)])))
    tokens = max(1, tokens)
    fitting = model.slots_that_fit(
        limit,
        tokens,
        [adapter_parameters(facts, config) for config in configs],
        max(config.lora_rank for config in configs),
    )
    slots = settings.slots or fitting
    return Budget(tokens, max(1, min(slots, len(configs))))


def enough_tokens(device: torch.device) -> int:
    """Return the tokens of a tick above which it gets no faster."""
    return _ENOUGH_TOKENS[device.type]


def backbone_facts(backbone: Backbone) -> ModelFacts:
    """Return what the cost model asks of a loaded backbone."""
    numbers = {number for layer in backbone.layers if (number := layer_number(layer.path)) is not None}
    return ModelFacts(
        architecture=type(backbone.decoder).__name__,
        hidden_size=backbone.layers[0].frozen.in_features,
        layers=len(numbers),
        vocabulary=0,
        context_length=backbone.context_length,
        parameters=backbone.parameters,
        bytes=backbone.parameters * _bytes_per_value(backbone),
        linear_modules={layer.path: (layer.frozen.in_features, layer.frozen.out_features) for layer in backbone.layers},
        has_chat_template=False,
        tokenizer_vocabulary=0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def calibration_key(settings: ExecutorSettings, backbone: Backbone) -> CalibrationKey:
    """Return what a measured cost model of this backbone on this device is kept under."""
    kind = torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else "cpu"
    return CalibrationKey(backbone.fingerprint, kind, settings.backbone_dtype, settings.recompute)


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


def prior_cost_model(backbone: Backbone) -> CostModel:
    """Return the cost model of a backbone before anything was measured."""
    return prior(backbone_facts(backbone), _bytes_per_value(backbone), _FLOPS_PER_S[backbone.device.type])


def _bytes_per_value(backbone: Backbone) -> int:
    return backbone.dtype.itemsize
