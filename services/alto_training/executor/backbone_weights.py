"""Where a backbone's weights are while nobody uses them: here, whole; or, by another implementation, elsewhere."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from alto_training.executor.losses import OutputHead


class BackboneWeights(Protocol):
    """What a backbone asks of whoever keeps its weights.

    Layers and embeddings are seen to by hooks on the modules. `fingerprint` names the weights, wherever they are.
    `in_lock_step`: every pass must be one of all ranks. `uncounted_bytes`, of them and of what they are
    gathered in, lie where torch's allocator does not count.
    """

    fingerprint: str
    parameters: int
    in_lock_step: bool

    @property
    def uncounted_bytes(self) -> int:
        """See above."""
        ...

    def head(self) -> AbstractContextManager[OutputHead]:
        """Return the output head, usable within the context."""
        ...

    def idle_pass(self, training: bool) -> None:
        """Take part in a pass of other ranks without work of one's own."""
        ...


class WholeWeights:
    """All weights of `model`, a causal language model of transformers, in this process."""

    in_lock_step = False
    uncounted_bytes = 0

    def __init__(self, model: Any) -> None:
        named = list(model.named_parameters())
        self.fingerprint = fingerprint([fingerprint_part(name, parameter) for name, parameter in named])
        self.parameters = sum(parameter.numel() for _, parameter in named)
        self._model = model

    def head(self) -> AbstractContextManager[OutputHead]:
        """See `BackboneWeights.head`."""
        return nullcontext(output_head(self._model))

    def idle_pass(self, training: bool) -> None:
        """Do nothing: nobody waits for these weights."""


def output_head(model: Any) -> OutputHead:
    """Return the map to logits with the weights that the model holds now."""
    projection = model.get_output_embeddings()
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(
        weight_VH=projection.weight.data,
        bias_V=None if getattr(projection, "bias", None) is None else projection.bias.data,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def fingerprint_part(name: str, parameter: nn.Parameter) -> bytes:
    """Return a parameter's name, shape and about 64 of its values: cheap, and tells models apart.

    Values are rounded to bf16, so that a model has one name in whatever number format it was loaded.
    """
    flat = parameter.detach().flatten()
    sample: torch.Tensor = flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().contiguous()
    return f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes()


def fingerprint(parts: list[bytes]) -> str:
    """Return the sha256 of the parts of all parameters, in the model's order."""
    return hashlib.sha256(b"".join(parts)).hexdigest()
