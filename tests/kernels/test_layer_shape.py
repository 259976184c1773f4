"""Where a layer keeps its tensors, checked without a GPU: none over another, all within, each where TMA may read it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from alto_kernels.availability import compiled_module

kernels = compiled_module()
pytestmark = pytest.mark.skipif(kernels is None or not kernels.has_cuda, reason="built without CUDA")

LLAMA = {
    "hidden": 64,
    "query_width": 96,
    "key_width": 32,
    "head_width": 16,
    "mlp_width": 136,
    "input_epsilon": 1e-5,
    "mlp_epsilon": 1e-6,
    "head_epsilon": -1.0,
    "is_float16": False,
}


def shape(**changes: Any) -> Any:
    assert kernels is not None
    return kernels.LayerShape(**LLAMA | changes)


@pytest.mark.parametrize("tokens", [1, 7, 128, 8192])
@pytest.mark.parametrize("head_epsilon", [-1.0, 1e-6], ids=["plain heads", "norms of heads"])
def test_queries_keys_and_values_have_room_before_what_comes_next(tokens: int, head_epsilon: float) -> None:
    elements, queries, keys, values = shape(head_epsilon=head_epsilon).kept(tokens, 256)
    widths = {queries: 96, keys: 32, values: 32}
    for (start, width), (following, _) in pairwise([*sorted(widths.items()), (elements, 0)]):
        assert start % 64 == 0
        assert start + tokens * width <= following
    heads = tokens * (96 + 32) if head_epsilon >= 0.0 else 0
    blocks = 7 * 256 * 64
    # The normed input, q, k, v, h, its norm, gate, up, their product; S of seven layers; what aligning adds.
    own = tokens * (64 + 96 + 32 + 32 + 64 + 64 + 3 * 136) + heads + blocks
    assert own <= elements <= own + 18 * 64


def test_gradients_have_room() -> None:
    elements, attended = shape().scratch(100)
    assert attended + 100 * 96 <= elements
    assert elements <= 100 * (2 * 136 + 2 * 64 + 96) + 5 * 64


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden": 12}, "multiples of 8"),
        ({"mlp_width": 0}, "multiples of 8"),
        ({"hidden": 16392}, "wider"),
        ({"head_width": 24}, "head_width"),
        ({"query_width": 104}, "head_width"),
    ],
)
def test_widths_that_the_kernels_do_not_take(changes: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shape(**changes)
