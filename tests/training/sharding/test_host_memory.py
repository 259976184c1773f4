"""Descriptors pass between the ranks of a host, each to the rank that it is for, and a rank that is gone is told of."""

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, sys
import torch.distributed as dist
from alto_training.sharding.host_memory import DescriptorExchange

folder, rank, ranks, rounds, leaves = sys.argv[1], *map(int, sys.argv[2:])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
exchange = DescriptorExchange(dist.group.WORLD)
for number in range(rounds):
    if rank == leaves and number == 1:
        os._exit(0)
    mine = os.memfd_create("mine")
    os.write(mine, f"{rank} brought {number}".encode())
    try:
        found = exchange.exchange(mine)
    except ConnectionError as error:
        print("told:", error, flush=True)
        os._exit(0)
    os.close(mine)
    print([os.pread(one, 100, 0).decode() if one >= 0 else "" for one in found], flush=True)
    for one in found:
        if one >= 0:
            os.close(one)
print("open:", len(os.listdir("/proc/self/fd")) < 64, flush=True)
"""


def run_ranks(folder: Path, ranks: int, rounds: int, leaves: int = -1) -> list[list[str]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), *map(str, (rank, ranks, rounds, leaves))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return told


def test_each_rank_has_what_every_other_brought(tmp_path: Path) -> None:
    ranks, rounds = 3, 40
    for rank, lines in enumerate(run_ranks(tmp_path, ranks, rounds)):
        expected = [
            str(["" if one == rank else f"{one} brought {number}" for one in range(ranks)]) for number in range(rounds)
        ]
        assert lines == [*expected, "open: True"]


def test_a_long_path_of_temporary_files_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 6)
    far.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(far))
    assert [len(lines) for lines in run_ranks(tmp_path, 2, 1)] == [2, 2]
    assert not list(far.iterdir())


def test_a_rank_that_is_gone_is_told_of(tmp_path: Path) -> None:
    first, _, last = run_ranks(tmp_path, 3, 3, leaves=1)
    for lines in (first, last):
        assert len(lines) == 2
        assert lines[1].startswith("told: ")
