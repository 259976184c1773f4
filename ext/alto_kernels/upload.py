"""Small tables from the host to the device, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 256


def upload(on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `on_host` on the device, where whatever is launched next on the current stream finds it.

    Goes through pinned memory: a copy from pageable memory waits for all that was launched before it.
    """
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def upload_parts(parts: Sequence[bytes], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Upload all parts in one copy; return the bytes (uint8) that hold them, and where in these each begins, aligned.

    A part without content has a place too.
    """
    joined = bytearray()
    starts = []
    for part in parts:
        joined.extend(b"\0" * (-len(joined) % _ALIGNMENT))
        starts.append(len(joined))
        joined.extend(part or b"\0" * _ALIGNMENT)
    return upload(torch.frombuffer(joined, dtype=torch.uint8), device), starts
