"""Finding a stopping policy by name: those that ship with ALTO, and those that other packages register.

A package adds one with an entry point in the group "alto.early_exit" whose value is called like the classes here, with
(settings: EarlyExit, trial_ids: Sequence[str]), and returns a `StoppingPolicy`:

    [project.entry-points."alto.early_exit"]
    mine = "my_package.my_policy:MyPolicy"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from alto_common.stopping_policies import plugins, policy_names
from alto_common.tuning import EarlyExit
from alto_common.violations import Violation

from alto_training.early_exit.alto import AltoPolicy
from alto_training.early_exit.asha import AshaPolicy
from alto_training.early_exit.hyperband import HyperbandPolicy
from alto_training.early_exit.median import MedianPolicy
from alto_training.early_exit.none import NoPolicy
from alto_training.early_exit.paper import PaperPolicy
from alto_training.early_exit.policy import StoppingPolicy

Factory = Callable[[EarlyExit, Sequence[str]], StoppingPolicy]

_BUILT_IN: dict[str, Factory] = {
    one.name: one for one in (AltoPolicy, AshaPolicy, HyperbandPolicy, MedianPolicy, NoPolicy, PaperPolicy)
}


class UnknownPolicyError(ValueError):
    """No policy of this name, or settings that none can work with; `violations` say what would be accepted."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(str(violation) for violation in violations))


def make_policy(settings: EarlyExit, trial_ids: Sequence[str]) -> StoppingPolicy:
    """Return a new policy for one task; raise `UnknownPolicyError` if the name or a setting is not acceptable.

    A built-in name cannot be taken over by a plug-in.
    """
    violations = check_settings(settings)
    if violations:
        raise UnknownPolicyError(violations)
    factory = _BUILT_IN.get(settings.policy)
    if factory is None:
        factory = plugins()[settings.policy].load()
    return factory(settings, trial_ids)


def check_settings(settings: EarlyExit, field_prefix: str = "") -> list[Violation]:
    """Return what is wrong with the settings, with the cure; empty when a policy can be made of them."""
    found: list[Violation] = []

    def check(sound: bool, name: str, cure: str) -> None:
        if not sound:
            found.append(Violation(field_prefix + name, getattr(settings, name), cure))

    if settings.policy not in _BUILT_IN:
        check(settings.policy in policy_names(), "policy", "give one of " + ", ".join(policy_names()))
    check(0 <= settings.warmup_fraction <= 1, "warmup_fraction", "give a share of the steps in [0, 1], such as 0.05")
    check(0 < settings.keep_fraction <= 1, "keep_fraction", "give a share of the trials in (0, 1]; 1 stops none")
    check(settings.window >= 2, "window", "give at least 2 evaluations: a slope needs two points")
    check(settings.patience >= 1, "patience", "give at least 1 evaluation")
    check(math.isfinite(settings.gap_threshold), "gap_threshold", "give a finite number, such as 0.1")
    check(math.isfinite(settings.slope_threshold), "slope_threshold", "give a finite number, such as 0.001")
    check(0 < settings.smoothing <= 1, "smoothing", "give a weight in (0, 1]; 1 does not smooth")
    return found
