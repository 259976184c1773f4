"""The frozen base model, held once: loaded, its linear layers made ready for adapters, and checked for packing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from alto_common.base_models import (
    SUPPORTED_MODELS,
    read_as_experts,
    require_trainable,
    select_modules,
    weights_being_read,
)
from alto_common.tuning import ALL_LINEAR, TrialConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from alto_training.executor import attention
from alto_training.executor.adapter import AdaptedModule
from alto_training.executor.backbone_weights import BackboneWeights, WholeWeights
from alto_training.executor.errors import ContextLengthError, TargetModulesError, UnsupportedBackboneError
from alto_training.executor.frozen_linear import frozen_linear
from alto_training.executor.fused_gate import fuse_gates
from alto_training.executor.fused_layer import fuse_layers
from alto_training.executor.fused_norm import fuse_norms
from alto_training.executor.fused_rotary import fuse_rotary
from alto_training.executor.lora_backend import LoraBackend, ReferenceBackend
from alto_training.executor.lora_linear import MultiLoraLinear
from alto_training.executor.nf4 import quantise_layers
from alto_training.executor.projections import shared_inputs_found
from alto_training.executor.tick import CurrentTick, Item, PackedSequence, Share, Tick, build_tick

_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Backbone:
    """A frozen decoder whose linear layers take adapters, and who keeps its weights.

    `fan_in_fan_out` says that weights lie as [K, N] (GPT-2), which PEFT must be told.
    """

    decoder: nn.Module
    weights: BackboneWeights
    layers: tuple[MultiLoraLinear, ...]
    module_prefix: str
    context_length: int
    fan_in_fan_out: bool
    name_or_path: str
    current: CurrentTick
    device: torch.device
    dtype: torch.dtype
    backend: LoraBackend

    @property
    def fingerprint(self) -> str:
        """The name of the weights: equal for equal models, however they are kept."""
        return self.weights.fingerprint

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return self.weights.parameters

    def use_backend(self, backend: LoraBackend) -> None:
        """Let `backend` multiply the low-rank part of every layer."""
        self.backend = backend
        for layer in self.layers:
            layer.backend = backend

    def hidden_states(self, tick: Tick) -> torch.Tensor:
        """Run the decoder over the tick and return the hidden states of its target rows, [R, H]."""
        self.current.tick = tick
        try:
            output = self.decoder(input_ids=tick.input_ids_1T, position_ids=tick.position_ids_1T, use_cache=False)
        finally:
            if not tick.training:
                self.current.tick = None
        hidden_TH: torch.Tensor = output.last_hidden_state.squeeze(0)
        return hidden_TH.index_select(0, tick.rows_R)

    def end_tick(self) -> None:
        """Forget the tick: after its backward pass, which may run layers again (recomputation)."""
        self.current.tick = None
        for layer in self.layers:
            if layer.shared_input is not None:
                layer.shared_input.forget()

    def recompute_activations(self) -> None:
        """Keep only the input of each decoder layer; compute the rest again in the backward pass."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.decoder.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                # The flag of the layer alone: its children stay in evaluation mode, without the backbone's dropout.
                module.training = True

    def adapted_modules(self, config: TrialConfig) -> tuple[AdaptedModule, ...]:
        """Return the layers that a trial adapts, in the model's order.

        Raises `TargetModulesError` when there are none, and for a module or a layer that the model does not have.
        """
        self._refuse_unknown_targets(config)
        selected = set(select_modules([layer.path for layer in self.layers], config.target_modules, config.layers))
        chosen = [layer for layer in self.layers if layer.path in selected]
        if not chosen:
            names = sorted({layer.path.rsplit(".", 1)[-1] for layer in self.layers})
            raise TargetModulesError(
                f"target_modules {list(config.target_modules)} with layers {config.layers} match no linear layer",
                f"choose among {', '.join(names)} or {ALL_LINEAR}",
            )
        return tuple(
            AdaptedModule(layer.index, layer.path, layer.frozen.in_features, layer.frozen.out_features)
            for layer in chosen
        )

    def _refuse_unknown_targets(self, config: TrialConfig) -> None:
        paths = [layer.path for layer in self.layers]
        names = sorted({path.rsplit(".", 1)[-1] for path in paths})
        for target in config.target_modules:
            if not select_modules(paths, (target,), None):
                raise TargetModulesError(
                    f"target_modules: {target} matches no linear layer",
                    f"choose among {', '.join(names)} or {ALL_LINEAR}",
                )
        there = {number for path in paths if (number := layer_number(path)) is not None}
        if outside := sorted(set(config.layers or ()) - there):
            raise TargetModulesError(f"layers: there is no layer {outside[0]}", f"choose among 0 to {max(there)}")

    def check_length(self, config: TrialConfig) -> None:
        """Refuse sequences longer than the context: positions there were never trained."""
        if config.max_length > self.context_length:
            raise ContextLengthError(
                f"max_length {config.max_length} is more than the {self.context_length} tokens of {self.name_or_path}",
                f"give a max_length of at most {self.context_length}",
            )


