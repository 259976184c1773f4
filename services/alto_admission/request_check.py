"""What every request must pass before its handler sees it: the contract's rules, told as callers of a search write."""

from __future__ import annotations

from alto.v1 import error_pb2, tuning_pb2
from alto_common import search_space
from alto_common.errors import DomainError, invalid_fields
from alto_common.rpc.interceptor import validate
from alto_common.violations import Violation
from google.protobuf.message import Message

from alto_admission.search_wire import FIELD_PREFIX, with_names


def check_request(request: Message, max_trials: int) -> None:
    """Raise what `validate` does, and SEARCH_SPACE_INVALID where more than `max_trials` configurations are written out.

    The rules of the contract are for each of them: a hundred thousand would be checked, every other caller waiting,
    before `expanded` could count them.
    """
    spec = getattr(request, "spec", None)
    if not isinstance(spec, tuning_pb2.TuningTaskSpec):
        validate(request)
        return
    count = len(spec.search_space.explicit.configs)
    if count > max_trials:
        violation = Violation(f"{FIELD_PREFIX}explicit.configs", count, search_space.at_most(max_trials))
        raise invalid_fields([violation], error_pb2.ERROR_REASON_SEARCH_SPACE_INVALID)
    try:
        validate(request)
    except DomainError as error:
        raise invalid_fields(with_names(spec.search_space, error.violations)) from error
