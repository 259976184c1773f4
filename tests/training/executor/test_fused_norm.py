"""Norms by torch's own kernel: only where the model's give the same."""

from __future__ import annotations

import torch
from alto_training.executor.fused_norm import fuse_norms
from tiny_jobs import tiny_llama


def test_a_llama_with_fused_norms_gives_its_own_logits() -> None:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    assert fuse_norms(model.base_model) == 2 * len(model.base_model.layers) + 1
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_weights_that_a_norm_has_when_it_is_called_are_used() -> None:
    model = tiny_llama()
    fuse_norms(model.base_model)
    norm = model.base_model.norm
    norm.weight.data = torch.full_like(norm.weight, 3.0)
    x_TK = torch.randn(2, norm.weight.numel())
    torch.testing.assert_close(norm(x_TK), 3.0 * x_TK * torch.rsqrt(x_TK.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_norms_that_do_something_else_are_left_alone() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    class PartialRMSNorm(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    model = torch.nn.Sequential(GemmaRMSNorm(8), PartialRMSNorm(8), torch.nn.LayerNorm(8))
    assert fuse_norms(model) == 0
