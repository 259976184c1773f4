"""From what a job names to a backbone in shares: its folder, and who cuts and gathers it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist
from alto_kernels.copies import copy_lane_available
from alto_kernels.mapped_memory import memory_can_be_given

from alto_training.executor.backbone import Backbone
from alto_training.executor.errors import UnsupportedBackboneError
from alto_training.executor.loading import locate_base_model
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from alto_training.sharding.errors import StrategyError
from alto_training.sharding.sharded_backbone import load_sharded_backbone
from alto_training.sharding.strategy import EngineName
from alto_training.sharding.units import ShardingEngine

_DTYPES = {BackboneDtype.FLOAT32: torch.float32, BackboneDtype.BFLOAT16: torch.bfloat16}


def load_shared_backbone(
    base_model: str,
    settings: ExecutorSettings,
    engine: EngineName | None,
    group: dist.ProcessGroup,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
    room_bytes: int = 0,
) -> Backbone:
    """Load a base model in shares on the ranks of `group`; the best engine is taken where none is named.

    Raises `UnsupportedBackboneError`, `ShardedLoadError`.
    """
    dtype = _DTYPES.get(settings.backbone_dtype)
    if dtype is None:
        raise UnsupportedBackboneError(
            f"a backbone in {settings.backbone_dtype} cannot be shared out", "choose float32 or bfloat16"
        )
    cutter = make_engine(engine or best_engine(device), group, device)
    return load_sharded_backbone(str(local_folder(base_model)), cutter, dtype, device, beat, room_bytes)


def local_folder(base_model: str) -> Path:
    """Return the folder of a base model, after fetching it if only a hub has it."""
    location = locate_base_model(base_model)
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))


def best_engine(device: torch.device) -> EngineName:
    """Return the fastest that there is, the same on every rank of a host.

    That is `peer` where `alto_kernels` is built for CUDA, all GPUs here reach each other's memory and their memory can
    be given to other processes, else DeepSpeed or FSDP2.
    """
    if device.type == "cuda" and copy_lane_available():
        pairs = permutations(range(torch.cuda.device_count()), 2)
        reached = all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
        if reached and memory_can_be_given(device):
            return EngineName.PEER
    return EngineName.DEEPSPEED if find_spec("deepspeed") else EngineName.FSDP2


def make_engine(name: EngineName, group: dist.ProcessGroup, device: torch.device) -> ShardingEngine:
    """Return who cuts and gathers. Raises `StrategyError` where what that takes is not here."""
    if name is EngineName.FSDP2:
        from alto_training.sharding.fsdp_units import FsdpEngine

        return FsdpEngine(group, device.type)
    if name is EngineName.PEER:
        from alto_training.sharding.peer_units import PeerEngine

        if device.type != "cuda":
            raise StrategyError(f"engine peer is for GPUs, not {device.type}", "choose engine deepspeed or fsdp2")
        if not copy_lane_available():
            raise StrategyError("alto_kernels is built without CUDA", "build it, or choose engine deepspeed or fsdp2")
        return PeerEngine(group, device)
    from alto_training.sharding.deepspeed_units import DeepSpeedEngine

    try:
        return DeepSpeedEngine(group)
    except ImportError as error:
        raise StrategyError(f"DeepSpeed cannot be imported ({error})", "install it, or choose engine fsdp2") from error
