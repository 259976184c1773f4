"""What the persistent kernel is told to do, checked without a GPU: everything once, and cluster mates in step."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from typing import Any

import pytest
from alto_kernels.availability import compiled_module

kernels = compiled_module()
pytestmark = pytest.mark.skipif(kernels is None or not kernels.has_cuda, reason="built without CUDA")

DOWN, BASE, GRAD_B, GRAD_A = range(4)
CLUSTERS = 66
_LAYOUT = (
    "kind flags row column steps module extra_begin extra_count extra_steps block_count part_count start stop"
    " threshold keep_factor eighths"
)
WORDS = _LAYOUT.split()
PART = ("s_row", "column", "module", "detail", "slot", "rank", "start", "stop")
ITEM_BYTES = 192
IN_STEP = ("kind", "flags", "steps", "block_count", "part_count", "extra_steps")


def unpack(items: bytes) -> list[dict[str, Any]]:
    found = []
    for at in range(0, len(items), ITEM_BYTES):
        words = struct.unpack_from("<48i", items, at)
        item: dict[str, Any] = dict(zip(WORDS, words, strict=False))
        item["parts"] = [dict(zip(PART, words[16 + 8 * i :], strict=False)) for i in range(item["part_count"])]
        found.append(item)
    return found


def layout_of(ranks: list[int], offsets: list[int]) -> Any:
    """Return the layout of adapters that sit one after another in the pools."""
    segments, column = [], 0
    for slot, rank in enumerate(ranks):
        segments.append((slot, offsets[slot], offsets[slot + 1], rank, column, 1.0, 0.0, False))
        column += -(-rank // 16) * 16
    assert kernels is not None
    return kernels.TickLayout(tokens=offsets[-1], segments=segments)


CASES = {
    "one": ([16], [0, 8192], [4096]),
    "many ragged": ([8, 16, 32, 64, 128] * 4, [0, *range(113, 113 * 20, 113), 2500], [576, 1536, 64]),
    "empty": ([256, 8, 40], [0, 0, 130, 300], [512]),
    "small ranks": ([16] * 24, [*range(0, 24 * 100, 100), 2400], [512]),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_everything_is_done_once_and_in_step(name: str, backward: bool) -> None:
    ranks, offsets, out_features = CASES[name]
    in_features, tokens = 1024, offsets[-1]
    layout = layout_of(ranks, offsets)
    items, offsets_of_clusters = layout.schedule(
        backward=backward,
        wants_output=True,
        in_features=in_features,
        out_features=out_features,
        drops=False,
        pairs_in_group=8,
        clusters=CLUSTERS,
    )
    pairs = unpack(items)
    bounds = struct.unpack(f"<{CLUSTERS + 1}i", offsets_of_clusters)
    assert bounds[-1] * 2 == len(pairs)
    written: Counter[tuple[int, int]] = Counter()
    tiles: Counter[tuple[int, int, int]] = Counter()
    gradients: Counter[tuple[int, int, int, int]] = Counter()
    for first, last in itertools.pairwise(bounds):
        downs_are_over = False
        for pair in range(first, last):
            one, two = pairs[2 * pair], pairs[2 * pair + 1]
            assert all(one[key] == two[key] for key in IN_STEP)
            # A tile may wait for S blocks: whoever has to make them does so before waiting.
            assert not (downs_are_over and one["kind"] == DOWN)
            downs_are_over = downs_are_over or one["kind"] != DOWN
            for item in (one, two):
                if item["kind"] == DOWN:
                    written.update((part["s_row"], part["module"]) for part in item["parts"] if part["detail"] >= 0)
                    depth = {1: 128, 2: 192}.get(item["block_count"], 64)
                    contraction = out_features[item["parts"][0]["module"]] if backward else in_features
                    assert item["steps"] == -(-contraction // depth)
                elif item["kind"] == BASE and item["row"] < tokens:
                    tiles[item["row"], item["column"], item["module"]] += 1
                elif item["kind"] in (GRAD_B, GRAD_A):
                    boxes = 4 if item["block_count"] == 1 else 2
                    for part in item["parts"]:
                        assert item["row"] <= part["start"] < part["stop"] <= item["row"] + 64 * item["steps"]
                        assert item["start"] <= part["start"] < part["stop"] <= item["stop"]
                        for column in range(item["column"], item["column"] + boxes * 64, 64):
                            at = part["detail"] * 100_000 + column
                            gradients[item["kind"], part["slot"], part["module"], at] += 1
    modules = range(len(out_features))
    assert set(written) == {(row, m) for row in range(0, layout.saved_rows, 128) for m in modules}
    outputs = [in_features] if backward else out_features
    assert set(tiles) == {
        (row, column, m)
        for row in range(0, tokens, 128)
        for m, features in enumerate(outputs)
        for column in range(0, features, 256)
    }
    assert {*written.values(), *tiles.values(), *gradients.values()} == {1}
    wanted = {
        (kind, slot, m, chunk * 100_000 + column)
        for slot, rank in enumerate(ranks)
        if offsets[slot + 1] > offsets[slot]
        for chunk in range(0, rank, 64)
        for m, features in enumerate(out_features)
        for kind, width in ((GRAD_B, features), (GRAD_A, in_features))
        for column in range(0, width, 64)
    }
    assert (wanted <= set(gradients)) if backward else not gradients


def test_adapters_of_small_rank_share_blocks() -> None:
    assert layout_of([16] * 4, [0, 32, 64, 96, 128]).saved_rows == 128
    assert layout_of([16, 64], [0, 64, 128]).saved_rows == 256
    assert layout_of([16, 16], [0, 128, 256]).saved_rows == 256


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 3, 6, 1, 4], [1, 0, 3, 2, 7, 6, 5, 4]])
@pytest.mark.parametrize("modules", [1, 2])
def test_gradients_read_the_s_rows_of_their_tokens(order: list[int], modules: int) -> None:
    """Pool columns go by slot, tokens by `order`, with a gap in the middle; some adapters share windows."""
    ranks, offsets = [16, 8, 16, 64, 8, 24, 100, 16], [0, 40, 130, 256, 300, 640, 700, 810, 1000]
    first_columns = [0, *itertools.accumulate(-(-rank // 16) * 16 for rank in ranks)]
    segments = [
        (
            slot,
            offsets[i] + (i > 3) * 150,
            offsets[i + 1] + (i > 3) * 150,
            ranks[slot],
            first_columns[slot],
            1.0,
            0.0,
            False,
        )
        for i, slot in enumerate(order)
    ]
    assert kernels is not None
    items, _ = kernels.TickLayout(tokens=1150, segments=segments).schedule(
        backward=True,
        wants_output=True,
        in_features=512,
        out_features=[512] * modules,
        drops=False,
        pairs_in_group=8,
        clusters=CLUSTERS,
    )
    unpacked = unpack(items)
    blocks = {
        part["s_row"]: (item["row"], part["column"])
        for item in unpacked
        if item["kind"] == DOWN
        for part in item["parts"]
        if part["detail"] >= 0
    }
    for item in unpacked:
        if item["kind"] not in (GRAD_B, GRAD_A):
            continue
        eighths = 0
        for number, part in enumerate(item["parts"]):
            for step in range(item["steps"]):
                s_row = part["s_row"] + 64 * step
                row, pool_column = blocks[s_row // 128 * 128]
                assert row + s_row % 128 == item["row"] + 64 * step
                assert pool_column + part["column"] == first_columns[part["slot"]] + part["detail"]
            columns = min(part["rank"] - part["detail"], 64)
            used = range(part["column"] // 8, -(-(part["column"] + columns) // 8))
            eighths |= sum(1 << at for at in used) << (0 if item["block_count"] == 1 else 8 * number)
        assert item["eighths"] & 0xFFFFFFFF == eighths


def test_gradients_of_small_neighbours_are_made_together() -> None:
    def gradients(fresh: list[bool], offsets: list[int]) -> int:
        segments = [(i, offsets[i], offsets[i + 1], 16, 16 * i, 1.0, 0.0, fresh[i]) for i in range(4)]
        assert kernels is not None
        items, _ = kernels.TickLayout(tokens=offsets[-1], segments=segments).schedule(
            backward=True,
            wants_output=False,
            in_features=512,
            out_features=[512],
            drops=False,
            pairs_in_group=8,
            clusters=CLUSTERS,
        )
        return sum(item["kind"] == GRAD_A for item in unpack(items)) // 2

    near = [0, 100, 200, 300, 400]
    assert gradients([False] * 4, near) == 1
    assert gradients([False, False, True, True], near) == 2
    # Each long enough by itself.
    assert gradients([False] * 4, [0, 2000, 4000, 6000, 8000]) == 4
