"""What an assignment may train on, in words that the node understands too: no torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """GPUs of one host (or shares of its CPUs) that an assignment has: their number, kind, and memory of each.

    `devices` are the driver's numbers of the GPUs, in the order of the worker ranks; empty on a CPU.
    """

    count: int
    kind: str
    memory_bytes: int
    devices: tuple[str, ...] = ()
