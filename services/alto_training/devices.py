"""What this host can train on, found out without torch: the driver's own list of GPUs, else the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
QUERY_TIMEOUT_S = 20.0
MEBIBYTE = 1024 * 1024
CPU_KIND = "cpu"
_VENDOR_WORDS = ("nvidia", "geforce", "tesla", "quadro")


@dataclass(frozen=True)
class Devices:
    """Worker places of one kind. `indices` are the driver's numbers of the GPUs, empty on a host without any."""

    kind: str
    places: int
    memory_bytes_per_place: int
    indices: tuple[str, ...] = ()

    @property
    def has_gpus(self) -> bool:
        """Whether the places are GPUs."""
        return bool(self.indices)


def query_driver() -> str | None:
    """Return the driver's list of GPUs, one a line; None where there is no driver."""
    if shutil.which(QUERY[0]) is None:
        return None
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return answer.stdout


def find_devices(
    places: int | None, kind: str, device: str, listing: Callable[[], str | None] = query_driver
) -> Devices:
    """Return what to offer. `places` and `kind`, when given, win; `device` "cpu" passes over GPUs."""
    gpus = [] if device == CPU_KIND else _visible(_parse(listing() or ""))
    if not gpus:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count = places or 1
        return Devices(kind or CPU_KIND, count, memory // count)
    gpus = gpus[: places or len(gpus)]
    memory = min(memory_bytes for _, _, memory_bytes in gpus)
    return Devices(kind or short_kind(gpus[0][1]), len(gpus), memory, tuple(index for index, _, _ in gpus))


def short_kind(name: str) -> str:
    """Return the short name of a GPU: "NVIDIA H100 80GB HBM3" -> "h100", "NVIDIA GeForce RTX 4090" -> "rtx-4090"."""
    words = [word for word in name.lower().replace("-", " ").split() if word not in _VENDOR_WORDS]
    if len(words) > 1 and not any(character.isdigit() for character in words[0]):
        return f"{words[0]}-{words[1]}"
    return words[0] if words else "gpu"


def _parse(listing: str) -> list[tuple[str, str, int]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    return [(row[0], row[1], int(row[2]) * MEBIBYTE) for row in rows if len(row) == 3 and row[2].isdigit()]


def _visible(gpus: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Keep to the GPUs that the operator lets this process see."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return gpus
    by_index = {gpu[0]: gpu for gpu in gpus}
    return [by_index[index.strip()] for index in allowed.split(",") if index.strip() in by_index]
