"""Rotation and gated SiLU: on a GPU against fp64, elsewhere against torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from alto_kernels import cuda_available
from alto_kernels.elementwise import gated_silu, rotated

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")]
PLACES = [
    pytest.param("cpu", torch.float64),
    pytest.param("cpu", torch.float32),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]
# One rounding of what was computed in fp32.
CLOSE = {torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4}, torch.float16: {"rtol": 2**-11, "atol": 1e-4}}


def heads_of(tokens: int, heads: int, width: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Return [1, heads, tokens, width] as attention has it: a view of [1, tokens, heads, width]."""
    return torch.randn(1, tokens, heads, width, device=device, dtype=dtype).transpose(1, 2)


def exactly(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotate pairs (x_i, x_i+D/2), each by an angle of its own, in fp64."""
    found = []
    for x in (q.double(), k.double()):
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        c, s = cos.double()[:, None], sin.double()[:, None]
        found.append(
            torch.cat(
                (first * c[..., :half] - second * s[..., :half], second * c[..., half:] + first * s[..., half:]), -1
            )
        )
    return tuple(found)


def check(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact.double(), **CLOSE.get(ours.dtype, {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "width"), [(1, 1, 1, 16), (37, 4, 2, 64), (300, 32, 8, 128)]
)
def test_rotation_and_its_gradients(
    device: str, dtype: torch.dtype, tokens: int, query_heads: int, key_heads: int, width: int
) -> None:
    torch.manual_seed(tokens)
    q = heads_of(tokens, query_heads, width, device, dtype).requires_grad_()
    k = heads_of(tokens, key_heads, width, device, dtype).requires_grad_()
    cos, sin = torch.randn(2, 1, tokens, width, device=device, dtype=dtype)
    upstream = torch.randn_like(q), heads_of(tokens, key_heads, width, device, dtype).contiguous()
    exact = [one.detach().double().requires_grad_() for one in (q, k)]
    found, expected = rotated(q, k, cos, sin), exactly(*exact, cos, sin)
    check(found, expected)
    check(
        torch.autograd.grad(found, (q, k), upstream),
        torch.autograd.grad(expected, exact, [one.double() for one in upstream]),
    )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_heads_that_do_not_lie_in_lines_rotate_the_same(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, 1, 9, 32, device=device, dtype=dtype)
    wide = torch.randn(1, 3, 9, 67, device=device, dtype=dtype)
    shifted = wide[..., 1:33]  # neither its address nor its strides are multiples of 16 bytes
    turned = torch.randn(1, 3, 32, 9, device=device, dtype=dtype).transpose(2, 3)
    check(rotated(shifted, turned, cos, sin), exactly(shifted, turned, cos, sin))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 37, 96), (1, 300, 1536)])
def test_gated_silu_and_its_gradients(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    gate, up, upstream = (3.0 * torch.randn(3, *shape, device=device)).to(dtype).unbind()
    exact = [one.double().requires_grad_() for one in (gate, up)]
    gate, up = gate.requires_grad_(), up.requires_grad_()
    found, expected = gated_silu(gate, up), exact[0] * torch.sigmoid(exact[0]) * exact[1]
    check([found], [expected])
    check(torch.autograd.grad(found, (gate, up), upstream), torch.autograd.grad(expected, exact, upstream.double()))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_what_does_not_come_in_lines_goes_through_torch(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    gate, up = torch.randn(2, 3, 7, device=device, dtype=dtype)
    assert torch.equal(gated_silu(gate, up), torch.nn.functional.silu(gate) * up)
    q, k = heads_of(5, 3, 24, device, dtype), heads_of(5, 1, 24, device, dtype)
    cos, sin = torch.randn(2, 1, 5, 24, device=device, dtype=dtype)
    for found, x in zip(rotated(q, k, cos, sin), (q, k), strict=True):
        turned = torch.cat((-x[..., 12:], x[..., :12]), -1)
        assert torch.equal(found, x * cos[:, None] + turned * sin[:, None])


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_gates_far_out_are_open_or_shut_and_nan_stays_where_it_is(device: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([100.0, -100.0, 0.0, float("nan"), 1.0, 1.0, 1.0, 1.0], device=device, dtype=dtype)
    gate.requires_grad_()
    up = torch.full_like(gate, 2.0).requires_grad_()
    out = gated_silu(gate, up)
    gradients = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    check([out[:3]], [out.new_tensor([200, 0, 0])])
    check([gradients[0][:2], gradients[1][:3]], [out.new_tensor([2, 0]), out.new_tensor([100, 0, 0])])
    for values in (out, *gradients):
        assert values.isnan().tolist() == [False] * 3 + [True] + [False] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs a GPU that the build is for")
def test_each_is_one_launch() -> None:
    q, k = heads_of(64, 4, 32, "cuda", torch.bfloat16), heads_of(64, 2, 32, "cuda", torch.bfloat16)
    cos, sin = torch.randn(2, 1, 64, 32, device="cuda", dtype=torch.bfloat16)
    gate, up = torch.randn(2, 64, 128, device="cuda", dtype=torch.bfloat16)
    for run in (lambda: rotated(q, k, cos, sin), lambda: gated_silu(gate, up)):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if "kernel" in event.name]
        assert len(kernels) == 1, kernels
