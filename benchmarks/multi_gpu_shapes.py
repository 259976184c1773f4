"""The models of `multi_gpu.py` and `tick_profile.py`: shapes alone, for random weights."""

from __future__ import annotations

from typing import Any

LORA_RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# hidden, intermediate, layers, heads, key and value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 4096),
    "narrow": (64, 128, 32, 4, 2, 512),
    "parity": (1024, 2816, 4, 8, 4, 4096),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "32b": (5120, 27648, 64, 40, 8, 152064),
}


def make_config(shape: str) -> Any:
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
