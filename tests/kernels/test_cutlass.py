"""Back end `cutlass` against float64 on the GPU: every shape class, poisoned outputs, ragged and empty groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from alto_kernels import (
    AdapterStep,
    AdapterTable,
    CudaKernels,
    TickPlan,
    adamw_step,
    cuda_available,
    cuda_kernels,
    lora_linear,
    lora_linears,
    low_rank_backward,
    low_rank_forward,
)

from .lora_cases import Case, Outcome, float64_oracle, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_available(), reason="no CUDA build, or no GPU for it"),
]


@dataclass(frozen=True)
class Variant:
    """One family of kernels in one number format, and the largest relative error that rounding explains."""

    kernels: CudaKernels
    dtype: torch.dtype
    bound: float
    gradient_dtype: torch.dtype = torch.float32

    def table(self, case: Case) -> AdapterTable:
        return case.table("cutlass", "cuda", self.dtype, self.kernels, self.gradient_dtype)

    @property
    def gradient_bound(self) -> float:
        """Largest relative error of gradients, of the norm of old and new together.

        In bf16 rounding to nearest is off by at most 2^-8 of an element, and so of a norm: once for the sum, and
        before that, in `hopper`, for the part that is added, whose norm is below that of the sum with the old
        gradient, which is independent of it.
        """
        if self.gradient_dtype == torch.float32:
            return self.bound
        return self.bound + 2.0**-8 * (2 if self.kernels == CudaKernels.HOPPER else 1)


VARIANTS = {
    "hopper-bf16": Variant(CudaKernels.HOPPER, torch.bfloat16, 6e-3),
    "hopper-fp16": Variant(CudaKernels.HOPPER, torch.float16, 8e-4),
    "hopper-bf16-bf16-gradients": Variant(CudaKernels.HOPPER, torch.bfloat16, 6e-3, torch.bfloat16),
    "hopper-fp16-bf16-gradients": Variant(CudaKernels.HOPPER, torch.float16, 8e-4, torch.bfloat16),
    "grouped-bf16": Variant(CudaKernels.GROUPED, torch.bfloat16, 6e-3),
    "grouped-fp16": Variant(CudaKernels.GROUPED, torch.float16, 8e-4),
    "grouped-bf16-bf16-gradients": Variant(CudaKernels.GROUPED, torch.bfloat16, 6e-3, torch.bfloat16),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    chosen = VARIANTS[request.param]
    if chosen.kernels not in cuda_kernels(chosen.dtype):
        pytest.skip(f"no {request.param} for this GPU")
    return chosen


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def frozen(case: Case, modules: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(2)
    shapes = [case.shapes[module] for module in modules]
    return [(torch.randn(n, k, generator=draws) / k**0.5).to(dtype).cuda() for k, n in shapes]


def inputs(
    variant: Variant, case: Case, modules: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    x = case.rows(case.shapes[modules[0]][0], 1).to(variant.dtype).cuda()
    dys = [case.rows(case.shapes[m][1], 3 + m).to(variant.dtype).cuda() for m in modules]
    return x, frozen(case, modules, variant.dtype), dys


def run(variant: Variant, case: Case, modules: Sequence[int], frozen_factor: float = 1.0) -> Outcome:
    x, weights, dys = inputs(variant, case, modules)
    weights = [weight * frozen_factor for weight in weights]
    table = variant.table(case)
    plan = case.plan(table)
    x.requires_grad_()
    with poisoned_memory():
        ys = lora_linears(x, weights, plan, modules)
        torch.autograd.backward(ys, dys)
    assert x.grad is not None
    return Outcome([y.detach() for y in ys], x.grad, gradients(case, modules))


def gradients(case: Case, modules: Sequence[int]) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    return {
        (slot, module): (tensors[2].clone(), tensors[3].clone())
        for slot, weights in case.tensors.items()
        for module, tensors in weights.items()
        if module in modules
    }


def assert_matches(variant: Variant, case: Case, modules: Sequence[int]) -> None:
    found = run(variant, case, modules)
    x, weights, dys = inputs(variant, case, modules)
    expected = float64_oracle(case, x, weights, dys, modules, "cuda", variant.dtype, variant.gradient_dtype)
    for y, wanted in zip(found.ys, expected.ys, strict=True):
        assert relative_error(y, wanted) < variant.bound
    assert relative_error(found.dx, expected.dx) < variant.bound * len(modules)
    for key, wanted_pair in expected.grads.items():
        for grad, wanted in zip(found.grads[key], wanted_pair, strict=True):
            assert grad.dtype == variant.gradient_dtype
            assert relative_error(grad, wanted) < variant.gradient_bound, key


def ragged(count: int, tokens: int, seed: int) -> list[int]:
    draws = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, tokens + 1, (count - 1,), generator=draws).sort().values.tolist()
    return [0, *cuts, tokens]


def mixed_case(
    shapes: Sequence[tuple[int, int]], count: int, tokens: int, ranks: Sequence[int], dropout: float, seed: int = 0
) -> Case:
    """Return `count` adapters of cycling ranks, every third without the last module, every other with dropout."""
    modules = tuple(range(len(shapes)))
    adapters = {
        slot: (
            ranks[slot % len(ranks)],
            dropout if slot % 2 == 0 else 0.0,
            modules[:-1] if len(modules) > 1 and slot % 3 == 2 else modules,
        )
        for slot in range(count)
    }
    return Case(shapes, adapters, list(range(count)), ragged(count, tokens, seed), seed)


SHAPE_CLASSES = {
    "tiny ragged": ([(576, 1536)], 5, 777, (8, 3, 128, 16)),
    "one token": ([(1536, 4096)], 1, 1, (64,)),
    "one adapter": ([(1024, 1024)], 1, 8192, (16,)),
    "many adapters": ([(4096, 1024)], 64, 8192, (8, 16, 64, 128)),
    "256 groups": ([(576, 576)], 256, 4000, (8, 16)),
    "wide": ([(1024, 14336)], 8, 2000, (16, 40, 64)),
    "deep": ([(14336, 4096)], 4, 1000, (128, 8)),
    "odd sizes": ([(200, 72)], 3, 300, (1, 7, 200)),
    "largest rank": ([(512, 512)], 2, 500, (256, 100)),
    "shared input": ([(4096, 4096), (4096, 1024), (4096, 1024)], 4, 1500, (16, 64)),
    "neighbours of unequal depth": ([(320, 192), (320, 512)], 9, 900, (8, 256, 200, 8)),
    "shared input of five": ([(512, 256), (512, 72), (512, 1024), (512, 520), (512, 8)], 6, 900, (8, 100, 200)),
    "shared input, small ranks": ([(1024, 2816), (1024, 2816)], 40, 3000, (8, 16, 24)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_matches_float64(variant: Variant, name: str, dropout: float) -> None:
    shapes, count, tokens, ranks = SHAPE_CLASSES[name]
    assert_matches(variant, mixed_case(shapes, count, tokens, ranks, dropout), list(range(len(shapes))))


def test_empty_groups_and_tokens_of_no_adapter(variant: Variant) -> None:
    case = Case(
        [(576, 1536)],
        {0: (16, 0.0, (0,)), 1: (8, 0.5, (0,)), 2: (64, 0.0, (0,)), 3: (24, 0.0, (0,))},
        [1, -1, 0, 3, 2],
        [0, 0, 130, 300, 300, 513],
    )
    assert_matches(variant, case, [0])


def test_runs_are_bitwise_equal(variant: Variant) -> None:
    case = mixed_case([(1024, 2048)], 9, 3000, (8, 64, 100), 0.2)
    first, second = run(variant, case, [0]), run(variant, case, [0])
    assert torch.equal(first.ys[0], second.ys[0])
    assert torch.equal(first.dx, second.dx)
    for key, pair in first.grads.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, second.grads[key], strict=True))


def test_rows_are_the_same_alone_and_among_others(variant: Variant) -> None:
    case = mixed_case([(1024, 2048)], 5, 1000, (8, 64), 0.0)
    # cuBLAS chooses its kernel by the number of rows: beside it, the promise is for the low-rank part alone.
    factor = 1.0 if variant.kernels == CudaKernels.HOPPER else 0.0
    together = run(variant, case, [0], factor)
    x, weights, dys = inputs(variant, case, [0])
    weights = [weight * factor for weight in weights]
    table = variant.table(case)
    start, stop = case.offsets[2], case.offsets[3]
    alone = TickPlan(table, [2], [0, stop - start])
    x = x[start:stop].clone().requires_grad_()
    y = lora_linear(x, weights[0], None, alone, 0)
    y.backward(dys[0][start:stop])
    assert x.grad is not None
    assert torch.equal(y, together.ys[0][start:stop])
    assert torch.equal(x.grad, together.dx[start:stop])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_neighbour_of_nan_leaks_nothing(variant: Variant, dropout: float) -> None:
    case = mixed_case([(1024, 2048)], 5, 1000, (8, 64, 16), dropout)
    clean = run(variant, case, [0])
    x, weights, dys = inputs(variant, case, [0])
    table = variant.table(case)
    case.tensors[2][0][0].fill_(float("nan"))
    case.tensors[2][0][1].fill_(float("inf"))
    table.refresh([2])
    plan = case.plan(table)
    rows = slice(case.offsets[2], case.offsets[3])
    others = torch.ones(1000, dtype=torch.bool)
    others[rows] = False
    for poison_inputs in (False, True):
        if poison_inputs:
            x.detach()[rows] = float("nan")
            dys[0][rows] = float("inf")
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, weights[0], None, plan, 0)
        y.backward(dys[0])
        assert leaf.grad is not None
        assert y[rows].isnan().all()
        assert torch.equal(y[others], clean.ys[0][others])
        assert torch.equal(leaf.grad[others], clean.dx[others])
    table.set_slot(2, rank=16, scale=1.0, weights={0: tuple(torch.zeros_like(t) for t in case.tensors[2][0])})
    assert table.pools.slot_is_bad.sum() == 0  # type: ignore[attr-defined]


def test_gradients_of_others_are_not_touched_by_nan(variant: Variant) -> None:
    case = mixed_case([(1024, 512)], 4, 700, (8, 64), 0.0)
    clean = run(variant, case, [0])
    x, weights, dys = inputs(variant, case, [0])
    table = variant.table(case)
    rows = slice(case.offsets[1], case.offsets[2])
    x[rows], dys[0][rows] = float("nan"), float("nan")
    lora_linear(x, weights[0], None, case.plan(table), 0).backward(dys[0])
    found = gradients(case, [0])
    for slot in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[slot, 0], clean.grads[slot, 0], strict=True))


# Shapes, slots of the segments, whether the adapter of the third segment leaves out the first layer, fresh gradients.
SMALL_NEIGHBOURS: dict[str, tuple[Sequence[tuple[int, int]], Sequence[int], bool, Sequence[int]]] = {
    "one layer": ([(576, 320)], range(6), False, ()),
    "odd widths": ([(200, 72)], range(6), False, ()),
    "shared input": ([(576, 320), (576, 72)], range(6), False, ()),
    "fresh": ([(576, 320)], range(6), False, (0, 2, 3)),
    "a gap": ([(576, 320)], [0, 1, -1, 3, 4, 5], False, ()),
    "a layer without it": ([(576, 320), (576, 72)], range(6), True, ()),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("poisoned", ["x", "dy", "both"])
@pytest.mark.parametrize("name", SMALL_NEIGHBOURS)
def test_small_neighbours_share_their_work_but_no_nan(
    variant: Variant, name: str, poisoned: str, dropout: float
) -> None:
    shapes, slots, leaves_out, fresh = SMALL_NEIGHBOURS[name]
    modules = range(len(shapes))
    adapters = {slot: ((8, 16, 24, 16)[slot % 4], dropout, modules) for slot in range(6)}
    if leaves_out:
        adapters[2] = (*adapters[2][:2], modules[1:])
    case = Case(shapes, adapters, slots, [0, 110, 230, 350, 470, 600, 700])
    owner, row = slots[2], case.offsets[2] + 5

    def gradients_with(poisoned: str) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
        x, weights, dys = inputs(variant, case, modules)
        table = variant.table(case)
        for slot in fresh:
            for _, _, grad_a, grad_b in case.tensors[slot].values():
                grad_a.fill_(float("nan"))
                grad_b.fill_(float("nan"))
        if poisoned in ("x", "both"):
            x[row, 7:] = float("inf")
        if poisoned in ("dy", "both"):
            for dy in dys:
                dy[row] = float("nan")
        with poisoned_memory():
            ys = lora_linears(x.requires_grad_(), weights, case.plan(table, fresh=fresh), modules)
            torch.autograd.backward(ys, dys)
        return gradients(case, modules)

    clean, found = gradients_with("nothing"), gradients_with(poisoned)
    assert clean.keys() == found.keys()
    for (slot, module), pair in found.items():
        if slot == owner:
            assert not pair[1].isfinite().any()
            assert poisoned == "x" or not pair[0].isfinite().any()
        else:
            assert all(grad.isfinite().all() for grad in pair)
            assert all(torch.equal(a, b) for a, b in zip(pair, clean[slot, module], strict=True)), (slot, module)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("slots", [range(8), [1, 0, 3, 2, 7, 6, 5, 4], [0, 1, -1, 2, 3, -1, 7, 5]])
def test_small_neighbours_in_any_order(variant: Variant, dropout: float, slots: Sequence[int]) -> None:
    adapters = {slot: (16 - slot % 2 * 8, dropout, (0,)) for slot in range(8)}
    case = Case([(576, 320)], adapters, list(slots), [0, 100, 230, 256, 400, 400, 530, 640, 700])
    assert_matches(variant, case, [0])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fresh_gradients_are_overwritten(variant: Variant, dropout: float) -> None:
    shapes = [(512, 1024), (512, 256)]
    case = mixed_case(shapes, 7, 1000, (8, 3, 100, 16), dropout)
    x, weights, dys = inputs(variant, case, [0, 1])
    table = variant.table(case)
    zeroed = {slot: {m: [t.clone() for t in four] for m, four in each.items()} for slot, each in case.tensors.items()}
    results = []
    for fresh in ((), (1, 4)):
        for slot, each in case.tensors.items():
            for module, tensors in each.items():
                for i in (2, 3):
                    if slot not in (1, 4):
                        tensors[i].copy_(zeroed[slot][module][i])
                    elif fresh:
                        tensors[i].fill_(float("nan"))
                    else:
                        tensors[i].zero_()
        plan = case.plan(table, fresh=fresh)
        torch.autograd.backward(lora_linears(x.requires_grad_(), weights, plan, [0, 1]), dys)
        results.append(gradients(case, [0, 1]))
    for key, pair in results[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, results[1][key], strict=True)), key


@pytest.mark.parametrize("kernels", cuda_kernels())
def test_bf16_gradients_are_the_rounded_fp32_ones(kernels: CudaKernels) -> None:
    # Ranks that go up in 16 bytes of either format, of neither, and of more than one part.
    case = mixed_case([(512, 1024), (512, 72)], 7, 1000, (8, 4, 3, 100, 16), 0.2)
    found = {}
    for gradient_dtype in (torch.float32, torch.bfloat16):
        variant = Variant(kernels, torch.bfloat16, 6e-3, gradient_dtype)
        x, weights, dys = inputs(variant, case, [0, 1])
        table = variant.table(case)
        old = gradients(case, [0, 1])
        ticks = []
        for fresh in (range(7), ()):  # a first tick and one after it
            if gradient_dtype == torch.float32:
                fresh = range(7)  # each tick's part alone
            plan = case.plan(table, fresh=tuple(fresh))
            torch.autograd.backward(lora_linears(x.requires_grad_(), weights, plan, [0, 1]), dys)
            ticks.append(gradients(case, [0, 1]))
        found[gradient_dtype] = ticks
        assert ticks[0].keys() == old.keys()
    for key in old:
        for i in range(2):
            part = found[torch.float32][0][key][i]
            first, second = (tick[key][i] for tick in found[torch.bfloat16])
            assert torch.equal(first, part.bfloat16()), key
            added = part.bfloat16().float() if kernels == CudaKernels.HOPPER else part
            assert torch.equal(second, (first.float() + added).bfloat16()), key


def test_gradients_at_odd_addresses_leave_their_neighbours_alone(variant: Variant) -> None:
    case = mixed_case([(512, 1024)], 3, 500, (8, 64), 0.0)
    expected = run(variant, case, [0]).grads
    x, weights, dys = inputs(variant, case, [0])
    table = variant.table(case)
    flat = {}
    for slot, each in case.tensors.items():
        a, b, grad_a, grad_b = each[0]
        # One element into the buffer, one between the two, one behind them.
        buffer = torch.full((grad_a.numel() + grad_b.numel() + 3,), float("nan"), device="cuda", dtype=grad_a.dtype)
        moved_a = buffer[1 : 1 + grad_a.numel()].view_as(grad_a).copy_(grad_a)
        moved_b = buffer[2 + grad_a.numel() : -1].view_as(grad_b).copy_(grad_b)
        table.set_slot(slot, rank=a.shape[0], scale=0.5 + slot, weights={0: (a, b, moved_a, moved_b)})
        flat[slot] = buffer, moved_a, moved_b
    lora_linear(x, weights[0], None, case.plan(table), 0).backward(dys[0])
    for slot, (buffer, moved_a, moved_b) in flat.items():
        assert torch.equal(moved_a, expected[slot, 0][0])
        assert torch.equal(moved_b, expected[slot, 0][1])
        assert buffer[[0, 1 + moved_a.numel(), -1]].isnan().all()


def test_bias(variant: Variant) -> None:
    case = mixed_case([(576, 1536)], 2, 300, (8, 16), 0.0)
    x, weights, _ = inputs(variant, case, [0])
    plan = case.plan(variant.table(case))
    bias = torch.randn(1536, device="cuda").to(variant.dtype)
    without = lora_linear(x, weights[0], None, plan, 0)
    with_bias = lora_linear(x, weights[0], bias, plan, 0)
    assert relative_error(with_bias, without.double() + bias.double()) < variant.bound


def test_a_captured_graph_replays(variant: Variant) -> None:
    case = mixed_case([(1024, 2048)], 6, 1500, (8, 64), 0.1)
    expected = run(variant, case, [0])
    x, weights, dys = inputs(variant, case, [0])
    table = variant.table(case)
    plan = case.plan(table)
    x.requires_grad_()
    start = [(tensors[0][2].clone(), tensors[0][3].clone()) for tensors in case.tensors.values()]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = lora_linear(x, weights[0], None, plan, 0)
        (dx,) = torch.autograd.grad(y, x, dys[0])
        return y, dx

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    for tensors, saved in zip(case.tensors.values(), start, strict=True):
        tensors[0][2].copy_(saved[0])
        tensors[0][3].copy_(saved[1])
    y.fill_(float("nan"))
    dx.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected.ys[0])
    assert torch.equal(dx, expected.dx)
    for key, pair in gradients(case, [0]).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, expected.grads[key], strict=True))


def test_the_low_rank_part_beside_a_product_made_elsewhere(variant: Variant) -> None:
    case = mixed_case([(576, 1536)], 4, 700, (8, 64, 100), 0.2)
    x, weights, dys = inputs(variant, case, [0])
    plan = case.plan(variant.table(case))
    y = x @ weights[0].t()
    dx = dys[0] @ weights[0]
    saved = low_rank_forward(y, x, plan, 0)
    low_rank_backward(dys[0], x, saved, plan, 0, dx)
    found = gradients(case, [0])
    expected = float64_oracle(case, x, weights, dys, [0], "cuda", variant.dtype, variant.gradient_dtype)
    assert relative_error(y, expected.ys[0]) < variant.bound
    assert relative_error(dx, expected.dx) < variant.bound
    for key, pair in expected.grads.items():
        assert all(relative_error(a, b) < variant.gradient_bound for a, b in zip(found[key], pair, strict=True))


def test_weights_and_activations_of_another_format_are_refused(variant: Variant) -> None:
    case = mixed_case([(64, 64)], 2, 100, (8,), 0.0)
    plan = case.plan(variant.table(case))
    x = torch.randn(100, 64, device="cuda")
    with pytest.raises(ValueError, match="dtype"):
        lora_linear(x, torch.randn(64, 64, device="cuda"), None, plan, 0)


def test_a_weight_too_large_for_the_format_marks_its_slot(variant: Variant) -> None:
    case = mixed_case([(64, 64)], 3, 300, (8,), 0.0)
    table = variant.table(case)
    case.tensors[1][0][0][0, 0] = 1e30 if variant.dtype == torch.float16 else 3.4e38
    table.refresh([1])
    assert table.pools.slot_is_bad.tolist() == [0, 1, 0]  # type: ignore[attr-defined]


def test_compiles_to_one_graph(variant: Variant) -> None:
    case = mixed_case([(576, 1536)], 3, 500, (8, 16), 0.0)
    x, weights, _ = inputs(variant, case, [0])
    table = variant.table(case)

    def layer(x: torch.Tensor, plan: TickPlan) -> torch.Tensor:
        return lora_linear(x.sin(), weights[0], None, plan, 0).float().square().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (500, 437):
        plan = TickPlan(table, [0, 1, 2], [0, 100, 300, tokens])
        leaf, eager = x[:tokens].clone().requires_grad_(), x[:tokens].clone().requires_grad_()
        compiled(leaf, plan).backward()
        layer(eager, plan).backward()
        assert leaf.grad is not None
        assert eager.grad is not None
        assert torch.equal(leaf.grad, eager.grad)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_the_reference(gradient_dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    made: dict[str, list[AdapterStep]] = {"cuda": [], "cpu": []}
    for i, size in enumerate((1, 17, 70_001, 16_384)):
        buffers = [torch.randn(size, generator=draws) for _ in range(4)]
        buffers[3] = buffers[3].square() * 0.01 + 1e-3
        if i == 3:
            buffers[1][77] = float("inf")
        if i != 1:  # beside one that is fp32
            buffers[1] = buffers[1].to(gradient_dtype)
        for device, steps in made.items():
            moved = [buffer.clone().to(device) for buffer in buffers]
            steps.append(
                AdapterStep(
                    *moved,
                    step=1 + 5 * i,
                    lr=1e-3,
                    lr_b=4e-3,
                    b_start=size // 3,
                    weight_decay=0.1,
                    max_grad_norm=0.5 if i else 0.0,
                    grad_scale=0.5,
                )
            )
    reports = {device: adamw_step(steps, zero_grad=True) for device, steps in made.items()}
    assert reports["cuda"].finite.tolist() == [True, True, True, False]
    torch.testing.assert_close(reports["cuda"].grad_norm[:3].cpu(), reports["cpu"].grad_norm[:3], rtol=1e-5, atol=0.0)
    for mine, wanted in zip(made["cuda"], made["cpu"], strict=True):
        for name in ("param", "exp_avg", "exp_avg_sq", "grad"):
            torch.testing.assert_close(getattr(mine, name).cpu(), getattr(wanted, name), rtol=2e-6, atol=2e-7)
