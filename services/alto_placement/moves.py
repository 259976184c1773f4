"""Which of the models that predictions rest on have moved so far that what was predicted by them is out of date.

Every heartbeat teaches the model of its hardware a little, and each of thousands of waiting tasks is predicted by such
a model. What was predicted stays until its model has moved by more than `tolerance` since it was last said to have
moved: what a task is expected to take is then at most about twice that share out of date, for the model's part and for
that of early exits each; the ends of its interval five times as much. (Histories of samples are exempt: what is left of
a task by them depends on what it has done. They move always.)
"""

from __future__ import annotations

import math
from typing import TypeAlias

from alto_placement.durations import DurationModel, Hardware
from alto_placement.exit_shares import ExitShares

# ("hardware", backbone, GPU kind, GPUs), or ("shares" or "trained", tenant, shape): one tenant's history; tenant None:
# that of all, which counts for tenants without one.
Basis: TypeAlias = tuple[str | int | None, ...]

TOLERANCE = 0.01
OF_ENDS = 5.0  # x the tolerance: for the ends of an interval, which nothing is planned by
# Predictions are linear in these: what moves at no corner moves nowhere between. Parts of the fullest tick, lora_rank.
CORNERS = ((1.0, 0.0), (0.1, 0.0), (1.0, 1024.0), (0.1, 1024.0))
PRIORS = (0.1, 1.0)
LEAST_START_S = 1.0

_Figures: TypeAlias = tuple[list[float], list[float]]


def hardware_basis(hardware: Hardware) -> Basis:
    """Return the basis of all that is predicted for this hardware."""
    return "hardware", hardware.backbone, hardware.gpu_kind, hardware.gpus


class Moves:
    """Notes what was learned (`touch`) and says what has moved (`since`)."""

    def __init__(self, model: DurationModel, tolerance: float = TOLERANCE) -> None:
        self._model = model
        self._tolerance = tolerance
        self._touched: set[Basis] = set()
        self._figures: dict[Basis, _Figures] = {}
        self._serial = 0
        self._moved: dict[Basis, int] = {}  # the serial at which each moved last, the latest at the end

    def touch(self, *bases: Basis) -> None:
        """Note that something was learned of these."""
        self._touched.update(bases)

    def since(self, serial: int) -> tuple[list[Basis], int]:
        """Return what has moved after `serial`, and the serial of now."""
        for basis in self._touched:
            figures = self._figures_of(basis)
            if basis[0] == "trained" or self._has_moved(self._figures.get(basis), figures):
                self._figures[basis] = figures
                self._serial += 1
                self._moved.pop(basis, None)
                self._moved[basis] = self._serial
        self._touched.clear()
        newer = []
        for basis, at in reversed(self._moved.items()):
            if at <= serial:
                break
            newer.append(basis)
        return newer, self._serial

    def _has_moved(self, before: _Figures | None, now: _Figures) -> bool:
        if before is None:
            return True
        for old, new, share in ((before[0], now[0], 1.0), (before[1], now[1], OF_ENDS)):
            limit = share * self._tolerance
            if any(abs(b - a) > limit * abs(a) for a, b in zip(old, new, strict=True)):
                return True
        return False

    def _figures_of(self, basis: Basis) -> _Figures:
        match basis:
            case "hardware", str(backbone), str(gpu_kind), int(gpus):
                return self._of_hardware(Hardware(backbone, gpu_kind, gpus))
            case "shares" | "trained" as kind, str() | None as tenant, str(shape):
                return _of_shares(self._model.shares if kind == "shares" else self._model.trained, tenant, shape)
        raise ValueError(f"{basis}: no basis")

    def _of_hardware(self, hardware: Hardware) -> _Figures:
        model = self._model.model(hardware)
        full = model.fullest
        expected = [model.seconds((1.0, part * full, rank), 0.0) for part, rank in CORNERS]
        expected += [full, model.evaluation_token_s, max(LEAST_START_S, model.start_s)]
        return expected, [math.exp(end) for end in model.error_interval((1.0, full, 0.0))]


def _of_shares(shares: ExitShares, tenant: str | None, shape: str) -> _Figures:
    found = [shares.expect(tenant, shape, prior) for prior in PRIORS]
    return [share.expected for share in found], [end for share in found for end in (share.low, share.high)]
