"""Whether another service answers: logged when that changes, and now and then while it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import structlog

from alto_training.settings import SERVICE_TOKEN_VARIABLE

REMIND_S = 60.0

log = structlog.get_logger("alto.node")


class Contact:
    """What is known of one service, "placement" or "admission". Times are of the monotonic clock."""

    def __init__(self, service: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._trouble: grpc.StatusCode | None = None
        self._since_s = self._logged_s = 0.0

    def failed(self, error: grpc.RpcError) -> None:
        """Note that a call failed, and not for what it asked."""
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
        now_s = self._clock()
        if self._trouble is None:
            self._since_s = now_s
        elif code is self._trouble and now_s < self._logged_s + REMIND_S:
            return
        self._trouble, self._logged_s = code, now_s
        if code is grpc.StatusCode.UNAUTHENTICATED:
            log.error(
                f"{self._service} refuses this node's service token",
                setting=SERVICE_TOKEN_VARIABLE,
                cure=f"give it the value of ALTO_{self._service.upper()}_SERVICE_TOKEN and start the node again",
                error=in_words(error),
            )
        else:
            log.warning(f"{self._service} does not answer; trying again", error=in_words(error))

    def answered(self) -> None:
        """Note that a call was answered."""
        if self._trouble is not None:
            self._trouble = None
            log.info(f"{self._service} answers again", outage_s=round(self._clock() - self._since_s, 1))


def in_words(error: grpc.RpcError) -> str:
    """Return a failed call's code and details on one line."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
