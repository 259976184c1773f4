"""Which trial goes to which worker rank: newcomers to the least loaded, and as few moves as even loads need."""

from __future__ import annotations

from collections.abc import Sequence

_TOLERANCE = 0.1  # a rank may have so much more than the mean before a trial is moved


def deal(loads: Sequence[float], owners: Sequence[int | None], ranks: int) -> list[int]:
    """Return a rank for each trial, given its load (tokens left to train) and the rank that has it now.

    Trials without a rank go, heaviest first, to the least loaded (LPT). Then, while the fullest rank has more than a
    tenth above the mean, the trial whose move to the emptiest lowers the higher of the two most is moved there. The
    same numbers give the same answer everywhere.

    >>> deal([5.0, 3.0, 3.0], [None, None, None], ranks=2)
    [0, 1, 1]
    >>> deal([4.0, 4.0, 1.0, 1.0], [0, 0, 1, 1], ranks=2)
    [1, 0, 0, 1]
    """
    totals = [0.0] * ranks
    dealt: dict[int, int] = {}
    for trial, owner in enumerate(owners):
        if owner is not None:
            dealt[trial] = owner
            totals[owner] += loads[trial]
    newcomers = [trial for trial, owner in enumerate(owners) if owner is None]
    for trial in sorted(newcomers, key=lambda one: (-loads[one], one)):
        dealt[trial] = totals.index(min(totals))
        totals[dealt[trial]] += loads[trial]
    while True:
        fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
        if totals[fullest] <= (1.0 + _TOLERANCE) * sum(totals) / ranks:
            break
        movable = [trial for trial, rank in dealt.items() if rank == fullest]
        best = min(movable, key=lambda one: (_higher(totals, fullest, emptiest, loads[one]), one))
        # Each move must be worth more than a part of the tolerance: no endless shifting of ever smaller differences.
        if _higher(totals, fullest, emptiest, loads[best]) >= totals[fullest] - 0.5 * _TOLERANCE * sum(totals) / ranks:
            break
        dealt[best] = emptiest
        totals[fullest] -= loads[best]
        totals[emptiest] += loads[best]
    return [dealt[trial] for trial in range(len(loads))]


def _higher(totals: Sequence[float], fullest: int, emptiest: int, load: float) -> float:
    return max(totals[fullest] - load, totals[emptiest] + load)
