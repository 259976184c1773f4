from __future__ import annotations

import pytest
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor.adapter import AdaptedModule, Adapter
from alto_training.executor.optimizer import adapter_step, take_steps

MODULES = [AdaptedModule(0, "one", 6, 4), AdaptedModule(1, "two", 3, 5)]


def adapter_of_zeros() -> Adapter:
    adapter = Adapter(MODULES, 2, 1.0)
    adapter.allocate()
    return adapter


@pytest.mark.parametrize(
    "config",
    [
        TrialConfig(lora_rank=2, learning_rate=1e-2, max_grad_norm=0.0),
        TrialConfig(lora_rank=2, learning_rate=1e-2, max_grad_norm=0.3, weight_decay=0.1),
        TrialConfig(lora_rank=2, learning_rate=1e-2, lora_plus_ratio=16.0, adam_beta1=0.8, adam_beta2=0.95),
        TrialConfig(lora_rank=2, learning_rate=1e-2, adam_epsilon=1e-3, max_grad_norm=100.0),
    ],
)
def test_steps_are_those_of_torch(config: TrialConfig) -> None:
    torch.manual_seed(0)
    adapter = adapter_of_zeros()
    adapter.param.copy_(torch.randn(adapter.size))
    matrices = adapter.matrices(adapter.param.clone())
    a_matrices = [torch.nn.Parameter(a.clone()) for a, _ in matrices.values()]
    b_matrices = [torch.nn.Parameter(b.clone()) for _, b in matrices.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": a_matrices, "lr": config.learning_rate},
            {"params": b_matrices, "lr": config.learning_rate * config.lora_plus_ratio},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    for step in range(5):
        adapter.grad.copy_(torch.randn(adapter.size))
        gradients = adapter.matrices(adapter.grad)
        for path, a_matrix, b_matrix in zip(gradients, a_matrices, b_matrices, strict=True):
            a_matrix.grad, b_matrix.grad = (gradient.clone() for gradient in gradients[path])
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_([*a_matrices, *b_matrices], config.max_grad_norm)
        optimizer.step()
        (norm,) = take_steps([(adapter_step(adapter, config, step, config.learning_rate), torch.tensor(1.0))])
        assert float(norm) == pytest.approx(float(adapter.grad.norm()), rel=1e-6)

    ours = adapter.matrices(adapter.param)
    for path, a_matrix, b_matrix in zip(ours, a_matrices, b_matrices, strict=True):
        torch.testing.assert_close(ours[path][0], a_matrix.data, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours[path][1], b_matrix.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("loss", "gradient"), [(float("inf"), 1.0), (float("nan"), 1.0), (1.0, float("nan"))])
def test_what_is_not_finite_takes_no_step_and_holds_nobody_up(loss: float, gradient: float) -> None:
    config = TrialConfig(lora_rank=2, learning_rate=1e-2)
    bad, good = adapter_of_zeros(), adapter_of_zeros()
    bad.grad.fill_(1.0)
    bad.grad[3] = gradient
    good.grad.fill_(1.0)
    steps = [adapter_step(adapter, config, 0, config.learning_rate) for adapter in (bad, good)]
    losses = torch.tensor([loss, 1.0], dtype=torch.float64)
    norms = take_steps(list(zip(steps, losses, strict=True)))
    assert norms.isfinite().tolist() == [False, True]
    assert not bad.param.any()
    assert good.param.all()


def test_all_a_lie_before_all_b_and_views_share_the_flat_buffers() -> None:
    adapter = adapter_of_zeros()
    adapter.param.copy_(torch.arange(adapter.size))
    assert adapter.views[0].a_RK.flatten()[0] == 0
    assert adapter.views[1].a_RK.flatten()[0] == 12
    assert adapter.views[0].b_NR.flatten()[0] == adapter.a_size == 18
    adapter.views[1].grad_b_NR.fill_(7.0)
    assert adapter.grad[-10:].eq(7.0).all()
    assert not adapter.grad[:-10].any()


def test_initial_weights_are_drawn_from_the_seed_alone_within_pefts_bounds() -> None:
    first, second, other = (Adapter(MODULES, 2, 1.0) for _ in range(3))
    first.initialise(1)
    second.initialise(1)
    other.initialise(2)
    assert torch.equal(first.param, second.param)
    assert not torch.equal(first.param, other.param)
    assert first.views[0].a_RK.abs().max() <= 6**-0.5
    assert not first.views[0].b_NR.any()
