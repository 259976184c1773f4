"""Attained service that fades: what a tenant used long ago weighs less than what it uses now."""

from __future__ import annotations

import math

HALF_LIFE_S = 7 * 24 * 3600.0


def decayed(usage_gpu_s: float, elapsed_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    """Return `usage_gpu_s` after `elapsed_s` seconds without use. A clock that went back changes nothing."""
    return usage_gpu_s * math.exp(-math.log(2.0) * max(0.0, elapsed_s) / half_life_s)


def accrued(usage_gpu_s: float, held_gpus: int, elapsed_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    """Return the decayed usage after holding `held_gpus` GPUs for the `elapsed_s` seconds just past."""
    elapsed = max(0.0, elapsed_s)
    rate = math.log(2.0) / half_life_s
    fading = math.exp(-rate * elapsed)
    return usage_gpu_s * fading + held_gpus * (1.0 - fading) / rate
