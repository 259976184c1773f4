"""The one home of the PEFT adapter format: safetensors and adapter_config.json, written atomically, read back checked.

A folder holds adapter_model.safetensors, adapter_config.json (both as peft 0.21 writes them, so that
PeftModel.from_pretrained and vLLM load it) and alto.json: sha256 and where the adapter comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import TrialConfig

from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, layer_number
from alto_training.executor.durable_files import replace_folder, sha256_of, write_file
from alto_training.executor.errors import AdapterFormatError, WrongBaseModelError

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
MANIFEST_NAME = "alto.json"
_PREFIX = "base_model.model."
# Fields of PEFT's configuration that, when set, make an adapter more than B A x: what they add would be lost.
_BEYOND_LORA = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)
# Ways to begin that change the backbone's own weights: such an adapter belongs to the changed ones.
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False}


@dataclass(frozen=True)
class WrittenAdapter:
    """Where an adapter was written, and the sha256 of its weights file."""

    path: Path
    sha256: str


def write_adapter(
    folder: Path,
    adapter: Adapter,
    param_P: torch.Tensor,
    config: TrialConfig,
    backbone: Backbone,
    base_model_name: str,
    provenance: Mapping[str, Any],
) -> WrittenAdapter:
    """Write `param_P` (laid out as `adapter`'s weights) to `folder`, replacing it whole or not at all.

    Whoever loads the adapter finds the backbone as `base_model_name`, wherever it lies here. `provenance` is added to
    the manifest: task, trial, step, validation loss.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for path, (a_RK, b_NR) in adapter.matrices(param_P.cpu()).items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a_RK.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b_NR.contiguous()
    with replace_folder(folder) as aside:
        write_file(aside / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
        sha256 = sha256_of(aside / WEIGHTS_NAME)
        write_file(aside / CONFIG_NAME, _json(peft_config(adapter, config, backbone, base_model_name)))
        manifest = {"weights_sha256": sha256, "backbone_fingerprint": backbone.fingerprint, **provenance}
        write_file(aside / MANIFEST_NAME, _json(manifest))
    return WrittenAdapter(folder, sha256)


def peft_config(adapter: Adapter, config: TrialConfig, backbone: Backbone, base_model_name: str) -> dict[str, Any]:
    """Return what peft.LoraConfig.from_pretrained reads. Module names are cut to suffixes where those say the same."""
    paths = [module.path for module in adapter.modules]
    suffixes = sorted({path.rsplit(".", 1)[-1] for path in paths})
    layers: list[int] | None = None
    if config.layers is not None:
        layers = sorted({number for path in paths if (number := layer_number(path)) is not None})
    selected = {
        layer.path
        for layer in backbone.layers
        if layer.path.rsplit(".", 1)[-1] in suffixes and (layers is None or layer_number(layer.path) in layers)
    }
    # A number names a layer of a sequence, and PEFT would look for a linear layer in whatever else has that number.
    said_by_suffixes = selected == set(paths) and not any(suffix.isdigit() for suffix in suffixes)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": suffixes if said_by_suffixes else paths,
        "layers_to_transform": layers if said_by_suffixes else None,
        "fan_in_fan_out": backbone.fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": None,
    }


def read_adapter(folder: Path, adapter: Adapter, config: TrialConfig, backbone: Backbone) -> None:
    """Load the weights of a PEFT adapter into `adapter`, to start training from.

    Raises `AdapterFormatError` when the folder is no plain LoRA adapter or has another rank, scaling or other modules,
    and `WrongBaseModelError` when its manifest names another backbone.
    """
    from safetensors.torch import load_file

    try:
        described = _json_object(folder / CONFIG_NAME)
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{folder} is no PEFT adapter ({error})", "name a folder that PEFT wrote") from error
    except Exception as error:
        raise AdapterFormatError(f"{folder / WEIGHTS_NAME} is damaged ({error})", "fetch the adapter again") from error
    _check_backbone(folder, backbone)
    _refuse_more_than_lora(folder, described)
    _refuse_another_scaling(folder, described, config)
    adapter.allocate()
    expected = {
        f"{_PREFIX}{path}.lora_{letter}.weight": matrix
        for path, matrices in adapter.matrices(adapter.param).items()
        for matrix, letter in zip(matrices, "AB", strict=True)
    }
    if tensors.keys() != expected.keys():
        odd = min(tensors.keys() ^ expected.keys())
        raise AdapterFormatError(
            f"{folder} and the trial adapt other modules, such as {odd.removeprefix(_PREFIX)}",
            "give the trial the adapter's target_modules and layers",
        )
    for name, matrix in expected.items():
        stored = tensors[name]
        if stored.shape != matrix.shape:
            raise WrongBaseModelError(
                f"{folder} has {name.removeprefix(_PREFIX)} of shape {tuple(stored.shape)}, not {tuple(matrix.shape)}",
                "start from an adapter of this base model and lora_rank",
            )
        if not bool(stored.isfinite().all()):
            raise AdapterFormatError(
                f"{folder} has numbers in {name.removeprefix(_PREFIX)} that are not finite",
                "start from another adapter",
            )
        matrix.copy_(stored)


def _refuse_more_than_lora(folder: Path, described: Mapping[str, Any]) -> None:
    if described.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{folder} is no LoRA adapter", "start from a LoRA adapter")
    for name in _BEYOND_LORA:
        if described.get(name):
            raise AdapterFormatError(f"{folder} has {name}", f"start from a plain LoRA adapter, without {name}")
    if described.get("bias", "none") != "none":
        raise AdapterFormatError(
            f'{folder} has bias "{described["bias"]}"', 'start from a plain LoRA adapter, with bias "none"'
        )
    start = described.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING_STARTS):
        raise AdapterFormatError(
            f"{folder} began as {start}, which changed the base model's own weights",
            "convert it to a plain LoRA adapter with PEFT's path_initial_model_for_weight_conversion",
        )


def _refuse_another_scaling(folder: Path, described: Mapping[str, Any], config: TrialConfig) -> None:
    for name, field, asked in (
        ("r", "lora_rank", config.lora_rank),
        ("lora_alpha", "lora_alpha", config.lora_alpha),
        ("use_rslora", "use_rslora", config.use_rslora),
    ):
        there = described.get(name, _PEFT_DEFAULTS[name])
        if there != asked:
            raise AdapterFormatError(
                f"{folder} has {name} {there}, the trial {asked}", f"give the trial {field} {there}"
            )


def _check_backbone(folder: Path, backbone: Backbone) -> None:
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        return
    try:
        fingerprint = _json_object(manifest_path).get("backbone_fingerprint")
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{manifest_path} is damaged ({error})", "fetch the adapter again") from error
    if fingerprint != backbone.fingerprint:
        raise WrongBaseModelError(
            f"{folder} was trained over another backbone than {backbone.name_or_path}",
            "start from an adapter of this base model",
        )


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError when it is none."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
