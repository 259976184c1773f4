"""What happens around every call, in this order: log context, credential, scope, validation, the call, its errors."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import protovalidate
import structlog
from alto.v1 import error_pb2
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from alto_common.errors import DomainError, invalid_fields
from alto_common.monitoring import Monitoring
from alto_common.rpc.authentication import (
    OPEN_SERVICES,
    Authenticator,
    Scope,
    bearer_credential,
    current_caller,
    require_scope,
)
from alto_common.rpc.status import status_of
from alto_common.rpc.texts import subscript, texts_with_nul
from alto_common.violations import Violation

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# A violation takes a tenth of a millisecond to put together, and every caller waits for it.
ALL_NAMED_BYTES = 4096

# Raises DomainError for a request that is not to be carried out.
Check: TypeAlias = Callable[[Message], None]

# What a context says once a call was refused, as a number or as the code itself.
_CODES = {key: code for code in grpc.StatusCode for key in (code, code.value[0])}

log = structlog.get_logger("alto.rpc")


def validate(message: Message) -> None:
    """Raise INVALID_FIELD naming each field that breaks a rule, of a large message the first.

    The rules are those of the contract, and that no text holds U+0000: a database cannot keep it.
    """
    first_only = message.ByteSize() > ALL_NAMED_BYTES
    found = chain(_broken_rules(message, first_only), _unstorable_texts(message))
    violations = list(islice(found, 1 if first_only else None))
    if violations:
        raise invalid_fields(violations)


def _broken_rules(message: Message, first_only: bool) -> Iterator[Violation]:
    for found in protovalidate.collect_violations(message, fail_fast=first_only):
        yield Violation(field_path(found.proto.field), found.field_value, found.proto.message)


def _unstorable_texts(message: Message) -> Iterator[Violation]:
    for path, text in texts_with_nul(message):
        yield Violation(path, text, "leave out the NUL character (U+0000)")


def field_path(path: Any) -> str:
    """Return a protovalidate FieldPath as callers write it: spec.search_space.base.lora_rank, configs[3]."""
    text = ""
    for element in path.elements if path else ():
        text += f".{element.field_name}" if text else element.field_name
        if element.subscript is not None:
            text += subscript(element.subscript.value)
    return text


def read(content: bytes, deserialize: Callable[[bytes], Message], check: Check) -> Message:
    """Return the message in `content`, checked; raise INVALID_FIELD, or what `check` raises."""
    if len(content) > MAX_MESSAGE_BYTES:
        cure = f"send at most {MAX_MESSAGE_BYTES:,} bytes in one message: ask for less at a time, or in smaller pieces"
        raise invalid_fields([Violation("request", f"{len(content):,} bytes", cure)])
    try:
        message = deserialize(content)
    except DecodeError as error:
        cure = "send a serialised message of the method's request type, its text in UTF-8"
        raise invalid_fields([Violation("request", f"{len(content)} bytes", cure)]) from error
    check(message)
    return message


async def read_all(
    requests: AsyncIterator[bytes], deserialize: Callable[[bytes], Message], check: Check
) -> AsyncIterator[Message]:
    """Yield a stream's messages, each checked."""
    async for content in requests:
        yield read(content, deserialize, check)


def written(response: Message, serialize: Callable[[Message], bytes]) -> bytes:
    """Return a response as it travels; raise ValueError for one too large, which gRPC would refuse uncounted."""
    content = serialize(response)
    if len(content) > MAX_MESSAGE_BYTES:
        raise ValueError(f"the response has {len(content):,} bytes, a message at most {MAX_MESSAGE_BYTES:,}")
    return content


if TYPE_CHECKING:  # generic in the type stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server. `scopes` maps each method to the scope it needs; a missing method is denied.

    No request gets to its handler that `check` refuses.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        scopes: Mapping[str, Scope],
        monitoring: Monitoring,
        check: Check = validate,
    ) -> None:
        self._authenticator = authenticator
        self._scopes = scopes
        self._monitoring = monitoring
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler with everything around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_SERVICES):
            return handler
        return self._wrapped(method, handler)

    @asynccontextmanager
    async def _around(self, method: str, context: Context, streams: bool = False) -> AsyncIterator[None]:
        """Authenticate, authorise, turn what is raised inside into a status, and count the call."""
        started_s = time.perf_counter()
        if streams:
            self._monitoring.stream_opened(method, 1)
        code = grpc.StatusCode.UNKNOWN
        try:
            async with self._answering(method, context):
                yield
            code = _CODES.get(context.code(), grpc.StatusCode.OK)
        except (asyncio.CancelledError, GeneratorExit):
            left_s = context.time_remaining()
            in_time = left_s is None or left_s > 0
            code = grpc.StatusCode.CANCELLED if in_time else grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except BaseException:
            code = _CODES.get(context.code(), code)
            raise
        finally:
            if streams:
                self._monitoring.stream_opened(method, -1)
            self._monitoring.call_ended(method, code.name, None if streams else time.perf_counter() - started_s)

    @asynccontextmanager
    async def _answering(self, method: str, context: Context) -> AsyncIterator[None]:
        """Authenticate, authorise, and turn what is raised inside into a status."""
        metadata = dict(context.invocation_metadata() or ())
        call_id = secrets.token_hex(6)
        with structlog.contextvars.bound_contextvars(method=method.rpartition("/")[2], call_id=call_id):
            try:
                caller = await self._authenticator.authenticate(bearer_credential(metadata))
                require_scope(method, caller, self._scopes)
                current_caller.set(caller)
                with structlog.contextvars.bound_contextvars(tenant=caller.tenant):
                    yield
            except DomainError as error:
                await context.abort_with_status(rpc_status.to_status(status_of(error)))
            except (grpc.aio.AbortError, grpc.aio.UsageError):
                raise
            except Exception:
                log.exception("call failed")
                internal = DomainError(
                    error_pb2.ERROR_REASON_INTERNAL,
                    f"an error inside ALTO; look for call {call_id} in its logs",
                    metadata={"call_id": call_id},
                )
                await context.abort_with_status(rpc_status.to_status(status_of(internal)))

    def _wrapped(self, method: str, handler: Handler) -> Handler:
        # One of the four is the handler's own; the type stubs describe the synchronous server.
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        deserialize: Any = handler.request_deserializer
        serialize: Any = handler.response_serializer
        check = self._check

        async def unary_unary(request: bytes, context: Context) -> bytes:
            async with self._around(method, context):
                return written(await behaviour(read(request, deserialize, check), context), serialize)

        async def unary_stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
            async with self._around(method, context, streams=True):
                async for response in behaviour(read(request, deserialize, check), context):
                    yield written(response, serialize)

        async def stream_unary(requests: AsyncIterator[bytes], context: Context) -> bytes:
            async with self._around(method, context):
                return written(await behaviour(read_all(requests, deserialize, check), context), serialize)

        async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            async with self._around(method, context, streams=True):
                async for response in behaviour(read_all(requests, deserialize, check), context):
                    yield written(response, serialize)

        # Requests stay as they came until the caller is known; one that cannot be read is refused like any other, and
        # a response that cannot be sent is an error like any other.
        codec = {"request_deserializer": None, "response_serializer": None}
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream_stream, **codec)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(stream_unary, **codec)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary_stream, **codec)
        return grpc.unary_unary_rpc_method_handler(unary_unary, **codec)
