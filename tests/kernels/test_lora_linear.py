"""lora_linear and lora_linears on the CPU against float64 autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from alto_kernels import AdapterTable, TickPlan, lora_linear, lora_linears, low_rank_backward, low_rank_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .lora_cases import Case, Outcome, float64_oracle, relative_error

BACKENDS = ("reference", "cpu")
SHAPES = [(70, 50), (70, 33)]


def run(
    case: Case,
    backend: str,
    modules: Sequence[int] = (0, 1),
    dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype = torch.float32,
) -> Outcome:
    table = case.table(backend, gradient_dtype=gradient_dtype)
    plan = case.plan(table)
    x = case.rows(case.shapes[0][0], 1).to(dtype).requires_grad_()
    ys = lora_linears(x, [w.to(dtype) for w in frozen(case, modules)], plan, modules)
    torch.autograd.backward(ys, [dy.to(dtype) for dy in output_gradients(case, modules)])
    assert x.grad is not None
    grads = {
        (slot, module): (tensors[2], tensors[3])
        for slot, weights in case.tensors.items()
        for module, tensors in weights.items()
        if module in modules
    }
    return Outcome([y.detach() for y in ys], x.grad, grads)


def frozen(case: Case, modules: Sequence[int]) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(2)
    return [
        torch.randn(case.shapes[m][1], case.shapes[m][0], generator=draws) / case.shapes[m][0] ** 0.5 for m in modules
    ]


def output_gradients(case: Case, modules: Sequence[int]) -> list[torch.Tensor]:
    return [case.rows(case.shapes[m][1], 3 + m) for m in modules]


def assert_matches(case: Case, found: Outcome, modules: Sequence[int] = (0, 1), bound: float = 2e-6) -> None:
    expected = float64_oracle(
        case, case.rows(case.shapes[0][0], 1), frozen(case, modules), output_gradients(case, modules), modules
    )
    for y, wanted in zip(found.ys, expected.ys, strict=True):
        assert relative_error(y, wanted) < bound
    assert relative_error(found.dx, expected.dx) < bound
    for key, wanted_pair in expected.grads.items():
        for grad, wanted in zip(found.grads[key], wanted_pair, strict=True):
            assert relative_error(grad, wanted) < bound


MIXED = Case(
    SHAPES,
    {0: (3, 0.0, (0, 1)), 1: (16, 0.25, (0,)), 2: (1, 0.0, (1,)), 3: (37, 0.1, (0, 1))},
    slots=[3, -1, 0, 1, 2],
    offsets=[0, 41, 50, 50, 83, 90],
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend: str) -> None:
    assert_matches(MIXED, run(MIXED, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_within_its_rounding(backend: str) -> None:
    assert_matches(MIXED, run(MIXED, backend, dtype=torch.bfloat16), bound=2e-2)


def assert_rounded_once(case: Case, found: Outcome) -> None:
    """Hold bf16 gradients against float64: each element to the nearest bf16 number, but for the error of fp32."""
    expected = float64_oracle(
        case,
        case.rows(case.shapes[0][0], 1),
        frozen(case, (0, 1)),
        output_gradients(case, (0, 1)),
        (0, 1),
        gradient_dtype=torch.bfloat16,
    )
    for key, wanted_pair in expected.grads.items():
        for grad, wanted in zip(found.grads[key], wanted_pair, strict=True):
            assert grad.dtype == torch.bfloat16
            half_of_last_place = 2.0 ** (torch.frexp(wanted).exponent - 9).double()
            largest_error = half_of_last_place + 1e-5 * wanted.abs().max()
            assert ((grad.double() - wanted).abs() <= largest_error).all(), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_gradients_are_sums_rounded_once(backend: str) -> None:
    found = run(MIXED, backend, gradient_dtype=torch.bfloat16)
    assert_rounded_once(MIXED, found)
    with_fp32 = run(MIXED, backend)
    assert all(torch.equal(y, wanted) for y, wanted in zip(found.ys, with_fp32.ys, strict=True))
    assert torch.equal(found.dx, with_fp32.dx)


def test_many_small_ticks_are_lost_in_bf16_as_documented() -> None:
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        gradients = torch.full((1, 8), 1.0, dtype=dtype), torch.full((8, 1), 1.0, dtype=dtype)
        table = AdapterTable([(8, 8)], 1, "cpu", "cpu", gradient_dtype=dtype)
        table.set_slot(0, rank=1, scale=1.0, weights={0: (torch.ones(1, 8), torch.ones(8, 1), *gradients)})
        plan = TickPlan(table, [0], [0, 1])
        for _ in range(64):
            # Each tick adds 2^-8 to every element of B: half of the last place of bf16 at 1, rounded to the even side.
            lora_linear(torch.full((1, 8), 2.0**-11), torch.zeros(8, 8), None, plan, 0).sum().backward()
        lost[dtype] = 1.0 + 64 * 2.0**-8 - gradients[1]
    assert (lost[torch.float32] == 0.0).all()
    assert (lost[torch.bfloat16] == 64 * 2.0**-8).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes = [(draw(st.integers(1, 80)), draw(st.integers(1, 80)))]
    shapes.append((shapes[0][0], draw(st.integers(1, 80))))
    count = draw(st.integers(1, 5))
    adapters = {
        slot: (
            draw(st.sampled_from([1, 2, 5, 8, 16, 17, 64])),
            draw(st.sampled_from([0.0, 0.0, 0.5])),
            draw(st.sampled_from([(0,), (1,), (0, 1)])),
        )
        for slot in range(count)
    }
    slots = draw(st.permutations([*range(count), -1]))
    lengths = draw(st.lists(st.integers(0, 45), min_size=len(slots), max_size=len(slots)))
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return Case(shapes, adapters, slots, offsets, seed=draw(st.integers(0, 9)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_ragged_mixes_match_float64(case: Case) -> None:
    assert_matches(case, run(case, "cpu"), bound=1e-4)  # single elements may cancel
    assert_rounded_once(case, run(case, "cpu", gradient_dtype=torch.bfloat16))


def test_an_adapter_gets_the_same_bits_alone_and_among_others() -> None:
    together = run(MIXED, "cpu", modules=(0,))
    rows = slice(50, 83)
    x = MIXED.rows(70, 1)[rows].clone().requires_grad_()
    table = MIXED.table("cpu")
    keys = MIXED.plan(table).row_keys
    assert keys is not None
    alone = TickPlan(table, [1], [0, 33], keys[rows])
    # The low-rank part only: the frozen product's own bits may depend on the number of rows.
    y = lora_linear(x, torch.zeros(50, 70), None, alone, 0)
    y.backward(output_gradients(MIXED, (0,))[0][rows])
    for mine, theirs in zip(MIXED.tensors[1][0][2:], together.grads[1, 0], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbour_of_nan_leaks_nothing(backend: str, gradient_dtype: torch.dtype) -> None:
    clean = run(MIXED, backend, gradient_dtype=gradient_dtype)
    table = MIXED.table(backend, gradient_dtype=gradient_dtype)
    for tensors in MIXED.tensors[1].values():
        tensors[0].fill_(float("nan"))
        tensors[1].fill_(float("inf"))
    plan = MIXED.plan(table)
    rows = slice(50, 83)
    x = MIXED.rows(70, 1)
    x[rows] = float("nan")
    x.requires_grad_()
    dys = output_gradients(MIXED, (0, 1))
    for dy in dys:
        dy[rows] = float("nan")
    ys = lora_linears(x, frozen(MIXED, (0, 1)), plan, [0, 1])
    torch.autograd.backward(ys, dys)
    others = torch.ones(90, dtype=torch.bool)
    others[rows] = False
    for y, wanted in zip(ys, clean.ys, strict=True):
        assert torch.equal(y[others], wanted[others])
        assert y[rows].isnan().all()
    assert x.grad is not None
    assert torch.equal(x.grad[others], clean.dx[others])
    for (slot, module), wanted_pair in clean.grads.items():
        if slot != 1:
            for grad, wanted in zip(MIXED.tensors[slot][module][2:], wanted_pair, strict=True):
                assert torch.equal(grad, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_untouched_rows_and_poisoned_buffers(backend: str) -> None:
    table = MIXED.table(backend)
    plan = MIXED.plan(table)
    y = torch.full((90, 33), float("nan"))
    y[:41], y[50:] = 0.0, 0.0
    saved = low_rank_forward(y, MIXED.rows(70, 1), plan, 1)
    assert y[41:50].isnan().all()
    assert (y[50:83] == 0.0).all()  # slot 1 does not adapt module 1
    assert y[:41].isfinite().all()
    saved[50:83] = float("nan")
    saved[83:, 1:] = float("nan")  # beyond the rank of slot 2
    dx = torch.zeros(90, 70)
    low_rank_backward(MIXED.rows(33, 4), MIXED.rows(70, 1), saved, plan, 1, dx)
    assert dx.isfinite().all()
    assert all(tensors[1][2].isfinite().all() for slot, tensors in MIXED.tensors.items() if 1 in tensors)


def test_backward_reaches_adapters_when_x_needs_no_gradient() -> None:
    table = MIXED.table("cpu")
    plan = MIXED.plan(table)
    before = MIXED.tensors[3][0][3].clone()
    lora_linear(MIXED.rows(70, 1), frozen(MIXED, (0,))[0], None, plan, 0).sum().backward()
    assert not torch.equal(before, MIXED.tensors[3][0][3])


def test_bias_and_evaluation_without_dropout() -> None:
    table = MIXED.table("cpu")
    plan = MIXED.plan(table, training=False)
    x, weight = MIXED.rows(70, 1), frozen(MIXED, (0,))[0]
    bias = torch.randn(50)
    y = lora_linear(x, weight, bias, plan, 0)
    expected = x @ weight.t() + bias
    for slot, rows in ((3, slice(0, 41)), (1, slice(50, 83))):
        a, b, *_ = MIXED.tensors[slot][0]
        expected[rows] += (0.5 + slot) * (x[rows] @ a.t() @ b.t())
    assert relative_error(y, expected) < 2e-6


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph_for_every_tick(gradient_dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    table = MIXED.table("cpu", gradient_dtype=gradient_dtype)
    weights = frozen(MIXED, (0, 1))

    def layer(x: torch.Tensor, plan: TickPlan) -> torch.Tensor:
        first, second = lora_linears(x.sin(), weights, plan, [0, 1])
        return first.sum() + second.cos().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (90, 101, 117):
        plan = TickPlan(table, [3, -1, 0], [0, 41, 50, tokens], torch.arange(tokens, dtype=torch.int32))
        x = torch.randn(tokens, 70, requires_grad=True)
        eager = x.detach().clone().requires_grad_()
        gradients = [tensor for each in MIXED.tensors.values() for four in each.values() for tensor in four[2:]]
        found = []
        for run_layer, leaf in ((compiled, x), (layer, eager)):
            for gradient in gradients:
                gradient.zero_()
            run_layer(leaf, plan).backward()
            found.append([leaf.grad, *(gradient.clone() for gradient in gradients)])
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
        assert any((gradient != 0.0).any() for gradient in gradients)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("default")
def test_operators_pass_torchs_own_checks() -> None:
    table = MIXED.table("cpu")
    plan = MIXED.plan(table)
    x = MIXED.rows(70, 1)
    arguments = (x, frozen(MIXED, (0,)), [None], table.anchor.detach(), plan.handle, [0], *_saved(plan))
    torch.library.opcheck(
        torch.ops.alto_kernels.lora_linears,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def _saved(plan: TickPlan) -> tuple[int, int]:
    return plan.saved_rows, plan.saved_columns


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_bf16_gradients_are_the_rounded_fp32_ones(backend: str) -> None:
    found = []
    for gradient_dtype in (torch.float32, torch.bfloat16):
        table = MIXED.table(backend, gradient_dtype=gradient_dtype)
        plan = MIXED.plan(table, fresh=[1, 2, 3])
        ys = lora_linears(MIXED.rows(70, 1), frozen(MIXED, (0, 1)), plan, (0, 1))
        torch.autograd.backward(ys, output_gradients(MIXED, (0, 1)))
        found.append([tensor for slot in (1, 2, 3) for four in MIXED.tensors[slot].values() for tensor in four[2:]])
    for fp32, bf16 in zip(*found, strict=True):
        assert torch.equal(fp32.bfloat16(), bf16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_gradients_are_overwritten_and_others_added_to(backend: str) -> None:
    expected = run(MIXED, backend)
    table = MIXED.table(backend)
    before = {
        (slot, module): tensors[2].clone()
        for slot, weights in MIXED.tensors.items()
        for module, tensors in weights.items()
    }
    for tensors in MIXED.tensors[3].values():
        tensors[2].fill_(float("nan"))
        tensors[3].fill_(float("nan"))
    plan = MIXED.plan(table, fresh=[3])
    x = MIXED.rows(70, 1).requires_grad_()
    torch.autograd.backward(lora_linears(x, frozen(MIXED, (0, 1)), plan, (0, 1)), output_gradients(MIXED, (0, 1)))
    for (slot, module), (grad_a, _) in expected.grads.items():
        alone = grad_a - before[slot, module] if slot == 3 else grad_a
        torch.testing.assert_close(MIXED.tensors[slot][module][2], alone, rtol=1e-5, atol=1e-5)
