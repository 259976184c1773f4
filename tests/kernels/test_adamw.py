"""adamw_step against torch.optim.AdamW and clip_grad_norm_, each adapter by itself."""

from __future__ import annotations

import pytest
import torch
from alto_kernels import AdapterStep, adamw_step

SIZES = (1, 17, 70_001)


def buffers(size: int, seed: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    param, grad, exp_avg, exp_avg_sq = (torch.randn(size, generator=draws) for _ in range(4))
    return [param, grad, exp_avg * 0.1, exp_avg_sq.square() * 0.01 + 1e-3]


def by_torch(tensors: list[torch.Tensor], step: AdapterStep) -> list[torch.Tensor]:
    """Return (param, exp_avg, exp_avg_sq) after torch's own clipping and AdamW, in its own two parameter groups."""
    param, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in tensors)
    cut = step.b_start
    leaves = [param[:cut].clone().requires_grad_(), param[cut:].clone().requires_grad_()]
    leaves[0].grad, leaves[1].grad = grad[:cut] * step.grad_scale, grad[cut:] * step.grad_scale
    if step.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(leaves, step.max_grad_norm)
    optimizer = torch.optim.AdamW(
        [{"params": [leaves[0]], "lr": step.lr}, {"params": [leaves[1]], "lr": step.lr_b}],
        betas=step.betas,
        eps=step.eps,
        weight_decay=step.weight_decay,
        foreach=False,
    )
    for leaf, part in zip(leaves, (slice(0, cut), slice(cut, None)), strict=True):
        optimizer.state[leaf] = {
            "step": torch.tensor(float(step.step - 1)),
            "exp_avg": exp_avg[part].clone(),
            "exp_avg_sq": exp_avg_sq[part].clone(),
        }
    optimizer.step()
    states = [optimizer.state[leaf] for leaf in leaves]
    return [
        torch.cat([leaf.detach() for leaf in leaves]),
        torch.cat([state["exp_avg"] for state in states]),
        torch.cat([state["exp_avg_sq"] for state in states]),
    ]


def steps(all_tensors: list[list[torch.Tensor]]) -> list[AdapterStep]:
    made = []
    for i, tensors in enumerate(all_tensors):
        made.append(
            AdapterStep(
                *tensors,
                step=1 + 7 * i,
                lr=1e-3 * (i + 1),
                lr_b=4e-3,
                b_start=tensors[0].numel() // 3,
                betas=(0.9, 0.95 + 0.01 * i),
                eps=1e-8,
                weight_decay=0.1 * i,
                max_grad_norm=0.0 if i == 1 else 0.5,
                grad_scale=0.25 if i == 2 else 1.0,
            )
        )
    return made


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_torch_to_rounding(backend: str) -> None:
    tensors = [buffers(size, i) for i, size in enumerate(SIZES)]
    expected = [by_torch(mine, step) for mine, step in zip(tensors, steps(tensors), strict=True)]
    norms = [(mine[1] * step.grad_scale).norm() for mine, step in zip(tensors, steps(tensors), strict=True)]
    report = adamw_step(steps(tensors), backend=backend)
    assert report.finite.all()
    torch.testing.assert_close(report.grad_norm, torch.stack(norms), rtol=1e-5, atol=0.0)
    for (param, _, exp_avg, exp_avg_sq), wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(param, wanted[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(exp_avg, wanted[1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(exp_avg_sq, wanted[2], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_bf16_gradient_is_read_as_what_it_stands_for(backend: str) -> None:
    narrow, wide = ([buffers(size, i) for i, size in enumerate(SIZES)] for _ in range(2))
    for i in (0, 2):  # beside one that is fp32
        narrow[i][1] = narrow[i][1].bfloat16()
        wide[i][1] = narrow[i][1].float()
    reports = [adamw_step(steps(tensors), zero_grad=True, backend=backend) for tensors in (narrow, wide)]
    assert torch.equal(reports[0].grad_norm, reports[1].grad_norm)
    for mine, wanted in zip(narrow, wide, strict=True):
        assert (mine[1] == 0.0).all()
        assert all(torch.equal(mine[i], wanted[i]) for i in (0, 2, 3))
    narrow[2][1][4] = float("inf")
    before = narrow[2][0].clone()
    assert adamw_step(steps(narrow), backend=backend).finite.tolist() == [True, True, False]
    assert torch.equal(narrow[2][0], before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_its_own_adapter_alone(backend: str, bad: float) -> None:
    tensors = [buffers(size, i) for i, size in enumerate(SIZES)]
    clean = [buffers(size, i) for i, size in enumerate(SIZES)]
    adamw_step(steps(clean), zero_grad=True, backend=backend)
    before = [tensor.clone() for tensor in tensors[2]]
    tensors[2][1][-1] = bad
    report = adamw_step(steps(tensors), zero_grad=True, backend=backend)
    assert report.finite.tolist() == [True, True, False]
    for i in (0, 2, 3):
        assert torch.equal(tensors[2][i], before[i])
    assert all((mine[1] == 0.0).all() for mine in tensors)
    for mine, wanted in zip(tensors[:2], clean[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_the_norm_does_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        tensors = [buffers(300_000, 5)]
        results.append((adamw_step(steps(tensors), backend="cpu").grad_norm, tensors[0][0]))
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][0], norm) and torch.equal(results[0][1], param) for norm, param in results)


def test_errors_name_the_argument() -> None:
    tensors = buffers(8, 0)
    with pytest.raises(ValueError, match="grad"):
        AdapterStep(tensors[0], tensors[1][:4], *tensors[2:], step=1, lr=1.0, lr_b=1.0, b_start=0)
    with pytest.raises(ValueError, match="grad: must be contiguous float32 or bfloat16"):
        AdapterStep(tensors[0], tensors[1].half(), *tensors[2:], step=1, lr=1.0, lr_b=1.0, b_start=0)
    with pytest.raises(ValueError, match=r"param: must be contiguous float32 of"):
        AdapterStep(tensors[0].bfloat16(), *tensors[1:], step=1, lr=1.0, lr_b=1.0, b_start=0)
    with pytest.raises(ValueError, match="step=0"):
        AdapterStep(*tensors, step=0, lr=1.0, lr_b=1.0, b_start=0)
    with pytest.raises(ValueError, match="b_start=9"):
        AdapterStep(*tensors, step=1, lr=1.0, lr_b=1.0, b_start=9)


def test_no_adapters_is_no_work() -> None:
    assert adamw_step([]).finite.numel() == 0
