"""The synchronous connection: calls that are carried out, repeated and listened to.

`holdoff._aio_connection` is the same with an event loop instead of threads.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import grpc

from holdoff import _calls
from holdoff._core import Counted, report_patience
from holdoff._endpoint import CredentialFile, Endpoint, endpoint_of
from holdoff._forks import Owner, leave_to_parent, use_grpc
from holdoff._platform import boottime_ns
from holdoff._route import Route
from holdoff._timing import SECOND
from holdoff._tracing import headers
from holdoff.errors import HoldoffError, NotFound, Unavailable
from holdoff.v1 import (
    budget_service_pb2_grpc,
    custody_service_pb2_grpc,
    lease_service_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from holdoff._core import Listening, Patience
    from holdoff._endpoint import Tls
    from holdoff.v1 import budget_pb2

ItemT = TypeVar("ItemT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")
SentT_co = TypeVar("SentT_co", covariant=True)


class _Stream(Protocol[SentT_co]):
    """What gRPC gives for a call with many answers."""

    def __iter__(self) -> Iterator[SentT_co]: ...

    def cancel(self) -> bool: ...


class Line:
    """A channel, and what opens streams on it."""

    def __init__(self, number: int, channel: grpc.Channel) -> None:
        self.number = number
        self.channel = channel
        self.leases = lease_service_pb2_grpc.LeaseServiceStub(channel)
        self.budgets = budget_service_pb2_grpc.BudgetServiceStub(channel)
        self.custody = custody_service_pb2_grpc.CustodyServiceStub(channel)


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
        self._tls = tls
        self._credential = CredentialFile(credential_file, self.endpoint, tls)
        self._route = Route(self.endpoint)
        self._counted = Counted()
        self._lock = threading.Lock()
        self._current = self._open()

    def _open(self) -> Line:
        use_grpc()
        number, options = self._route.number, self._route.options()
        where = self._route.target(number)
        channel = (
            grpc.secure_channel(where, grpc.ssl_channel_credentials(*self._tls), options)
            if self._tls
            else grpc.insecure_channel(where, options)
        )
        leave_to_parent(channel)
        return Line(number, channel)

    def _line(self) -> Line:
        """Return the channel to use: a fresh one, once the route goes elsewhere.

        Raises:
            HoldoffError: The client was closed, or this is a forked child.
        """
        self._owner.check()  # before the lock, which in a forked child may be held for ever
        with self._lock:
            self._route.check()
            left, line = None, self._current
            if line.number != self._route.number:
                left, line = line, self._open()
                self._current = line
        if left:
            left.channel.close()
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Leases that are still held run out by themselves."""
        if not self._owner.is_here:
            return
        with self._lock:
            self._route.closed = True
        self._current.channel.close()

    @property
    def _is_private(self) -> bool:
        """Whether nobody on a network can read what is sent."""
        return self._tls is not None or Endpoint.parse(self.endpoint).stays_here

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries: who we are, and the trace that it is part of."""
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

    def _report(
        self, events: Sequence[budget_pb2.Event]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        """Report events of one app; those before them once more if the store may have lost them."""
        outcomes: list[budget_pb2.EventOutcome.ValueType] = []
        for part in _calls.parts(events):
            call, patience = _calls.record_events(part), report_patience(boottime_ns())
            sent_ns, answer = self._insist(call, patience)
            outcomes += answer.outcomes
            self._report_lost(part, answer.store_life)
            self._counted.keep(part, sent_ns)
        return outcomes

    def _report_lost(self, events: Sequence[budget_pb2.Event], life: str) -> None:
        """Send again what the store may have lost; what fails is sent after the next report."""
        for lost in self._counted.lost(events, life, boottime_ns()):
            for part in _calls.parts(lost):
                try:
                    self._call(_calls.record_events(part))
                except NotFound:
                    break  # the token is gone, and what was counted for it
                except HoldoffError:
                    return
        self._counted.learned(events, life)

    def _call(self, call: _calls.Call[Any, ResultT]) -> ResultT:
        timeout_seconds = call.timeout_seconds or self._timeout_seconds
        give_up_ns = boottime_ns() + round(timeout_seconds * SECOND)
        for tries_left in reversed(range(self._route.tries)):
            line = self._line()
            try:
                return self._call_once(line, call, (give_up_ns - boottime_ns()) / SECOND)
            except Unavailable as error:
                if not self._route.is_worth_another_try(line.number, error, tries_left):
                    raise
        raise AssertionError("no try is left, and nothing was raised")

    def _call_once(
        self, line: Line, call: _calls.Call[Any, ResultT], timeout_seconds: float
    ) -> ResultT:
        with self._route.watched(line.number):
            method = line.channel.unary_unary(
                call.method,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.response.FromString,
            )
            response = method(call.request, timeout=timeout_seconds, metadata=self._metadata())
        self._route.answered(line.number)
        return call.read(response)

    def _listen(
        self,
        listening: Listening[ResponseT],
        connect: Callable[[Line], _Stream[ResponseT]],
        on_unreachable: Callable[[Unavailable], None] | None,
    ) -> Generator[ResponseT, None, None]:
        """Yield what a stream sends, for ever."""
        return iter(Subscription(self, listening, connect, on_unreachable))


class Subscription(Generic[ResponseT]):
    """What a stream sends, over as many connections as it takes.

    Args:
        client: Where the coordinator is.
        listening: Decides when to connect again.
        connect: Opens the stream on a channel.
        on_unreachable: Called whenever the coordinator cannot be reached.
    """

    def __init__(
        self,
        client: Connection,
        listening: Listening[ResponseT],
        connect: Callable[[Line], _Stream[ResponseT]],
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> None:
        self._client = client
        self._route = client._route  # noqa: SLF001
        self._listening = listening
        self._connect = connect
        self._on_unreachable = on_unreachable
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._owner = Owner()
        self._stream: _Stream[ResponseT] | None = None

    def __iter__(self) -> Generator[ResponseT, None, None]:
        while not self._closed.is_set():
            line = self._client._line()  # noqa: SLF001
            try:
                with self._route.watched(line.number):
                    try:
                        for response in self._open(line):
                            self._route.answered(line.number)
                            yield self._listening.received(response)
                            self._owner.check()
                    except grpc.RpcError:
                        if self._closed.is_set():  # cancelled here: nothing is wrong with the route
                            return
                        raise
                    raise Unavailable("the coordinator ended the stream")
            except HoldoffError as error:
                if self._closed.is_set():
                    return
                pause_seconds = self._listening.failed(error)
                if self._on_unreachable and isinstance(error, Unavailable):
                    self._on_unreachable(error)
            finally:
                if self._stream and self._owner.is_here:
                    self._stream.cancel()
            self._closed.wait(pause_seconds)

    def _open(self, line: Line) -> _Stream[ResponseT]:
        with self._lock:
            self._stream = self._connect(line)
            leave_to_parent(self._stream)
            if self._closed.is_set():
                self._stream.cancel()
            return self._stream

    def close(self) -> None:
        """End it at once, from any thread."""
        with self._lock:
            self._closed.set()
            if self._stream:
                self._stream.cancel()
