"""Early exit: which trials are not worth their remaining steps, decided from loss curves; each decision is explained.

Read `policy` for the contract, `paper` for the rules of the source (arXiv 2604.05426), `registry` for how to add one.
Imports neither torch nor grpc: the executor drives it, and so can a notebook with recorded curves.
"""

from alto_training.early_exit.policy import Decision, Observation, PolicyStateError, StoppingPolicy, Verdict
from alto_training.early_exit.registry import (
    UnknownPolicyError,
    check_settings,
    make_policy,
)

__all__ = [
    "Decision",
    "Observation",
    "PolicyStateError",
    "StoppingPolicy",
    "UnknownPolicyError",
    "Verdict",
    "check_settings",
    "make_policy",
]
