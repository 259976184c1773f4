"""How an executor runs: the machine's choices, none of which changes what a trial becomes beyond rounding."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class BackboneDtype(enum.StrEnum):
    """The number format of the frozen weights and the activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    NF4 = "nf4"


class Backend(enum.StrEnum):
    """Who multiplies the low-rank part: plain torch by segments, or a build of `alto_kernels`; `auto` goes by rule."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    CUTLASS = "cutlass"


@dataclass(frozen=True)
class ExecutorSettings:
    """Settings of one run.

    `tokens_per_tick` bounds the tokens of one forward and backward pass (a longer single sequence still runs alone);
    None lets the memory model choose. `evaluation_tokens_per_tick` bounds a pass without gradients; None: the same.
    `slots` None means one for every trial that memory allows. `recompute` trades time for memory: activations of a
    layer are computed again in the backward pass. `cache_dir` holds tokenised datasets; None puts them under the work
    folder. `checkpoint_every_ticks`, when given, is used besides the interval. `calibrate` measures a dozen ticks
    before the first run over a backbone on this kind of device, and keeps what they cost in `calibrations`, else
    `cache_dir` (None: on accelerators only, where they take seconds). The state of the last `revivable_trials` that a
    policy stopped is kept, so that their user can revive them.
    """

    device: str = "cpu"
    backbone_dtype: BackboneDtype = BackboneDtype.FLOAT32
    backend: Backend = Backend.AUTO
    slots: int | None = None
    tokens_per_tick: int | None = None
    evaluation_tokens_per_tick: int | None = None
    recompute: bool = False
    threads: int | None = None
    checkpoint_interval_s: float = 60.0
    checkpoint_every_ticks: int | None = None
    progress_interval_s: float = 1.0
    revivable_trials: int = 8
    memory_limit_bytes: int | None = None
    calibrate: bool | None = None
    cache_dir: Path | None = None
    calibrations: Path | None = None
