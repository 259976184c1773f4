"""RMSNorm with its sums: on a GPU against fp64, elsewhere against autograd."""

from __future__ import annotations

import pytest
import torch
from alto_kernels import cuda_available
from alto_kernels.norm import rms_norm, rms_norm_backward

EPSILON = 1e-5
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")]
PLACES = [
    pytest.param("cpu", torch.float64),
    pytest.param("cpu", torch.float32),
    pytest.param("cpu", torch.bfloat16),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]
# Of 16 bits: a rounding of the result, and of what was added up first.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}
# Heads, a warp's row, rows of one to four lines a thread, of several warps, the widest; and what goes through torch.
SHAPES = [
    (33, 64),
    (5, 16),
    (301, 576),
    (64, 8),
    (9, 1024),
    (7, 1032),
    (130, 4096),
    (3, 8200),
    (2, 16384),
    (4, 20),
    (1, 20000),
]


def exactly(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPSILON) * weight


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sums", [False, True], ids=["alone", "with sums"])
def test_values_and_gradient(device: str, dtype: torch.dtype, shape: tuple[int, int], sums: bool) -> None:
    torch.manual_seed(shape[1])
    scale = torch.logspace(-2, 2, shape[0], device=device)[:, None]  # rows of all sizes
    x = (torch.randn(shape, device=device) * scale).to(dtype)
    added = (torch.randn(shape, device=device) * scale).to(dtype) if sums else None
    weight, upstream, beside = (torch.randn(size, device=device).to(dtype) for size in (shape[1], shape, shape))
    total, normed = rms_norm(x, weight, EPSILON, added)
    assert torch.equal(total, x if added is None else x + added)
    exact = total.double().requires_grad_()
    out = exactly(exact, weight.double())
    torch.testing.assert_close(normed.double(), out, **CLOSE[dtype])
    found = rms_norm_backward(upstream, total, weight, EPSILON, beside if sums else None)
    (expected,) = torch.autograd.grad(out, exact, upstream.double())
    expected = expected + beside.double() if sums else expected
    # Rows of small numbers have large gradients.
    rows = expected.abs().amax(-1, keepdim=True).clamp_min(1.0)
    torch.testing.assert_close(found.double() / rows, expected / rows, **CLOSE[dtype])
    assert found.dtype == normed.dtype == dtype


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_heads_are_rows_and_no_rows_are_no_trouble(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, weight = torch.randn(5, 3, 16, device=device).to(dtype), torch.randn(16, device=device).to(dtype)
    _, normed = rms_norm(heads, weight, EPSILON)
    assert normed.shape == heads.shape
    assert torch.equal(normed[2, 1], rms_norm(heads[2, 1:2], weight, EPSILON)[1][0])
    total, nothing = rms_norm(heads[:0], weight, EPSILON)
    assert rms_norm_backward(nothing, total, weight, EPSILON).shape == (0, 3, 16)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_row_that_is_not_finite_stays_alone(device: str, dtype: torch.dtype) -> None:
    x = torch.ones(6, 32, device=device).to(dtype)
    x[2, 5] = float("nan")
    weight = torch.ones(32, device=device).to(dtype)
    total, normed = rms_norm(x, weight, EPSILON, added=x)
    gradient = rms_norm_backward(torch.ones_like(x), total, weight, EPSILON, beside=x)
    for values in (normed, gradient):
        assert values.isnan().any(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")
def test_operands_at_any_address() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(321, device="cuda").bfloat16(), torch.randn(41, device="cuda").bfloat16()[1:]
    shifted, apart = x[1:161].view(4, 40), x[:320].view(4, 80)[:, ::2]
    for one in (shifted, apart):
        total, normed = rms_norm(one, weight, EPSILON, added=one)
        expected_total, expected = rms_norm(one.clone(), weight.clone(), EPSILON, added=one.clone())
        assert torch.equal(normed, expected)
        gradient = rms_norm_backward(one, total, weight, EPSILON, beside=one)
        assert torch.equal(
            gradient, rms_norm_backward(one.clone(), expected_total, weight.clone(), EPSILON, beside=one.clone())
        )
