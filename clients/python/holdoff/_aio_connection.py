"""The connection of the client for asyncio: `holdoff._connection`, in an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc

from holdoff import _calls
from holdoff._core import Counted, report_patience
from holdoff._endpoint import CredentialFile, Endpoint, endpoint_of
from holdoff._forks import Owner, use_grpc
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
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
    from pathlib import Path

    from holdoff._core import Listening, Patience
    from holdoff._endpoint import Tls
    from holdoff.v1 import budget_pb2

ItemT = TypeVar("ItemT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class Line:
    """A channel, and what opens streams on it."""

    def __init__(self, number: int, channel: grpc.aio.Channel) -> None:
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
        # gRPC would take any loop that it finds, and hang in the one that runs later.
        asyncio.get_running_loop()
        self.endpoint = endpoint_of(endpoint)
        self._owner = Owner()
        self._timeout_seconds = timeout_seconds
        self._tls = tls
        self._credential = CredentialFile(credential_file, self.endpoint, tls)
        self._route = Route(self.endpoint)
        self._counted = Counted()
        self._current = self._open()
        self._tasks: set[asyncio.Task[Any]] = set()

    def _open(self) -> Line:
        use_grpc()
        number, options = self._route.number, self._route.options()
        where = self._route.target(number)
        return Line(
            number,
            grpc.aio.secure_channel(where, grpc.ssl_channel_credentials(*self._tls), options)
            if self._tls
            else grpc.aio.insecure_channel(where, options),
        )

    async def _line(self) -> Line:
        """Return the channel to use: a fresh one, once the route goes elsewhere.

        Raises:
            HoldoffError: The client was closed, or this is a forked child.
        """
        self._owner.check()
        self._route.check()
        if self._current.number != self._route.number:
            left, self._current = self._current, self._open()
            await left.channel.close()
        return self._current

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Leases that are still held run out by themselves."""
        if not self._owner.is_here:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._route.closed = True
        await self._current.channel.close()

    @property
    def _is_private(self) -> bool:
        """Whether nobody on a network can read what is sent."""
        return self._tls is not None or Endpoint.parse(self.endpoint).stays_here

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries: who we are, and the trace that it is part of."""
        return (*self._credential.metadata(), *headers())

    async def _items(
        self, call: _calls.Call[Any, _calls.Page[ItemT]] | None
    ) -> AsyncIterator[ItemT]:
        while call:
            page = await self._call(call)
            for item in page.items:
                yield item
            call = page.following

    async def _insist(
        self, call: _calls.Call[Any, ResultT], patience: Patience
    ) -> tuple[int, ResultT]:
        """Repeat a call while it is unavailable; return when it was sent, and its answer."""
        while True:
            sent_ns = boottime_ns()
            try:
                return sent_ns, await self._call(call)
            except HoldoffError as error:
                await asyncio.sleep(patience.failed(error, boottime_ns()))

    async def _report(
        self, events: Sequence[budget_pb2.Event]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        """Report events of one app; those before them once more if the store may have lost them."""
        outcomes: list[budget_pb2.EventOutcome.ValueType] = []
        for part in _calls.parts(events):
            call, patience = _calls.record_events(part), report_patience(boottime_ns())
            sent_ns, answer = await self._insist(call, patience)
            outcomes += answer.outcomes
            await self._report_lost(part, answer.store_life)
            self._counted.keep(part, sent_ns)
        return outcomes

    async def _report_lost(self, events: Sequence[budget_pb2.Event], life: str) -> None:
        """Send again what the store may have lost; what fails is sent after the next report."""
        for lost in self._counted.lost(events, life, boottime_ns()):
            for part in _calls.parts(lost):
                try:
                    await self._call(_calls.record_events(part))
                except NotFound:
                    break  # the token is gone, and what was counted for it
                except HoldoffError:
                    return
        self._counted.learned(events, life)

    async def _call(self, call: _calls.Call[Any, ResultT]) -> ResultT:
        timeout_seconds = call.timeout_seconds or self._timeout_seconds
        give_up_ns = boottime_ns() + round(timeout_seconds * SECOND)
        for tries_left in reversed(range(self._route.tries)):
            line = await self._line()
            try:
                return await self._call_once(line, call, (give_up_ns - boottime_ns()) / SECOND)
            except Unavailable as error:
                if not self._route.is_worth_another_try(line.number, error, tries_left):
                    raise
        raise AssertionError("no try is left, and nothing was raised")

    async def _call_once(
        self, line: Line, call: _calls.Call[Any, ResultT], timeout_seconds: float
    ) -> ResultT:
        with self._route.watched(line.number):
            method = line.channel.unary_unary(
                call.method,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.response.FromString,
            )
            response = await method(
                call.request, timeout=timeout_seconds, metadata=self._metadata()
            )
        self._route.answered(line.number)
        return call.read(response)

    def _start(self, coroutine: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Run a task that `close` ends."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _unhindered(self, work: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """Do what no cancellation may cut short, and be cancelled after it.

        It starts again if its own task is cancelled, as by code that cancels all tasks.
        """
        cancelled: asyncio.CancelledError | None = None
        while True:
            task = asyncio.create_task(work())
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    cancelled = error
            if not task.cancelled():
                break
        if cancelled is None:
            return task.result()
        task.exception()  # not raised, so that it counts as seen
        raise cancelled

    async def _listen(
        self,
        listening: Listening[ResponseT],
        connect: Callable[[Line], grpc.aio.UnaryStreamCall[Any, ResponseT]],
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> AsyncGenerator[ResponseT, None]:
        """Yield what a stream sends, over as many connections as it takes."""
        while True:
            line, stream = await self._line(), None
            try:
                with self._route.watched(line.number):
                    stream = connect(line)
                    while (response := await stream.read()) is not grpc.aio.EOF:
                        self._route.answered(line.number)
                        yield listening.received(cast("ResponseT", response))
                        self._owner.check()
                    raise Unavailable("the coordinator ended the stream")
            except HoldoffError as error:
                pause_seconds = listening.failed(error)
                if on_unreachable and isinstance(error, Unavailable):
                    on_unreachable(error)
            finally:
                if stream:
                    stream.cancel()
            await asyncio.sleep(pause_seconds)
