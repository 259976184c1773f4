"""Loss curves on a GPU in half precision: is a trial among others, by our kernels, as near to the truth as others are?

In bf16 every order of the same arithmetic gives another curve. PEFT alone in fp32, one trial after another, is the
truth. The yardstick is how far from it the curves of others are: plain torch (back end `reference`) with two sizes of
tick, and PEFT alone in bf16. The kernels pass when they are no farther from the truth than the farthest of these, with
a margin: among equals, each is the farthest now and then.

Distances between curves are told too, but judge nothing: plain torch and PEFT round at the same places, after the
frozen product and after the sum, and so share a part of their error.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from alto_common.tuning import TuningJob
from alto_kernels import CudaKernels
from alto_training.executor.backbone import prepare_backbone
from alto_training.executor.events import Event, TrialProgress
from alto_training.executor.executor import Executor
from alto_training.executor.settings import BackboneDtype, Backend, ExecutorSettings
from parity_scenarios import make_job, open_random, trial_mix
from peft_solo import train_alone

Curves = dict[str, list[float]]  # the train loss of every step, by trial

_TOKENS_PER_TICK = 512
_OTHER_TOKENS_PER_TICK = 200
_MARGIN = 1.25


def make_wide_model(dtype: torch.dtype, device: torch.device) -> Any:
    """Return the same Llama every time: 4 layers with the widths of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config).to(dtype).to(device)


def train_together(job: TuningJob, settings: ExecutorSettings, dtype: torch.dtype) -> Curves:
    """Train all trials in one executor."""
    device = torch.device(settings.device)
    losses: dict[str, dict[int, float]] = {}

    def take(event: Event) -> None:
        if isinstance(event, TrialProgress):
            losses.setdefault(event.trial_id, {})[event.step] = event.train_loss

    backbone = prepare_backbone(make_wide_model(dtype, device), "wide-llama", device)
    with tempfile.TemporaryDirectory() as workdir:
        Executor(job, Path(workdir), take, settings, backbone=backbone, open_data=open_random).run()
    return {trial: [steps[step] for step in sorted(steps)] for trial, steps in losses.items()}


def train_each_alone(job: TuningJob, dtype: torch.dtype, device: torch.device) -> Curves:
    """Train one trial after another by PEFT."""
    curves = {}
    for trial in job.trials:
        model = make_wide_model(dtype, device)
        curves[trial.trial_id] = train_alone(model, open_random(job, Path())[0], trial.config, job.objective).losses
    return curves


def distance(first: Curves, second: Curves) -> float:
    """Return the root mean square difference of the losses over all trials and steps; NaN where one has no end."""
    if first.keys() != second.keys() or any(len(first[trial]) != len(second[trial]) for trial in first):
        return math.nan
    squares = [(a - b) ** 2 for trial in first for a, b in zip(first[trial], second[trial], strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def train_with(name: str, job: TuningJob, settings: ExecutorSettings, dtype: torch.dtype) -> Curves:
    """Train all trials with a back end, or with one family of the kernels of `cutlass`: `hopper` or `grouped`."""
    if name not in list(CudaKernels):
        return train_together(job, replace(settings, backend=Backend(name)), dtype)
    with mock.patch("alto_kernels.table.choose_kernels", return_value=CudaKernels(name)):
        return train_together(job, replace(settings, backend=Backend.CUTLASS), dtype)


def measure_curves(trials: int, device_name: str, dtype: torch.dtype, kernels: Sequence[str]) -> dict[str, Any]:
    """Train the mix with each of `kernels` and in the ways that they are held against; distances are RMS of losses."""
    device = torch.device(device_name)
    changes = {"lora_dropout": 0.0, "max_steps": 24}
    job = make_job([replace(config, **changes) for config in trial_mix(trials)], train_path="ragged")
    settings = ExecutorSettings(
        device=device_name,
        backbone_dtype=BackboneDtype.BFLOAT16,
        tokens_per_tick=_TOKENS_PER_TICK,
        backend=Backend.REFERENCE,
    )
    truth = train_each_alone(job, torch.float32, device)
    peers = {
        "reference": train_together(job, settings, dtype),
        "reference, smaller ticks": train_together(
            job, replace(settings, tokens_per_tick=_OTHER_TOKENS_PER_TICK), dtype
        ),
        "PEFT alone": train_each_alone(job, dtype, device),
    }
    spread = max(distance(curves, truth) for curves in peers.values())
    ours = {}
    for name in kernels:
        curves = train_with(name, job, settings, dtype)
        from_truth = distance(curves, truth)
        ours[name] = {
            "from_fp32": from_truth,
            "from_peers": {peer: distance(curves, peers[peer]) for peer in peers},
            "within_spread": from_truth <= _MARGIN * spread,
        }
    return {
        "scenario": "curves",
        "trials": trials,
        "steps": sum(len(losses) for losses in truth.values()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device_name,
        "dtype": str(dtype).removeprefix("torch."),
        "first_and_last_loss": [sum(losses[place] for losses in truth.values()) / len(truth) for place in (0, -1)],
        "margin": _MARGIN,
        "spread": spread,
        "peers_from_fp32": {name: distance(curves, truth) for name, curves in peers.items()},
        "peers_from_each_other": {
            f"{a} - {b}": distance(peers[a], peers[b]) for a, b in itertools.combinations(peers, 2)
        },
        "ours": ours,
    }
