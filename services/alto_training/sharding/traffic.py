"""Counting what torch.distributed sends: every collective of this process, by its kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TrafficMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives that are launched while it is active, and the bytes of their results.

    `calls` and `bytes` are by operator name, such as `_allgather_base_`. It sees what goes through torch's dispatcher:
    collectives of every back end, whoever calls them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then carry on."""
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            self.calls[name] += 1
            self.bytes[name] += _bytes(args[0])
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(each) for each in value) if isinstance(value, list | tuple) else 0
