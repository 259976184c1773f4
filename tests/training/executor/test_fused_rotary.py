"""Our rotation against transformers' own."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from alto_training.executor.fused_rotary import fuse_rotary, rotated
from tiny_jobs import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype).eval()


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


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
KINDS = {
    "halves": ("llama", {}),
    "scaled": ("llama", {"rope_parameters": YARN}),
    "norms of heads": ("qwen3", {"head_dim": 8}),
    "part of a head, in its function": ("gpt_neox", {"rotary_pct": 0.25}),
    "part of a head, in its function too": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "part of a head, before its function": ("stablelm", {"partial_rotary_factor": 0.25}),
    "in fp32": ("olmo2", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_every_layer_rotates_by_ours_and_the_model_gives_its_own_logits(name: str, dtype: torch.dtype) -> None:
    kind, changes = KINDS[name]
    model = tiny(kind, dtype, **changes)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    assert fuse_rotary(model.base_model) == 2
    close = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}[dtype]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, **close)


@pytest.mark.parametrize("kind", ["cohere", "glm"])
def test_pairs_that_are_interleaved_are_left_alone(kind: str) -> None:
    model = tiny(kind, **({"head_dim": 8} if kind == "glm" else {}))
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    assert fuse_rotary(model.base_model) == 0
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_other_models_of_the_architecture_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    library = sys.modules[type(ours).__module__]
    own = library.apply_rotary_pos_emb
    fuse_rotary(ours.base_model)
    assert library.apply_rotary_pos_emb is own

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("transformers' own was called")

    monkeypatch.setattr(library, "apply_rotary_pos_emb", refuse)
    ids = torch.arange(12)[None]
    ours(input_ids=ids)
    with pytest.raises(AssertionError, match="own was called"):
        theirs(input_ids=ids)
