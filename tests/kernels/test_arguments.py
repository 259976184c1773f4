"""Errors name the argument that is wrong; the table and the plan keep their promises."""

from __future__ import annotations

import gc

import alto_kernels
import pytest
import torch
from alto_kernels import AdapterTable, BackendUnavailableError, CudaKernels, TickPlan, lora_linear, lora_linears
from alto_kernels.availability import choose_kernels, usable_kernels
from alto_kernels.plan import plan_of


def tensors(rank: int = 4, k: int = 8, n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(rank, k), torch.zeros(n, rank), torch.zeros(rank, k), torch.zeros(n, rank)


def table() -> AdapterTable:
    made = AdapterTable([(8, 6)], max_slots=2)
    made.set_slot(1, rank=4, scale=1.0, weights={0: tensors()})
    return made


def test_back_ends_without_a_gpu() -> None:
    assert alto_kernels.backends()[:2] == ("reference", "cpu")
    assert isinstance(alto_kernels.cuda_available(), bool)
    with pytest.raises(BackendUnavailableError, match="cutlass"):
        AdapterTable([(8, 6)], 1, "cpu", backend="cutlass")


@pytest.mark.parametrize(
    ("architectures", "capability", "dtype", "expected"),
    [
        ("80,90a", (8, 0), torch.bfloat16, (CudaKernels.GROUPED,)),
        ("80,90a", (8, 9), torch.float16, (CudaKernels.GROUPED,)),
        ("80,90a", (9, 0), torch.bfloat16, (CudaKernels.HOPPER, CudaKernels.GROUPED)),
        ("80,90a", (9, 0), torch.float16, (CudaKernels.HOPPER, CudaKernels.GROUPED)),
        ("80,90a", (9, 0), torch.float32, ()),
        ("80,90a", (7, 5), torch.float16, ()),
        ("80,90a", (10, 0), torch.bfloat16, ()),
        ("86-real", (8, 0), torch.bfloat16, ()),
        ("86-real", (8, 9), torch.bfloat16, (CudaKernels.GROUPED,)),
        ("90", (9, 0), torch.bfloat16, (CudaKernels.GROUPED,)),
        ("80", (9, 0), torch.bfloat16, ()),
    ],
)
def test_which_kernels_serve_a_gpu(
    architectures: str, capability: tuple[int, int], dtype: torch.dtype, expected: tuple[CudaKernels, ...]
) -> None:
    assert usable_kernels(architectures, capability, dtype) == expected


def test_without_kernels_for_it_cutlass_says_why() -> None:
    if alto_kernels.cuda_available():
        pytest.skip("they are here")
    with pytest.raises(BackendUnavailableError, match=r"built without CUDA|no GPU|compute capability"):
        choose_kernels(torch.bfloat16, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slot": 2}, "slot=2"),
        ({"slot": -1}, "slot=-1"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 257}, "rank=257"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"weights": {1: tensors()}}, r"weights\[1\]"),
        ({"weights": {0: tensors(rank=5)}}, r"weights\[0\].A: shape"),
        ({"weights": {0: (tensors()[0], tensors()[1].double(), *tensors()[2:])}}, r"weights\[0\].B: dtype"),
        ({"weights": {0: (torch.zeros(8, 4).t(), *tensors()[1:])}}, r"weights\[0\].A: must be contiguous"),
    ],
)
def test_set_slot_refuses(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"slot": 0, "rank": 4, "scale": 1.0, "weights": {0: tensors()}}
    with pytest.raises(ValueError, match=message):
        table().set_slot(**(good | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slots", "offsets", "message"),
    [
        ([1], [0], "offsets: 1 values"),
        ([1], [1, 2], r"offsets\[0\]"),
        ([1, -1], [0, 3, 2], r"offsets\[2\]=2"),
        ([0], [0, 3], "slot=0: empty"),
        ([5], [0, 3], "slot=5"),
        ([1, 1], [0, 3, 5], "named twice"),
    ],
)
def test_plan_refuses(slots: list[int], offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TickPlan(table(), slots, offsets)


@pytest.mark.parametrize("fresh", [[0], [-1], [7]])
def test_plan_refuses_fresh_slots_without_tokens(fresh: list[int]) -> None:
    made = table()
    made.set_slot(0, rank=4, scale=1.0, weights={0: tensors()})
    with pytest.raises(ValueError, match="fresh: slot"):
        TickPlan(made, [1, 0, -1], [0, 3, 3, 5], fresh=fresh)
    with pytest.raises(ValueError, match="fresh: only a training plan"):
        TickPlan(made, [1], [0, 3], training=False, fresh=[1])


def test_gradients_are_of_the_tables_format_alone() -> None:
    with pytest.raises(ValueError, match=r"gradient_dtype=torch\.float16"):
        AdapterTable([(8, 6)], 1, gradient_dtype=torch.float16)
    a, b, grad_a, grad_b = tensors()
    made = AdapterTable([(8, 6)], max_slots=1, gradient_dtype=torch.bfloat16)
    for wrong, name in (((grad_a, grad_b.bfloat16()), "grad_A"), ((grad_a.bfloat16(), grad_b), "grad_B")):
        with pytest.raises(ValueError, match=rf"weights\[0\].{name}: dtype torch.float32, must be torch.bfloat16"):
            made.set_slot(0, rank=4, scale=1.0, weights={0: (a, b, *wrong)})
    with pytest.raises(ValueError, match=r"weights\[0\].A: dtype torch.bfloat16, must be torch.float32"):
        made.set_slot(0, rank=4, scale=1.0, weights={0: (a.bfloat16(), b, grad_a.bfloat16(), grad_b.bfloat16())})
    made.set_slot(0, rank=4, scale=1.0, weights={0: (a, b, grad_a.bfloat16(), grad_b.bfloat16())})
    with pytest.raises(ValueError, match=r"weights\[0\].grad_A: dtype torch.bfloat16, must be torch.float32"):
        table().set_slot(0, rank=4, scale=1.0, weights={0: (a, b, grad_a.bfloat16(), grad_b)})


def test_plan_with_dropout_needs_keys() -> None:
    made = table()
    made.set_slot(0, rank=4, scale=1.0, weights={0: tensors()}, dropout=0.5)
    with pytest.raises(ValueError, match="row_keys: needed"):
        TickPlan(made, [0], [0, 3])
    with pytest.raises(ValueError, match=r"row_keys: torch\.int64"):
        TickPlan(made, [0], [0, 3], torch.zeros(3, dtype=torch.int64))
    assert TickPlan(made, [0], [0, 3], training=False).row_keys is None


def test_linear_refuses_wrong_shapes() -> None:
    made = table()
    plan = TickPlan(made, [1], [0, 3])
    weight = torch.zeros(6, 8)
    with pytest.raises(ValueError, match="x_TK: 4 rows"):
        lora_linear(torch.zeros(4, 8), weight, None, plan, 0)
    with pytest.raises(ValueError, match="weight_NK"):
        lora_linear(torch.zeros(3, 8), weight.t(), None, plan, 0)
    with pytest.raises(ValueError, match="x_TK: 7 columns"):
        lora_linear(torch.zeros(3, 7), weight, None, plan, 0)
    with pytest.raises(ValueError, match="module_index=1"):
        lora_linear(torch.zeros(3, 8), weight, None, plan, 1)
    with pytest.raises(ValueError, match="same length"):
        lora_linears(torch.zeros(3, 8), [weight], plan, [0, 0])


def test_a_plan_is_refused_once_its_table_changed_or_it_is_gone() -> None:
    made = table()
    plan = TickPlan(made, [1], [0, 3])
    x = torch.zeros(3, 8)
    y = lora_linear(x, torch.zeros(6, 8), None, plan, 0)
    handle = plan.handle
    made.clear_slot(0)
    with pytest.raises(ValueError, match="stale"):
        lora_linear(x, torch.zeros(6, 8), None, plan, 0)
    with pytest.raises(ValueError, match="stale"):
        y.sum().backward()
    del plan, y
    gc.collect()
    with pytest.raises(RuntimeError, match="keep a reference"):
        plan_of(handle)


def test_clearing_a_slot_leaves_all_tensors_alone() -> None:
    made = AdapterTable([(8, 6)], max_slots=2)
    mine = tuple(torch.randn_like(tensor) for tensor in tensors())
    kept = [tensor.clone() for tensor in mine]
    made.set_slot(0, rank=4, scale=1.0, weights={0: mine})
    made.set_slot(1, rank=4, scale=1.0, weights={0: tensors()})
    made.clear_slot(0)
    assert made.occupied() == (1,)
    assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True))
