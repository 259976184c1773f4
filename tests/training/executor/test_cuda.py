"""The same laws on a GPU: left out where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import alto_kernels
import pytest
import torch
from alto_common.tuning import Objective, ObjectiveKind, TrialConfig
from alto_kernels import CudaKernels
from alto_training.executor.backbone import load_backbone, prepare_backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.control import Join
from alto_training.executor.events import TaskStarted, TrialProgress
from alto_training.executor.fitting_passes import FittingPasses
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from test_guests import Shared, guest, host
from tiny_jobs import job, llama_config, run, tiny_llama, train_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = TrialConfig(lora_rank=8, learning_rate=2e-3, batch_size=3, max_steps=8, max_length=32, adam_epsilon=3e-4)
MIX = (CONFIG, replace(CONFIG, lora_rank=16, lora_dropout=0.2, seed=1), replace(CONFIG, target_modules=("q_proj",)))


def on_gpu(
    dtype: torch.dtype, backend: Backend = Backend.REFERENCE, model: Any = None, **changes: Any
) -> dict[str, Any]:
    settings = ExecutorSettings(
        device="cuda",
        backbone_dtype=BackboneDtype.BFLOAT16 if dtype == torch.bfloat16 else BackboneDtype.FLOAT32,
        tokens_per_tick=96,
        backend=backend,
        **changes,
    )
    backbone = prepare_backbone((model or tiny_llama()).to(dtype), "tiny-llama", torch.device("cuda"))
    return {"settings": settings, "backbone": backbone}


@pytest.mark.parametrize("objective", [Objective(), Objective(ObjectiveKind.DPO)])
def test_fp32_on_the_gpu_is_what_the_cpu_gives(tmp_path: Path, objective: Objective) -> None:
    task = job(*MIX, objective=objective)
    _, on_cpu = run(task, tmp_path / "cpu")
    _, on_cuda = run(task, tmp_path / "cuda", **on_gpu(torch.float32))
    assert train_losses(on_cuda) == pytest.approx(train_losses(on_cpu), rel=2e-3)


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float32, Backend.REFERENCE, 1e-5), (torch.bfloat16, Backend.AUTO, 1e-2)],
)
def test_a_pass_begun_before_the_last_one_is_heard_of_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: Backend, tolerance: float
) -> None:
    task = job(*MIX, replace(CONFIG, max_steps=5, seed=6))
    begun: list[bool] = []
    original = FittingPasses._lay_out_ahead

    def lay_out_ahead(self: FittingPasses, *arguments: Any) -> None:
        original(self, *arguments)
        begun.append(self._ahead is not None and self._ahead.losses is not None)

    monkeypatch.setattr(FittingPasses, "_lay_out_ahead", lay_out_ahead)
    found = []
    for name in ("ahead", "in time"):
        options = on_gpu(dtype, backend, model=llama_for_the_kernel())
        # All batches fit one tick.
        options["settings"] = replace(options["settings"], tokens_per_tick=400)
        found.append(train_losses(run(task, tmp_path / name, **options)[1]))
        assert any(begun) is (name == "ahead")
        begun.clear()
        monkeypatch.setattr(FittingPasses, "_begins_ahead", False)
    assert found[0] == pytest.approx(found[1], rel=tolerance)


def llama_for_the_kernel() -> Any:
    """Return a tiny Llama whose heads are 16 wide: the varlen kernel takes multiples of 8."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(hidden_size=64))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, llama_for_the_kernel])
def test_bf16_follows_the_fp32_loss_curve(tmp_path: Path, make: Callable[[], Any], recompute: bool) -> None:
    exact_backbone = prepare_backbone(make(), "tiny", torch.device("cpu"))
    _, exact = run(job(*MIX), tmp_path / "cpu", backbone=exact_backbone)
    _, rounded = run(job(*MIX), tmp_path / "cuda", **on_gpu(torch.bfloat16, model=make(), recompute=recompute))
    assert train_losses(rounded) == pytest.approx(train_losses(exact), rel=2e-2)


def test_parked_adapters_go_to_the_host_and_come_back(tmp_path: Path) -> None:
    together, _ = run(job(*MIX), tmp_path / "together", **on_gpu(torch.float32))
    in_turn, _ = run(job(*MIX), tmp_path / "in-turn", **on_gpu(torch.float32, slots=1))
    expected = {trial.trial_id: trial.best_validation_loss for trial in together.trials}
    for trial in in_turn.trials:
        assert trial.best_validation_loss == pytest.approx(expected[trial.trial_id], rel=1e-3)


def test_a_poisoned_neighbour_leaves_the_others_finite_and_unchanged(tmp_path: Path) -> None:
    poisoned = job(*MIX, replace(CONFIG, learning_rate=1e30, seed=5))
    _, with_poison = run(poisoned, tmp_path / "poisoned", **on_gpu(torch.bfloat16))
    _, without = run(job(*MIX), tmp_path / "clean", **on_gpu(torch.bfloat16))
    kept = [event for event in with_poison if getattr(event, "trial_id", "") != "trial-3"]
    assert train_losses(kept) == pytest.approx(train_losses(without), rel=1e-2)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.AUTO])
