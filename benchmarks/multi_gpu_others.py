"""The others of `multi_gpu.py`: PEFT under FSDP2 or DeepSpeed's ZeRO-3, one adapter at a time, on all GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from alto_training.sharding.deepspeed_extension import load_extension
from benchmark_ranks import finished
from multi_gpu_shapes import LORA_RANK, TARGETS, make_config

TIMED_STEPS = 5


def make_step(strategy: str, shape: str, device: torch.device, dtype: torch.dtype) -> Callable[[Any], None]:
    """Return a training step that takes token ids, [B, L] on each rank."""
    return {"fsdp_peft": fsdp_step, "zero3_peft": zero3_step}[strategy](shape, device, dtype)


def measure(step: Callable[[Any], None], batch: int, length: int, device: torch.device) -> dict[str, float]:
    """Return the tokens per second of all ranks together, after steps that warm up."""
    ids = (torch.arange(length, device=device) * 7 % 251).repeat(batch, 1)
    for _ in range(2):
        step(ids)
    started = finished(device)
    for _ in range(TIMED_STEPS):
        step(ids)
    tokens = dist.get_world_size() * batch * length * TIMED_STEPS
    return {"tokens_per_s": round(tokens / (finished(device) - started), 1)}


def peft_model(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(TARGETS)))


def fsdp_step(shape: str, device: torch.device, dtype: torch.dtype) -> Callable[[Any], None]:
    """Return a step of PEFT under FSDP2: each decoder layer and the whole sharded, base and adapter alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = peft_model(AutoModelForCausalLM.from_config(make_config(shape), dtype=dtype))
    model.to(dtype)
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    for parameter in model.parameters():
        local = parameter.to_local()
        torch.nn.init.normal_(local, 0.0, 0.02)
    # Not parameters: what `to_empty` left of the rotary embedding's buffers is computed anew.
    fresh = type(base.model.rotary_emb)(config=base.config)
    for name, buffer in fresh.named_buffers():
        base.model.rotary_emb.get_buffer(name).copy_(buffer)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def step(ids: Any) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero3_step(shape: str, device: torch.device, dtype: torch.dtype) -> Callable[[Any], None]:
    """Return a step of PEFT under DeepSpeed's ZeRO-3, by its own engine."""
    import deepspeed
    import torch._dynamo  # before zero.Init replaces the constructors of tensors, which its import uses
    from transformers import AutoModelForCausalLM

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
    }
    load_extension()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype):
        model = AutoModelForCausalLM.from_config(make_config(shape), dtype=dtype)
    model = peft_model(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(ids: Any) -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step
