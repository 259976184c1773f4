"""Ranks that read each other's GPU memory: three processes on one GPU, so that one GPU is enough to test them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alto_kernels.copies import copy_lane_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (copy_lane_available() and torch.cuda.is_available()), reason="needs CUDA and the build"),
]

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from alto_training.sharding.gather_order import GatherOrder
from alto_training.sharding.peer_units import PeerEngine
from alto_training.sharding.units import tensor_bytes

folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
device = torch.device("cuda", 0)
torch.cuda.set_device(device)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
engine = PeerEngine(dist.group.WORLD, device)

def make(number, width):
    torch.manual_seed(number)
    layers = nn.Sequential(nn.Linear(700, width), nn.Linear(3, 5)).to(device, torch.bfloat16).requires_grad_(False)
    expected = [one.clone() for one in layers.parameters()]
    return engine.shard(f"unit {number}", layers), layers, expected

made = [make(number, 4000 if number % 3 else 9000) for number in range(8)]
units = [unit for unit, _, _ in made]
expected = {unit: (layers, weights) for unit, layers, weights in made}
assert all(one.numel() == 0 for layers, _ in expected.values() for one in layers.parameters())
order = GatherOrder([], units[:-1], units[-1], prefetch=2, in_lock_step=False)
product = torch.randn(2048, 2048, device=device)
wrong = torch.zeros((), dtype=torch.int64, device=device)
for turn in range(6):
    training = turn % 3 != 2
    order.begin(training)
    for unit in [*units, *reversed(units[:-1])] if training else units:
        order.enter(unit)
        if (turn + rank) % 2:
            product @ product  # ranks come at different times
        layers, weights = expected[unit]
        for mine, right in zip(layers.parameters(), weights, strict=True):
            wrong += (mine != right).sum()
        order.leave(unit)
print("wrong:", wrong.item(), flush=True)

torch.manual_seed(0)
table = nn.Embedding(1000, 96).to(device, torch.bfloat16).requires_grad_(False)
rows = engine.shard_rows(table)
ids = torch.randint(0, 1000, (3, 50), device=device, dtype=torch.int32)
same = torch.equal(rows.read(ids), table(ids).flatten(0, 1))
print("rows:", same, rows.shard_bytes < tensor_bytes([table.weight]) / 2, flush=True)
shares = sum(unit.shard_bytes for unit in units)
print("memory:", shares < engine.uncounted_bytes < 4 * shares, flush=True)
torch.cuda.synchronize()
dist.barrier()
os._exit(0)
"""


def test_what_is_gathered_is_what_was_cut_on_every_rank(tmp_path: Path) -> None:
    ranks = 3
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(ranks)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    for process in started:
        assert process.communicate(timeout=120)[0].splitlines() == ["wrong: 0", "rows: True True", "memory: True"]
        assert process.returncode == 0
