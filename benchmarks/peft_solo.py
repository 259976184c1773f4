"""One trial alone, the way everybody does it: PEFT, torch.optim.AdamW, clip_grad_norm_, padded batches, full logits.

The judge of the executor's numbers: it shares with it the data order, the initial weights and, for dropout, the masks,
and no code of its forward pass, loss or optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from alto_common.tuning import ALL_LINEAR, Objective, ObjectiveKind, TrialConfig
from alto_kernels.reference import keep_mask
from alto_training.executor.adapter import AdaptedModule, Adapter
from alto_training.executor.randomness import DataOrder, dropout_row_keys
from torch.nn.functional import cross_entropy, logsigmoid


@dataclass
class SoloResult:
    """What a trial alone became: final A and B by module path, and the loss of each effective batch."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0


def train_alone(
    model: Any,
    data: Any,
    config: TrialConfig,
    objective: Objective | None = None,
    total_steps: int | None = None,
    initial: Callable[[Adapter], None] | None = None,
) -> SoloResult:
    """Train `config` over `model` (changed in place) for its steps; `initial` sets the first weights otherwise."""
    from peft import LoraConfig, get_peft_model

    objective = objective or Objective()
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=_targets(model, config),
            layers_to_transform=None if config.layers is None else list(config.layers),
            task_type="CAUSAL_LM",
        ),
    )
    layers = _lora_layers(peft_model)
    _set_initial_weights(layers, config, initial)
    masks = _share_dropout_masks(peft_model, layers, config)
    peft_model.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [layer.lora_A["default"].weight for layer in layers.values()], "scale": 1.0},
            {"params": [layer.lora_B["default"].weight for layer in layers.values()], "scale": config.lora_plus_ratio},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = config.total_steps(len(data))
    items = config.max_steps * config.effective_batch_size if config.max_steps else math.ceil(len(data) * config.epochs)
    order = DataOrder(len(data), config.seed)
    result = SoloResult({})
    for step in range(min(steps, total_steps or steps)):
        positions = range(step * config.effective_batch_size, min((step + 1) * config.effective_batch_size, items))
        micro_batches = [
            positions[start : start + config.batch_size] for start in range(0, len(positions), config.batch_size)
        ]
        denominator = _denominator(data, order, positions, config, objective)
        loss = 0.0
        for micro_batch in micro_batches:
            masks.positions = list(micro_batch)
            rows = [order.row(position) for position in micro_batch]
            part = _loss(peft_model, data, rows, config, objective, masks) / denominator
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        result.tokens += sum(_tokens(data, order.row(position), config, objective) for position in positions)
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.schedule.multiplier(step, steps) * group["scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result.losses.append(loss)
    for path, layer in layers.items():
        result.matrices[path] = (
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
        )
    return result


def _targets(model: Any, config: TrialConfig) -> str | list[str]:
    if ALL_LINEAR not in config.target_modules:
        return list(config.target_modules)
    if config.layers is None:
        return ALL_LINEAR
    # PEFT takes a subset of the layers only beside names.
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names - {"lm_head"})


def _lora_layers(peft_model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in peft_model.named_modules() if hasattr(module, "lora_A")
    }


def _set_initial_weights(
    layers: dict[str, Any], config: TrialConfig, initial: Callable[[Adapter], None] | None
) -> None:
    modules = [
        AdaptedModule(index, path, layer.in_features, layer.out_features)
        for index, (path, layer) in enumerate(layers.items())
    ]
    adapter = Adapter(modules, config.lora_rank, config.scaling)
    if initial is None:
        adapter.initialise(config.seed)
    else:
        initial(adapter)
    with torch.no_grad():
        for path, (a_RK, b_NR) in adapter.matrices(adapter.param).items():
            layers[path].lora_A["default"].weight.copy_(a_RK)
            layers[path].lora_B["default"].weight.copy_(b_NR)


@dataclass
class _Masks:
    """Which sequences the next forward pass holds, for those who need their dropout masks."""

    positions: list[int] = field(default_factory=list)
    stream_keys: list[int] = field(default_factory=list)
    padded_length: int = 0


class _SharedDropout(torch.nn.Module):
    """Dropout with the executor's masks: by seed, place in the stream, token position and module."""

    def __init__(self, masks: _Masks, index: int, config: TrialConfig) -> None:
        super().__init__()
        self._masks, self._index, self._config = masks, index, config

    def forward(self, x_BLK: torch.Tensor) -> torch.Tensor:
        batch, length, features = x_BLK.shape
        keys = dropout_row_keys(self._config.seed, self._masks.stream_keys, [length] * batch)
        keep = keep_mask(keys, self._index, features, self._config.lora_dropout).view(x_BLK.shape)
        return x_BLK * keep / (1.0 - self._config.lora_dropout)


def _share_dropout_masks(peft_model: Any, layers: dict[str, Any], config: TrialConfig) -> _Masks:
    masks = _Masks()
    if config.lora_dropout > 0:
        every_linear = [
            name.removeprefix("base_model.model.").removesuffix(".base_layer")
            for name, module in peft_model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
        ]
        for path, layer in layers.items():
            layer.lora_dropout["default"] = _SharedDropout(masks, every_linear.index(path), config)
    return masks


def _loss(
    peft_model: Any, data: Any, rows: Sequence[int], config: TrialConfig, objective: Objective, masks: _Masks
) -> torch.Tensor:
    if objective.kind is ObjectiveKind.DPO:
        pairs = [data.preference(row, config.max_length) for row in rows]
        examples = [example for pair in pairs for example in pair]
        masks.stream_keys = [2 * position + side for position in masks.positions for side in (0, 1)]
        with torch.no_grad(), peft_model.disable_adapter():
            reference_S = _sequence_nll(peft_model, examples)
        gain_S = reference_S - _sequence_nll(peft_model, examples)
        return -logsigmoid(objective.dpo_beta * (gain_S[0::2] - gain_S[1::2])).sum()
    masks.stream_keys = list(masks.positions)
    return _sequence_nll(peft_model, [data.example(row, config.max_length) for row in rows]).sum()


def _sequence_nll(model: Any, examples: Sequence[Any]) -> torch.Tensor:
    longest = max(len(example.input_ids) for example in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    labels = np.full((len(examples), longest), -100)
    attention = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        attention[row, :length] = 1
        labels[row, :length] = np.where(example.target_mask, example.input_ids, -100)
    device = next(model.parameters()).device
    ids_BL, labels_BL, attention_BL = (torch.from_numpy(array).to(device) for array in (ids, labels, attention))
    logits = model(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False).logits.float()
    nll_BL = cross_entropy(logits[:, :-1].transpose(1, 2), labels_BL[:, 1:], ignore_index=-100, reduction="none")
    return nll_BL.double().sum(dim=1)


def _denominator(
    data: Any, order: DataOrder, positions: Sequence[int], config: TrialConfig, objective: Objective
) -> float:
    if objective.kind is ObjectiveKind.DPO:
        return float(len(positions))
    targets = (data.example(order.row(position), config.max_length).target_mask[1:].sum() for position in positions)
    return float(max(1, sum(targets)))


def _tokens(data: Any, row: int, config: TrialConfig, objective: Objective) -> int:
    if objective.kind is ObjectiveKind.DPO:
        return sum(len(example.input_ids) for example in data.preference(row, config.max_length))
    return len(data.example(row, config.max_length).input_ids)
