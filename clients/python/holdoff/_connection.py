"""The synchronous connection: calls that are carried out, repeated and listened to.

`holdoff._aio_connection` is the same with an event loop in the place of threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import grpc

from holdoff._core import CHANNEL_OPTIONS
from holdoff._endpoint import CredentialFile, channel_options, endpoint_of, target
from holdoff._forks import Owner
from holdoff._platform import boottime_ns
from holdoff._status import from_rpc_error
from holdoff._tracing import headers
from holdoff.errors import HoldoffError, Unavailable
from holdoff.v1 import budget_service_pb2_grpc, lease_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from holdoff import _calls
    from holdoff._core import Listening, Patience
    from holdoff._endpoint import Tls

ItemT = TypeVar("ItemT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")
SentT_co = TypeVar("SentT_co", covariant=True)


class _Stream(Protocol[SentT_co]):
    """What gRPC gives for a call with many answers."""

    def __iter__(self) -> Iterator[SentT_co]: ...

    def cancel(self) -> bool: ...


class Connection:
    """A way to a coordinator, by which any call of the API is made."""

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout_seconds: float = 10.0,
        tls: Tls | None = None,
        credential_file: str | Path | None = None,
    ) -> None:
        self.endpoint = endpoint_of(endpoint)
        self._owner = Owner()
        self._timeout_seconds = timeout_seconds
        self._credential = CredentialFile(credential_file, self.endpoint, tls)
        where = target(self.endpoint)
        options = [*CHANNEL_OPTIONS, *channel_options(self.endpoint)]
        self._channel = (
            grpc.secure_channel(where, grpc.ssl_channel_credentials(*tls), options)
            if tls
            else grpc.insecure_channel(where, options)
        )
        self._leases = lease_service_pb2_grpc.LeaseServiceStub(self._channel)
        self._budgets = budget_service_pb2_grpc.BudgetServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Leases that are still held run out by themselves."""
        if self._owner.is_here:
            self._channel.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries: who we are, and the trace that it is part of.

        Raises:
            HoldoffError: This is a forked child, in which gRPC does not work.
        """
        if not self._owner.is_here:
            raise HoldoffError(
                f"this client belongs to process {self._owner.pid}, of which this one is a fork: "
                "make a client here"
            )
        return (*self._credential.metadata(), *headers())

    def _items(self, call: _calls.Call[Any, _calls.Page[ItemT]] | None) -> Iterator[ItemT]:
        while call:
            page = self._call(call)
            yield from page.items
            call = page.following

    def _insist(self, call: _calls.Call[Any, ResultT], patience: Patience) -> tuple[int, ResultT]:
        """Repeat a call while it is unavailable; return when it was sent, and its answer."""
        while True:
            sent_ns = boottime_ns()
            try:
                return sent_ns, self._call(call)
            except HoldoffError as error:
                time.sleep(patience.failed(error, boottime_ns()))

    def _call(self, call: _calls.Call[Any, ResultT]) -> ResultT:
        method = self._channel.unary_unary(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.response.FromString,
        )
        with translated(self.endpoint):
            response = method(
                call.request,
                timeout=call.timeout_seconds or self._timeout_seconds,
                metadata=self._metadata(),
            )
        return call.read(response)

    def _listen(
        self,
        listening: Listening[ResponseT],
        connect: Callable[[], _Stream[ResponseT]],
        on_unreachable: Callable[[Unavailable], None] | None,
    ) -> Generator[ResponseT, None, None]:
        """Yield what a stream sends, for ever."""
        return iter(Subscription(self.endpoint, listening, connect, on_unreachable))


@contextlib.contextmanager
def translated(endpoint: str) -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, endpoint) from None


class Subscription(Generic[ResponseT]):
    """What a stream sends, over as many connections as it takes.

    Args:
        endpoint: Where the coordinator is.
        listening: Decides when to connect again.
        connect: Makes a connection.
        on_unreachable: Called whenever the coordinator cannot be reached.
    """

    def __init__(
        self,
        endpoint: str,
        listening: Listening[ResponseT],
        connect: Callable[[], _Stream[ResponseT]],
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._listening = listening
        self._connect = connect
        self._on_unreachable = on_unreachable
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._owner = Owner()
        self._stream: _Stream[ResponseT] | None = None

    def __iter__(self) -> Generator[ResponseT, None, None]:
        while stream := self._open():
            try:
                with translated(self._endpoint):
                    for response in stream:
                        yield self._listening.received(response)
                raise Unavailable("the coordinator ended the stream")
            except HoldoffError as error:
                if self._closed.is_set():
                    return
                pause_seconds = self._listening.failed(error)
                if self._on_unreachable and isinstance(error, Unavailable):
                    self._on_unreachable(error)
            finally:
                if self._owner.is_here:
                    stream.cancel()
            self._closed.wait(pause_seconds)

    def _open(self) -> _Stream[ResponseT] | None:
        with self._lock:
            self._stream = None if self._closed.is_set() else self._connect()
            return self._stream

    def close(self) -> None:
        """End it at once, from any thread."""
        with self._lock:
            self._closed.set()
            if self._stream:
                self._stream.cancel()
