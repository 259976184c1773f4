"""Norms by torch's own kernel: only where the model's give the same."""

from __future__ import annotations

import pytest
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


def test_norms_without_a_weight_are_left_alone() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    model = torch.nn.Sequential(Gemma4RMSNorm(8), Gemma4RMSNorm(8, with_scale=False))
    x_TK = torch.randn(4, 8)
    expected = model(x_TK)
    assert fuse_norms(model) == 1
    torch.testing.assert_close(model(x_TK), expected)


def test_what_makes_one_norm_of_a_class_another_is_seen() -> None:
    class AnyRMSNorm(torch.nn.Module):
        def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0, bias: bool = False) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(width))
            self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else 0.0
            self.eps, self.offset = eps, offset

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight + self.offset, self.eps) + self.bias

    assert fuse_norms(torch.nn.Sequential(AnyRMSNorm(8), AnyRMSNorm(8, offset=1.0), AnyRMSNorm(8, bias=True))) == 1


@pytest.mark.parametrize("width", [7, 48])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_types_are_those_of_the_models_own_norm(width: int, weights: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norms = torch.nn.ModuleList([LlamaRMSNorm(width), Olmo2RMSNorm(width)]).to(weights)
    x_TK = torch.randn(3, width, dtype=torch.bfloat16)
    expected = [norm(x_TK) for norm in norms]
    assert fuse_norms(norms) == 2
    for norm, own_TK in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm(x_TK), own_TK)
