"""Losses and gradients from logits: on a GPU against fp64, elsewhere too."""

from __future__ import annotations

import pytest
import torch
from alto_kernels import cuda_available
from alto_kernels.token_nll import token_nll
from torch.nn.functional import cross_entropy

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")]
PLACES = [
    pytest.param("cpu", torch.float32),
    pytest.param("cpu", torch.bfloat16),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]
# Gradients are rounded once to the format of the logits.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-7},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
}


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 8), (5, 37), (33, 4096), (70, 49152), (9, 151936)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 30.0)])
def test_values_and_gradients(
    device: str, dtype: torch.dtype, rows: int, vocabulary: int, scale: float, softcap: float | None
) -> None:
    torch.manual_seed(vocabulary)
    z = (torch.randn(rows, vocabulary, device=device) * torch.linspace(0.1, 8.0, rows, device=device)[:, None]).to(
        dtype
    )
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    targets[0] = vocabulary - 1
    exact = z.double().requires_grad_()
    logits = exact * scale if softcap is None else softcap * torch.tanh(exact * scale / softcap)
    expected = cross_entropy(logits, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    alone, nothing = token_nll(z.clone(), targets, scale, softcap, wants_gradient=False)
    nll, gradient = token_nll(z.clone(), targets, scale, softcap)
    assert nothing is None
    assert gradient is not None
    assert torch.equal(nll, alone)
    assert gradient.dtype == dtype
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, **CLOSE[dtype])


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_rows_that_are_not_finite_stay_alone_and_tokens_may_be_impossible(device: str, dtype: torch.dtype) -> None:
    z = torch.zeros(5, 4096, device=device).to(dtype)
    z[1, 7], z[3, 4095] = float("nan"), float("inf")
    z[4, :-1] = float("-inf")  # one token is certain
    targets = torch.full((5,), 4095, device=device)
    nll, gradient = token_nll(z, targets)
    assert gradient is not None
    assert nll.isfinite().tolist() == [True, False, True, False, True]
    assert gradient.isfinite().all(1).tolist() == [True, False, True, False, True]
    assert nll[4] == 0.0
    assert gradient[4].abs().max() == 0.0


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    nll, gradient = token_nll(
        torch.zeros(0, 64, device=device, dtype=dtype), torch.zeros(0, dtype=torch.int64, device=device)
    )
    assert nll.shape == (0,)
    assert gradient is not None
    assert gradient.shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")
def test_it_is_done_in_place_by_one_launch() -> None:
    z, targets = torch.randn(64, 1024, device="cuda").bfloat16(), torch.zeros(64, dtype=torch.int64, device="cuda")
    _, gradient = token_nll(z, targets)
    assert gradient is not None
    assert gradient.data_ptr() == z.data_ptr()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        token_nll(z, targets)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "kernel" in event.name]
    assert len(kernels) == 1, kernels
