"""Processes of benchmarks over several GPUs, one a GPU: what they are started with, how they find each other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist


def rank_environment(rank: int, ranks: int, device: str) -> dict[str, str]:
    """Return the environment of one of the processes on `device`, cuda or cpu."""
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    # DeepSpeed compiles an extension with ninja, which lies beside the interpreter.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environment


def join(device: str, rendezvous: str) -> torch.device:
    """Join the other processes by a file that does not exist yet; return this one's device. Waits for all of them."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"file://{rendezvous}"
    if device == "cpu":
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks)
        return torch.device("cpu")
    mine = torch.device(device, rank)
    torch.cuda.set_device(mine)
    dist.init_process_group("nccl", init_method=place, rank=rank, world_size=ranks, device_id=mine)
    return mine


def finished(device: torch.device) -> float:
    """Wait until the device has done all that it was given; return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
