"""Choosing who multiplies the low-rank part."""

from __future__ import annotations

from alto_training.executor.lora_linear import LoraBackend, ReferenceBackend


def choose_backend(name: str) -> LoraBackend:
    """Return the back end of this name."""
    return ReferenceBackend()
