"""Metrics for Prometheus: what this replica did, and how the apps stand.

Counters and histograms are of this replica. Gauges of apps are read from the store when somebody
asks, so every replica tells the same: take `max by (app, …)` of them. Labels are names that an
operator gave; no endpoint, division or holder is one, and tokens are at most `TOKENS_MOST`.

A counter is there from the start, with 0 for all values of its labels: Prometheus does not see the
first event of one that begins at 1.

Names follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import time
from collections import Counter as Tally
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from aiohttp import web
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder

from holdoff._version import VERSION
from holdoff.v1 import audit_pb2, budget_pb2
from holdoff_coordinator.custody.measuring import GrantMeasures
from holdoff_coordinator.failures import STORE_TROUBLES, Failure
from holdoff_coordinator.limits import COUNTED
from holdoff_coordinator.records import read_back_offs, read_budgets, record
from holdoff_coordinator.scripts import READ_BATCH, Stand
from holdoff_coordinator.service import SERVICES
from holdoff_coordinator.store import StoreError

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterator,
        Mapping,
        Sequence,
    )

    from holdoff_coordinator.custody.handout import HandOuts
    from holdoff_coordinator.gate import AccessFile
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

    _Reading = tuple[Gauge, tuple[str, ...], float]

log = structlog.get_logger()

TOKENS_MOST = 1_000
"""Tokens that are shown one by one; of more, `holdoff_tokens_not_shown` tells how many."""
FRESH_SECONDS = 5.0
"""Gauges are not read again so soon."""
ANSWER_SECONDS = 2.0
"""The store must answer within this time to count as up."""
READ_SECONDS = 2.0
"""A scrape reads apps for this long; the remaining ones come first in the next scrape."""
JUDGE_SECONDS = 60.0
"""How often the store is judged anew."""
_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.1, 1, 10, 60, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800)
_CALL = ["service", "method"]
_OF_NO_APP = (
    audit_pb2.AUDIT_KIND_CREDENTIAL_ISSUED,
    audit_pb2.AUDIT_KIND_CREDENTIAL_REVOKED,
    audit_pb2.AUDIT_KIND_CALL_REFUSED,
    audit_pb2.AUDIT_KIND_ACCESS_CHANGED,
)
_OF_APPS = [
    kind
    for kind in audit_pb2.AuditKind.values()
    if kind not in (*_OF_NO_APP, audit_pb2.AUDIT_KIND_UNSPECIFIED)
]


class Metrics(grpc.aio.ServerInterceptor):
    """What one coordinator measures, and how it is served.

    Args:
        scripts: Where the state is read.
        judge: Tells what is unsafe about the store, as `store.check` does.
        limits: What callers may have at once.
    """

    def __init__(
        self,
        scripts: Scripts,
        judge: Callable[[], Awaitable[Sequence[str]]],
        limits: Limits,
    ) -> None:
        self._scripts = scripts
        self._judge = judge
        self._read_at = self._judged_at = -JUDGE_SECONDS
        self._readings: dict[str, list[_Reading]] = {}
        """What was read last of each app; of the one that was read longest ago first."""
        self._reading = asyncio.Lock()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, what: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"holdoff_{name}", what, labels, registry=registry)

        def seconds(
            name: str, what: str, labels: Sequence[str], buckets: Sequence[float]
        ) -> Histogram:
            name = f"holdoff_{name}_seconds"
            return Histogram(name, what, labels, registry=registry, buckets=buckets)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"holdoff_{name}", what, labels, registry=registry)

        self._calls = counter("rpcs", "Calls that ended, by gRPC status", [*_CALL, "code"])
        self._call_seconds = seconds("rpc", "Time that calls with one answer took", _CALL, _QUICK)
        self._open = gauge("rpc_streams_open", "Open calls with many answers", *_CALL)
        self._script_seconds = seconds(
            "store_script", "Time that the store took for a script", ["script"], _QUICK
        )
        self._store_errors = counter("store_errors", "Failed calls of the store", ["reason"])
        for reason in STORE_TROUBLES:  # so that the first one is an increase
            self._store_errors.labels(reason.lower())
        self._damaged = counter(
            "damaged_records",
            "Times that a damaged record was skipped",
            ["app", "kind"],
        )
        self._malformed = counter("malformed_requests", "Requests that could not be decoded")
        self._access_problem = gauge(
            "access_file_problem", "Whether the access file is missing, or invalid", "problem"
        )
        self.watch_access(None)
        self._events = counter(
            "audit_events",
            "Audit events that this replica saw; one entry can count many",
            ["app", "kind"],
        )
        self._waited = seconds("lease_wait", "Time from the request to the grant", ["app"], _LONG)
        self._handed_over = seconds(
            "lease_handover",
            "Time from when a lease became available, with a waiter, to its grant",
            ["app"],
            _QUICK,
        )
        gauge("build_info", "The release that runs", "version").labels(VERSION).set(1)
        self._store_up = gauge("store_up", "Whether the store answered the last check")
        self._unread = gauge(
            "apps_unread",
            "Apps that could not be read in time: their gauges are older, or missing",
        )
        _measure_limits(limits, registry)
        self._store_safe = gauge(
            "store_safe", "Whether the store keeps acknowledged writes, as far as it reports"
        )
        self._not_shown = gauge("tokens_not_shown", "Busy tokens beyond those with gauges", "app")
        self._quarantine = gauge("quarantine_seconds", "Time left without new leases", "app")
        self._held = gauge("lease_held", "Whether the token is held", "app", "token")
        self._waiting = gauge("token_waiters", "Number of waiters", "app", "token")
        self._longest = gauge(
            "token_first_waiter_seconds",
            "How long the first in the queue has waited",
            "app",
            "token",
        )
        self._cooldown = gauge(
            "token_cooldown_seconds", "Time left of the cooldown", "app", "token"
        )
        self._budgets = gauge("budgets", "Budgets in use", "app", "limit", "state")
        self._room = gauge(
            "budget_least_room", "Room in the budget with the least room", "app", "limit"
        )
        self._back_offs = gauge("back_offs", "Back-offs that are not over", "app", "cause", "state")
        self._of_apps: tuple[Gauge, ...] = (
            *(self._not_shown, self._quarantine, self._held, self._waiting, self._longest),
            *(self._cooldown, self._budgets, self._room, self._back_offs),
        )
        self._apps: set[str] = set()
        self._grants: GrantMeasures | None = None
        for service in (*SERVICES, health.SERVICE_NAME):
            for method in Default().FindServiceByName(service).methods:
                for code in grpc.StatusCode:
                    self._calls.labels(service, method.name, code.name)
        for kind in _OF_NO_APP:
            self._events.labels("", _kind_label(kind))
        scripts.on_run = lambda name, took: self._script_seconds.labels(name).observe(took)
        scripts.on_failure = lambda reason: self._store_errors.labels(reason.lower()).inc()
        scripts.on_damage = lambda app, kind: self._damaged.labels(app, kind).inc()

    def watch_access(self, access: AccessFile | None) -> None:
        """Show the state of the access file, if there is one."""

        def has(problem: str) -> float:
            return float(access is not None and access.problem == problem)

        for problem in ("missing", "invalid"):
            self._access_problem.labels(problem).set_function(partial(has, problem))

    def watch_grants(
        self,
        policies: Policies,
        key_ids: Callable[[], Collection[str]],
        hand_outs: HandOuts,
    ) -> None:
        """Measure the grants in custody, too."""
        self._grants = GrantMeasures(
            self.registry, self._scripts, policies, key_ids, hand_outs, TOKENS_MOST
        )
        self._of_apps += self._grants.gauges

    def count_malformed(self) -> None:
        """Count a request that could not be decoded."""
        self._malformed.inc()

    def count(self, event: Mapping[bytes, bytes]) -> None:
        """Count an entry of the audit trail."""
        resource = event[b"resource"].decode().split("/")
        app = resource[1] if resource[0] == "apps" and len(resource) > 1 else ""
        self._events.labels(app, event[b"kind"].decode().lower()).inc()
        if self._grants:
            self._grants.count(app, event)
        if b"waited_us" in event:
            self._waited.labels(app).observe(int(event[b"waited_us"]) / 1e6)
            self._handed_over.labels(app).observe(max(0, int(event[b"handover_us"])) / 1e6)

    def _begin(self, app: str) -> None:
        """Tell 0 of all that has not happened to an app yet."""
        if app not in self._apps:
            self._apps.add(app)
            for kind in _OF_APPS:
                self._events.labels(app, _kind_label(kind))

    # Calls -----------------------------------------------------------------

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Measure a call of a method that there is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        _, *names = handler_call_details.method.split("/")
        kind = "_".join(
            "stream" if streams else "unary"
            for streams in (handler.request_streaming, handler.response_streaming)
        )
        behaviour = getattr(handler, kind)
        if inspect.isasyncgenfunction(behaviour):
            answer = self._measured_stream(behaviour, names)
        else:
            answer = self._measured(behaviour, names)
        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        return wrap(answer, handler.request_deserializer, handler.response_serializer)

    def _measured(self, handler: Any, names: Sequence[str]) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            began = time.perf_counter()
            with self._ending(names, context):
                try:
                    return await handler(request, context)
                finally:
                    self._call_seconds.labels(*names).observe(time.perf_counter() - began)

        return answer

    def _measured_stream(self, handler: Any, names: Sequence[str]) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._open.labels(*names).track_inprogress(), self._ending(names, context):
                async with contextlib.aclosing(handler(request, context)) as responses:
                    async for response in responses:
                        yield response

        return answer

    @contextlib.contextmanager
    def _ending(self, names: Sequence[str], context: Any) -> Iterator[None]:
        """Count how a call ends."""
        code = grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = _status(context.code())
            raise
        finally:
            self._calls.labels(*names, code.name).inc()

    # The page --------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def served(self, listen: str) -> AsyncIterator[str]:
        """Serve `/metrics` and nothing else; give the address.

        Raises:
            OSError: The port is taken or the address is not ours.
        """
        app = web.Application()
        app.router.add_get("/metrics", self._page)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        host, _, port = listen.rpartition(":")
        try:
            site = web.TCPSite(runner, host.strip("[]"), int(port))
            await site.start()
            yield f"{host}:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        async with self._reading:
            if time.monotonic() - self._read_at >= FRESH_SECONDS:
                await self._look()
                self._read_at = time.monotonic()
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
            # In a thread: with 2,000 apps it takes a second.
            body = await asyncio.to_thread(encode, self.registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _look(self) -> None:
        """Read the state of the apps; without a store there are no gauges of apps.

        The store is up if it answers, also if not all apps could be read in time. The next look
        begins with those that were not read.
        """
        apps: list[str] = []
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                apps = await self._scripts.apps()
                if time.monotonic() - self._judged_at >= JUDGE_SECONDS:
                    self._store_safe.set(await self._is_safe())
                    self._judged_at = time.monotonic()
            self._store_up.set(1)
        except (Failure, TimeoutError) as error:
            log.warning("metrics without the state of apps", reason=type(error).__name__)
            self._store_up.set(0)
        for app in apps:
            self._begin(app)
            await asyncio.sleep(0)  # the first time they may be many
        before, self._readings = self._readings, {}
        unread = set(apps)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_SECONDS):
                await self._read(apps, before, unread)
        self._unread.set(len(unread))
        known = {app: before[app] for app in before if app in unread}
        self._readings = known | self._readings
        for gauge in self._of_apps:
            gauge.clear()
        for gauge, labels, value in itertools.chain.from_iterable(self._readings.values()):
            gauge.labels(*labels).set(value)

    async def _read(
        self, apps: Sequence[str], before: dict[str, list[_Reading]], unread: set[str]
    ) -> None:
        """Read how apps stand, those that were read longest ago first; note which are left."""
        at = {app: number for number, app in enumerate(before)}
        busy = set(await self._scripts.apps_with("due", "budgets", "backoffs", "grants"))
        stands = await self._scripts.stands(apps)
        for app in sorted(apps, key=lambda one: at.get(one, -1)):
            stand = stands.get(app)
            try:
                if app in busy or not isinstance(stand, Stand):
                    self._readings[app] = await self._read_busy(app)
                else:
                    left_us = max(0, stand.quarantine_until_us - await self._scripts.now_us(app))
                    self._readings[app] = [(self._quarantine, (app,), left_us / 1e6)]
            except Failure:  # which is logged, and counted
                before.pop(app, None)
            else:
                unread.discard(app)

    async def _read_busy(self, app: str) -> list[_Reading]:
        found: list[_Reading] = []
        grants = [self._grants.read] if self._grants else []
        for read in (self._tokens, self._budgets_of, self._back_offs_of, *grants):
            with self._scripts.sparing(app, "app"):
                found += await read(app)
        return found

    async def _is_safe(self) -> bool:
        """Judge a store that answers."""
        try:
            return not await self._judge()
        except StoreError as error:  # it is not fit any more
            log.warning("the store is not safe", reason=str(error))
            return False

    async def _tokens(self, app: str) -> list[_Reading]:
        found: list[_Reading] = []
        busy = await self._scripts.busy_tokens(app)
        if len(busy) > TOKENS_MOST:
            found.append((self._not_shown, (app,), len(busy) - TOKENS_MOST))
        shown = busy[:TOKENS_MOST]
        for start in range(0, len(shown), READ_BATCH):
            reply = await self._scripts.run("read", app, *shown[start : start + READ_BATCH])
            for token_id, flat, lease_id, _, waiting, _, _, first_us, running in reply.values[0]:
                labels, token = (app, token_id.decode()), record(flat)
                with self._scripts.sparing(app, f"tokens/{labels[1]}"):
                    cooldown_us = max(0, int(token.get("not_before_us", b"0")) - reply.now_us)
                    waits_us = reply.now_us - int(first_us) if int(first_us) else 0
                    found += [
                        (
                            self._held,
                            labels,
                            float(bool(lease_id or int(running)) or "foreign" in token),
                        ),
                        (self._waiting, labels, int(waiting)),
                        (self._longest, labels, max(0, waits_us) / 1e6),
                        (self._cooldown, labels, cooldown_us / 1e6),
                    ]
        return found

    async def _budgets_of(self, app: str) -> list[_Reading]:
        states: Tally[tuple[str, str]] = Tally()
        room: dict[str, int] = {}
        ids = await self._scripts.budgets(app)
        for start in range(0, len(ids), READ_BATCH):
            reply = await self._scripts.run("read_budgets", app, *ids[start : start + READ_BATCH])
            for one in read_budgets(self._scripts, app, reply):
                state = budget_pb2.BudgetState.Name(one.state).removeprefix("BUDGET_STATE_")
                states[one.limit, state.lower()] += 1
                room[one.limit] = min(one.room, room.get(one.limit, one.room))
        return [
            *((self._budgets, (app, *key), number) for key, number in states.items()),
            *((self._room, (app, limit), number) for limit, number in room.items()),
        ]

    async def _back_offs_of(self, app: str) -> list[_Reading]:
        reply = await self._scripts.run("read_back_offs", app, "", "", "")
        kinds: Tally[tuple[str, str]] = Tally()
        for one in read_back_offs(self._scripts, app, reply):
            cause = budget_pb2.BackOffCause.Name(one.cause).removeprefix("BACK_OFF_CAUSE_")
            state = budget_pb2.BackOffState.Name(one.state).removeprefix("BACK_OFF_STATE_")
            kinds[cause.lower(), state.lower()] += 1
        stand = (await self._scripts.stands([app]))[app]
        if isinstance(stand, Failure):
            raise stand
        left_us = max(0, stand.quarantine_until_us - reply.now_us)
        return [
            (self._quarantine, (app,), left_us / 1e6),
            *((self._back_offs, (app, *key), number) for key, number in kinds.items()),
        ]


def _measure_limits(limits: Limits, registry: CollectorRegistry) -> None:
    """Show the limits, the highest use by any one caller, and how often they were reached."""
    refusals = Counter(
        "holdoff_limit_refusals",
        "Calls refused because their caller had reached a limit",
        ["limit"],
        registry=registry,
    )
    value = Gauge("holdoff_limit", "What one caller may have at once", ["limit"], registry=registry)
    used = Gauge(
        "holdoff_limit_used", "Highest use by any one caller", ["limit"], registry=registry
    )
    for name in limits.values:
        refusals.labels(name)
        value.labels(name).set(limits.values[name])
    for name in COUNTED:
        used.labels(name).set_function(partial(limits.most_used, name))
    limits.on_refusal = lambda name: refusals.labels(name).inc()


def _kind_label(kind: audit_pb2.AuditKind.ValueType) -> str:
    return audit_pb2.AuditKind.Name(kind).removeprefix("AUDIT_KIND_").lower()


def _status(code: Any) -> grpc.StatusCode:
    """Return how a handler that raised ended its call; gRPC gives a number, a code, or nothing."""
    if isinstance(code, grpc.StatusCode):
        return code
    known = {one.value[0]: one for one in grpc.StatusCode}
    return known.get(code or grpc.StatusCode.UNKNOWN.value[0], grpc.StatusCode.UNKNOWN)
