"""Our rotation against transformers' own."""

from __future__ import annotations

import sys

import pytest
import torch
from alto_training.executor.fused_rotary import fuse_rotary, rotated
from tiny_jobs import tiny_llama


def test_values_and_gradients_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    # As attention has them: views of [1, T, heads, D].
    q, k = (torch.randn(1, 5, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    upstream = torch.randn_like(q), torch.randn_like(k)
    expected, found = apply_rotary_pos_emb(q, k, cos, sin), rotated(q, k, cos, sin)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k), upstream), torch.autograd.grad(expected, (q, k), upstream)
    )


def test_a_llama_gives_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    library = sys.modules[type(model).__module__]
    monkeypatch.setattr(library, "apply_rotary_pos_emb", library.apply_rotary_pos_emb)  # put back in the end
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    assert fuse_rotary(model.base_model) == 1
    assert library.apply_rotary_pos_emb is rotated
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_another_rotation_is_left_alone() -> None:
    from transformers import CohereConfig, CohereModel

    # Interleaved pairs instead of halves.
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CohereModel(CohereConfig(vocab_size=8, **small, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    assert fuse_rotary(model) == 0