def load_backbone(
    name_or_path: str, dtype: torch.dtype = torch.float32, device: str = "cpu", in_nf4: bool = False
) -> Backbone:
    """Load a causal language model by folder or hub name, freeze it, and make it take adapters.

    With `in_nf4` its linear layers are kept in 4 bits, and `dtype` is what products are made in.
    Raises `UnsupportedBackboneError` and `UnusableModelError` for an architecture that cannot be trained in packed
    sequences, the latter too when the model is damaged or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    with weights_being_read(name_or_path):
        model, told = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            attn_implementation=attention.PLAIN_IMPLEMENTATION,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if told["missing_keys"]:
            # transformers fills them with random numbers and a warning.
            raise ValueError(f"its files lack {sorted(told['missing_keys'])[0]}")
    weights = None
    if in_nf4:
        # While it is whole, and before the device sees it: the weights' name is that of the model they come from.
        weights = WholeWeights(model)
        quantise_layers(model.base_model)
    return prepare_backbone(model, name_or_path, torch.device(device), weights)


def prepare_backbone(
    model: Any, name_or_path: str, device: torch.device, weights: BackboneWeights | None = None
) -> Backbone:
    """Make a loaded causal language model (a transformers PreTrainedModel) a backbone; it is changed in place.

    `weights` is given when they are kept elsewhere; then `model` has hooks that fetch what each of its modules uses.
    Raises as `load_backbone` does for its architecture.
    """
    # The two short probes cannot show all of it: chunks matter to sequences that are longer than one.
    require_trainable(model, name_or_path)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what launches kernels by itself takes the current one
    config = model.config.get_text_config()
    model.requires_grad_(False).eval().to(device)
    probe_ids = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    expected_SV = _own_logits(model, _probe_sequences(probe_ids), device)
    if device.type == "cuda":
        fuse_norms(model.base_model)
        fuse_rotary(model.base_model)
        fuse_gates(model.base_model)
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    decoder = model.base_model
    current = CurrentTick()
    attention.attach(model, current)
    backbone = Backbone(
        decoder=decoder,
        weights=weights or WholeWeights(model),
        layers=(),
        module_prefix=f"{model.base_model_prefix}.",
        context_length=int(config.max_position_embeddings),
        fan_in_fan_out=False,
        name_or_path=name_or_path,
        current=current,
        device=device,
        dtype=model.dtype,
        backend=ReferenceBackend(),
    )
    backbone.fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in decoder.modules())
    backbone.layers = _install_layers(decoder, backbone.module_prefix, backbone.backend, current)
    try:
        with shared_inputs_found(backbone.layers):
            _verify_packing(backbone, probe_ids, expected_SV)
    except (AttributeError, TypeError) as error:  # it asks of a linear layer what one with adapters does not have
        problem = f"{type(model).__name__} does not run with layers that carry adapters ({error})"
        raise UnsupportedBackboneError(problem, SUPPORTED_MODELS) from error
    if device.type == "cuda" and model.dtype.itemsize == 2 and fuse_layers(decoder):
        _verify_packing(backbone, probe_ids, expected_SV)
    return backbone


def layer_number(path: str) -> int | None:
    """Return the number of the decoder layer that a module path lies in, None outside of all."""
    match = re.search(r"\.(\d+)\.", path)
    return int(match.group(1)) if match else None


def _install_layers(
    decoder: nn.Module, prefix: str, backend: LoraBackend, current: CurrentTick
) -> tuple[MultiLoraLinear, ...]:
    layers: list[MultiLoraLinear] = []
    experts = read_as_experts(decoder)
    for name, module in list(decoder.named_modules()):
        parent_name, _, child = name.rpartition(".")
        frozen = None if child in experts else frozen_linear(module)
        if frozen is None:
            continue
        layer = MultiLoraLinear(frozen, len(layers), prefix + name, backend, current)
        setattr(decoder.get_submodule(parent_name), child, layer)
        layers.append(layer)
    return tuple(layers)


def _probe_sequences(probe_ids: torch.Tensor) -> list[torch.Tensor]:
    return [row[: len(row) - number * 5] for number, row in enumerate(probe_ids)]  # ragged: 12 and 7 tokens


@torch.no_grad()
def _own_logits(model: Any, sequences: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the untouched model's logits, by its own plain attention, for each sequence alone, rows stacked."""
    model.set_attn_implementation(attention.PLAIN_IMPLEMENTATION)
    alone = [model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1].float() for ids in sequences]
    return torch.cat(alone)


@torch.no_grad()
def _verify_packing(backbone: Backbone, probe_ids: torch.Tensor, expected_SV: torch.Tensor) -> None:
    """Refuse a model that gives other logits for sequences packed together than for each alone."""
    rows = [ids.numpy().astype("int32") for ids in _probe_sequences(probe_ids)]
    items = [Item((PackedSequence(ids, ids >= 0),), denominator=1) for ids in rows]
    tick = build_tick([Share(None, items)], training=False, device=backbone.device)
    hidden_SH = backbone.hidden_states(tick)
    with backbone.weights.head() as head:
        if head.weight_VH.shape[1] != hidden_SH.shape[1]:
            name = type(backbone.decoder).__name__
            raise UnsupportedBackboneError(
                f"{name}'s hidden states are changed before its output head", SUPPORTED_MODELS
            )
        packed_SV = head.logits(hidden_SH)
    error = float((packed_SV - expected_SV).abs().max() / expected_SV.abs().max().clamp_min(1e-6))
    if not error <= _PACKING_TOLERANCE.get(backbone.dtype, 0.1):
        raise UnsupportedBackboneError(
            f"{type(backbone.decoder).__name__} gives other logits for packed sequences (relative error {error:.2g})",
            SUPPORTED_MODELS,
        )
