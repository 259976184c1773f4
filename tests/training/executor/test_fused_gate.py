"""The gated SiLU by ours: only where the model's MLP is one."""

from __future__ import annotations

import math

import pytest
import torch
from alto_training.executor.fused_gate import fuse_gates
from alto_training.executor.nf4 import quantise_layers
from test_families import FAMILIES, make
from tiny_jobs import tiny_llama
from torch import nn

WITH_GATED_SILU = {"llama", "qwen2", "qwen3", "mistral"}


def test_a_llama_with_fused_gates_gives_its_own_logits_and_gradients() -> None:
    model = tiny_llama()
    embedded = torch.randn(1, 12, model.config.hidden_size, requires_grad=True)

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(inputs_embeds=embedded).logits
        return logits, torch.autograd.grad(logits.square().sum(), embedded)[0]

    expected = results()
    assert fuse_gates(model.base_model) == len(model.base_model.layers)
    torch.testing.assert_close(results(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_another_activation_or_mlp_are_left_alone(family: str) -> None:
    model = make(family)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    fused = fuse_gates(model.base_model)
    assert fused == (model.config.num_hidden_layers if family in WITH_GATED_SILU else 0)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_projections_that_the_mlp_has_when_it_is_called_are_used() -> None:
    mlp = tiny_llama().base_model.layers[0].mlp
    fuse_gates(mlp)
    doubled = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    doubled.weight.data = 2.0 * mlp.up_proj.weight.data
    x = torch.randn(1, 3, mlp.up_proj.in_features)
    before = mlp(x)
    mlp.up_proj = doubled
    torch.testing.assert_close(mlp(x), 2.0 * before)


def test_a_gate_that_is_clamped_is_left_alone() -> None:
    class ClampedMLP(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.limit = limit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
            return self.down_proj(nn.functional.silu(gate) * up)

    assert fuse_gates(nn.Sequential(*(ClampedMLP(limit) for limit in (5.0, 16.0, 100.0)))) == 0
    assert fuse_gates(ClampedMLP(math.inf)) == 1


def test_projections_in_four_bits_are_fused_too() -> None:
    model = tiny_llama()
    quantise_layers(model.base_model)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    assert fuse_gates(model.base_model) == len(model.base_model.layers)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
