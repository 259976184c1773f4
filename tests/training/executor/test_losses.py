from __future__ import annotations

import pytest
import torch
from alto_training.executor import losses
from alto_training.executor.losses import OutputHead, token_nll
from torch.nn.functional import cross_entropy


def reference(hidden_RH: torch.Tensor, targets_R: torch.Tensor, head: OutputHead) -> torch.Tensor:
    logits_RV = hidden_RH @ head.weight_VH.t()
    if head.bias_V is not None:
        logits_RV = logits_RV + head.bias_V
    logits_RV = logits_RV * head.scale
    if head.softcap is not None:
        logits_RV = head.softcap * torch.tanh(logits_RV / head.softcap)
    return cross_entropy(logits_RV, targets_R, reduction="none")


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_losses_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float | None, with_bias: bool, chunk_rows: int
) -> None:
    torch.manual_seed(0)
    head = OutputHead(torch.randn(37, 12), torch.randn(37) if with_bias else None, scale, softcap)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", {"cpu": chunk_rows * 37 * 4})
    hidden_RH = torch.randn(11, 12, requires_grad=True)
    targets_R, upstream_R = torch.randint(0, 37, (11,)), torch.randn(11)

    expected_R = reference(hidden_RH, targets_R, head)
    (expected_RH,) = torch.autograd.grad(expected_R, hidden_RH, upstream_R)
    nll_R = token_nll(hidden_RH, targets_R, head)
    (gradient_RH,) = torch.autograd.grad(nll_R, hidden_RH, upstream_R)

    torch.testing.assert_close(nll_R, expected_R)
    torch.testing.assert_close(gradient_RH, expected_RH)


def test_a_row_that_is_not_finite_touches_no_other() -> None:
    torch.manual_seed(0)
    head = OutputHead(torch.randn(37, 12))
    hidden_RH, targets_R = torch.randn(6, 12), torch.randint(0, 37, (6,))
    clean = hidden_RH.clone().requires_grad_()
    poisoned = hidden_RH.clone()
    poisoned[2, 5], poisoned[4, 0] = float("nan"), float("inf")
    poisoned.requires_grad_()
    others = torch.tensor([0, 1, 3, 5])

    expected_R, nll_R = token_nll(clean, targets_R, head), token_nll(poisoned, targets_R, head)
    expected_R.backward(torch.ones(6))
    nll_R.backward(torch.ones(6))

    assert clean.grad is not None
    assert poisoned.grad is not None
    assert torch.equal(nll_R[others], expected_R[others])
    assert torch.equal(poisoned.grad[others], clean.grad[others])
    assert not torch.isfinite(nll_R[2])


def test_no_rows_give_no_losses() -> None:
    hidden_RH = torch.zeros(0, 12, requires_grad=True)
    nll_R = token_nll(hidden_RH, torch.zeros(0, dtype=torch.int64), OutputHead(torch.randn(37, 12)))
    nll_R.sum().backward()  # type: ignore[no-untyped-call]
    assert nll_R.shape == (0,)