def test_four_bits_follow_the_loss_curve_of_the_cpu(tmp_path: Path, backend: Backend) -> None:
    """The same codes, made into fp32 weights on the CPU and into bf16 ones on the GPU."""
    folder = tmp_path / "model"
    smollm2_shapes().save_pretrained(folder)
    _, exact = run(job(*MIX), tmp_path / "exact", backbone=load_backbone(str(folder), in_nf4=True))
    settings = ExecutorSettings(
        device="cuda", backbone_dtype=BackboneDtype.NF4, tokens_per_tick=96, backend=backend, slots=3
    )
    _, rounded = run(job(*MIX, base_model=str(folder)), tmp_path / "rounded", settings=settings, backbone=None)
    assert train_losses(rounded) == pytest.approx(train_losses(exact), rel=2e-2)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.AUTO])
def test_a_guest_and_its_host_train_as_alone(tmp_path: Path, backend: Backend) -> None:
    options = {"dtype": torch.bfloat16, "backend": backend}
    shared = Shared(
        tmp_path / "host",
        {3: [Join(guest(), tmp_path / "guest")]},
        **on_gpu(model=llama_for_the_kernel(), progress_interval_s=0.0, **options),
    )
    shared.run()
    for task in (host(), guest()):
        _, alone = run(task, tmp_path / f"{task.task_id}-alone", **on_gpu(model=llama_for_the_kernel(), **options))
        together = [
            event for event in shared.events if isinstance(event, TrialProgress) and event.task_id == task.task_id
        ]
        assert train_losses(together) == pytest.approx(train_losses(alone), rel=2e-2)
    left = shared.left("guest").outcome
    assert left is not None
    assert left.state == "succeeded"


needs_cutlass = pytest.mark.skipif(not alto_kernels.cuda_available(), reason="no CUDA build, or no GPU for it")


@pytest.fixture(params=[CudaKernels.HOPPER, CudaKernels.GROUPED])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """Make `cutlass` use one family of its kernels, whatever the GPU would get."""
    chosen: CudaKernels = request.param
    if chosen not in alto_kernels.cuda_kernels():
        pytest.skip(f"no {chosen.value} kernels for this GPU")
    monkeypatch.setattr("alto_kernels.table.choose_kernels", lambda dtype, wanted: wanted or chosen)
    return chosen


def smollm2_shapes() -> Any:
    """Return a Llama of two layers with the widths of SmolLM2-135M."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        llama_config(
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            initializer_range=0.04,
        )
    )


def root_mean_square(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) > 0
    return (sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)) ** 0.5


@needs_cutlass
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [llama_for_the_kernel, smollm2_shapes])
def test_the_kernels_are_as_near_to_fp32_as_plain_torch_in_bf16(
    tmp_path: Path, make: Callable[[], Any], recompute: bool, kernels: CudaKernels
) -> None:
    exact_backbone = prepare_backbone(make(), "tiny", torch.device("cpu"))
    _, exact = run(job(*MIX), tmp_path / "cpu", backbone=exact_backbone)
    _, plain = run(job(*MIX), tmp_path / "plain", **on_gpu(torch.bfloat16, model=make()))
    options = on_gpu(torch.bfloat16, Backend.CUTLASS, make(), recompute=recompute)
    _, ours = run(job(*MIX), tmp_path / "ours", **options)
    assert train_losses(ours) == pytest.approx(train_losses(exact), rel=2e-2)
    assert root_mean_square(train_losses(ours), train_losses(exact)) < 1.5 * root_mean_square(
        train_losses(plain), train_losses(exact)
    )


@needs_cutlass
def test_the_kernels_give_the_same_bits_again(tmp_path: Path, kernels: CudaKernels) -> None:
    _, first = run(job(*MIX), tmp_path / "first", **on_gpu(torch.bfloat16, Backend.CUTLASS, llama_for_the_kernel()))
    _, second = run(job(*MIX), tmp_path / "second", **on_gpu(torch.bfloat16, Backend.CUTLASS, llama_for_the_kernel()))
    assert train_losses(first) == train_losses(second)


@needs_cutlass
def test_with_the_kernels_a_poisoned_neighbour_changes_nobody(tmp_path: Path, kernels: CudaKernels) -> None:
    poisoned = job(*MIX, replace(CONFIG, learning_rate=1e30, seed=5))
    options = {"dtype": torch.bfloat16, "backend": Backend.CUTLASS}
    _, with_poison = run(poisoned, tmp_path / "poisoned", **on_gpu(model=llama_for_the_kernel(), **options))
    _, without = run(job(*MIX), tmp_path / "clean", **on_gpu(model=llama_for_the_kernel(), **options))
    kept = [event for event in with_poison if getattr(event, "trial_id", "") != "trial-3"]
    assert train_losses(kept) == pytest.approx(train_losses(without), rel=1e-2)


@needs_cutlass
@pytest.mark.parametrize(("dtype", "usable"), [(torch.bfloat16, True), (torch.float32, False)])
def test_auto_asks_the_kernels_only_for_what_they_take(tmp_path: Path, dtype: torch.dtype, usable: bool) -> None:
    _, events = run(job(*MIX), tmp_path, **on_gpu(dtype, Backend.AUTO))
    (started,) = (event for event in events if isinstance(event, TaskStarted))
    assert started.backend in ({Backend.REFERENCE, Backend.CUTLASS} if usable else {Backend.REFERENCE})


@needs_cutlass
def test_fp32_asked_of_the_kernels_is_refused_in_words() -> None:
    backbone = on_gpu(torch.float32)["backbone"]
    with pytest.raises(alto_kernels.BackendUnavailableError, match="bfloat16 or float16"):
        choose_backend(Backend.CUTLASS, backbone.layers, 2, backbone.device, backbone.dtype)
