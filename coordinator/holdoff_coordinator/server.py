"""The coordinator as one thing that starts, serves and stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from holdoff_coordinator.access import CERTIFIED_BY
from holdoff_coordinator.audit import AuditTrail
from holdoff_coordinator.backoffs import BackOffs
from holdoff_coordinator.budgets import Budgets
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.custody.authorizing import Authorizations
from holdoff_coordinator.custody.checking import GrantChecks
from holdoff_coordinator.custody.duty import Duty
from holdoff_coordinator.custody.explaining import GrantExplanations
from holdoff_coordinator.custody.grants import Grants, Terms
from holdoff_coordinator.custody.handout import HandOuts
from holdoff_coordinator.custody.key_notices import KeyNotices
from holdoff_coordinator.custody.key_rotation import KeyRotation
from holdoff_coordinator.custody.refreshing import LIMITS, Refresher
from holdoff_coordinator.custody.seals import Seals
from holdoff_coordinator.custody.sending import Reach, Sending
from holdoff_coordinator.durability import NO_COPIES
from holdoff_coordinator.failures import Failure, store_trouble
from holdoff_coordinator.followers import Followers
from holdoff_coordinator.gate import Gate
from holdoff_coordinator.hub import Hub
from holdoff_coordinator.leases import Leases
from holdoff_coordinator.limits import Limits
from holdoff_coordinator.looks import Looks
from holdoff_coordinator.places import Places
from holdoff_coordinator.policies import Policies
from holdoff_coordinator.quarantines import Quarantines
from holdoff_coordinator.replays import Replays
from holdoff_coordinator.requests import Reading
from holdoff_coordinator.scripts import Scripts, boottime_us
from holdoff_coordinator.seldom import Seldom
from holdoff_coordinator.service import SERVICES, Handlers, add_services
from holdoff_coordinator.store import StoreAwayError, StoreError
from holdoff_coordinator.store_watch import StoreWatch
from holdoff_coordinator.sweeper import Sweeper
from holdoff_coordinator.tokens import Tokens
from holdoff_coordinator.watches import BudgetWatches, Watches

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
    from types import TracebackType
    from typing import Any

    from holdoff.policies import Policy
    from holdoff_coordinator.cluster import StoreClient
    from holdoff_coordinator.durability import Durability
    from holdoff_coordinator.gate import AccessFile
    from holdoff_coordinator.metrics import Metrics
    from holdoff_coordinator.store import Epoch
    from holdoff_coordinator.tls import Certificates

log = structlog.get_logger()

LIVENESS = "liveness"
"""The health service that serves as long as the process works, with a store or without one."""
_HEALTH_SECONDS = 1.0
_MOST_MISSED = 2
"""A store that restarts is not away yet: clients would leave in vain."""
MOST_MESSAGE_BYTES = 256 * 1024
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    # Clients that wait for hours ping now and then to find out about dead connections.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Who connects has to speak gRPC, and then to call something.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # By default gRPC drops calls at random, renewals too, once 1,000 wait for us to look at them.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
)


WAIT_SECONDS = 1.0
"""How often a store that is away is looked for."""


"""The name of this replica, for people."""


async def _safe() -> Sequence[str]:
    """Stands for the judgement of a store that is known to be safe."""
    return ()


class CannotListenError(Exception):
    """The address cannot be listened on; the message says why."""


class Coordinator:
    """One replica on a store.

    Use as an async context manager: inside it callers are served; leaving it drains. Entering
    waits for a store that is away; the port is open meanwhile, and health checks and callers are
    told.

    Raises:
        StoreError: On entering, if the store is unfit, or its records are of a newer release.
        CannotListenError: On entering, if the port is taken or the address is not ours.
    """

    def __init__(  # noqa: PLR0913, PLR0915 - the composition root
        self,
        redis: StoreClient,
        *,
        policies: Mapping[str, Policy],
        open_store: Callable[[], Awaitable[Epoch]],
        listen: str,
        certificates: Certificates | None = None,
        health_listen: str | None = None,
        access: AccessFile | None = None,
        client_identity: Sequence[str] = CERTIFIED_BY,
        metrics_listen: str | None = None,
        judge: Callable[[], Awaitable[Sequence[str]]] = _safe,
        quarantine_seconds: float,
        drain_seconds: float,
        boot_us: Callable[[], int] = boottime_us,
        durability: Durability = NO_COPIES,
        limits: Mapping[str, int] | None = None,
        custody: Terms | None = None,
    ) -> None:
        self._listen = listen
        self._certificates = certificates
        self._access = access
        self._health_listen = health_listen
        self._drain_seconds = drain_seconds
        self.scripts = Scripts(
            redis,
            quarantine_us=round(quarantine_seconds * 1e6),
            boot_us=boot_us,
            durability=durability,
        )
        self._watch = StoreWatch(self.scripts, open_store)
        self.hub = Hub(self.scripts)
        self._sweeper = Sweeper(self.scripts)
        trail = self._trail = AuditTrail(self.scripts)
        self.limits = Limits(limits)
        self._metrics_listen = metrics_listen
        self._metrics: Metrics | None = None
        if metrics_listen:
            from holdoff_coordinator.metrics import Metrics  # noqa: PLC0415 - slow to load

            self._metrics = Metrics(self.scripts, judge, self.limits)
            trail.on_event = self._metrics.count
            self._metrics.watch_access(access)
        reading = Reading(passed_on=SERVICES)
        if self._metrics:
            reading.on_malformed = self._metrics.count_malformed
        self._server = grpc.aio.server(
            interceptors=[*([self._metrics] if self._metrics else []), reading],
            options=(
                *_OPTIONS,
                ("grpc.max_allowed_incoming_connections", self.limits.values["connections"]),
                ("grpc.max_concurrent_streams", self.limits.values["streams"]),
            ),
        )
        self._health_server = grpc.aio.server(interceptors=[reading], options=_OPTIONS)
        self.policies = Policies(policies)
        self._replays = Replays(self.scripts, boot_us)
        terms = custody or Terms()
        self._replica = f"{socket.gethostname()}:{os.getpid()}"
        self._notices = KeyNotices(self.scripts, terms.keys, self._replica)
        self._has_keys = bool(terms.keys())
        seals = Seals(self.scripts, terms.keys, self._notices)
        places = Places(self.scripts, self.policies)
        budgets = Budgets(self.scripts, places, self._replays, self.limits)
        self.refreshes: Duty | None = None
        """Keeps access tokens in custody fresh; None where this replica requests none."""
        refresher = self._refresher(terms, durability, seals, budgets) if terms.spool else None
        if refresher:
            self.refreshes = self._duty(refresher)
        self._gate = Gate(Credentials(redis), access, trail, client_identity)
        self._followers = Followers(self.scripts, self.hub, places, self.limits)
        looks = Looks(self.scripts, self.hub)
        self._hand_outs = HandOuts(
            self.scripts,
            self.hub,
            self.policies,
            terms,
            trail.handed_out,
            users=self.refreshes,
            boot_us=boot_us,
        )
        if self._metrics:
            self._metrics.watch_grants(self.policies, terms.keys, self._hand_outs)
        grants = Grants(self.scripts, self.policies, terms, seals)
        handlers = Handlers(
            gate=self._gate,
            limits=self.limits,
            trail=trail,
            leases=Leases(self.scripts, self.hub, places, self.limits),
            followers=self._followers,
            watches=Watches(self.scripts, self.hub, looks, self.limits),
            tokens=Tokens(self.scripts, self.policies, self._watch.compare_epoch),
            grants=grants,
            authorizations=Authorizations(self.scripts, grants, seals, terms, refresher),
            grant_checks=GrantChecks(
                self.scripts,
                self.policies,
                terms,
                seals,
                reach=_reach(terms),
                replica=self._replica,
            ),
            hand_outs=self._hand_outs,
            key_rotation=KeyRotation(self.scripts, seals, terms, trail.keys_rotated),
            budgets=budgets,
            back_offs=BackOffs(
                self.scripts,
                places,
                GrantExplanations(self.scripts, self.policies, terms.keys, self._hand_outs).explain,
            ),
            budget_watches=BudgetWatches(self.scripts, self.hub, looks, self.limits),
            quarantines=Quarantines(self.scripts),
            policies=self.policies,
        )
        self._health = add_services(self._server, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        self._duties: list[asyncio.Task[None]] = []
        self.address = listen
        self.health_address = self.metrics_address = ""
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._listen_everywhere()
            await self._wait_for_store()
        except BaseException:
            await self._close()
            raise
        for duty in (
            self._report_health_forever,
            self.hub.tick_forever,
            self._followers.tick_forever,
            self.hub.listen_forever,
            self._hand_outs.look_forever,
            self._hand_outs.listen_forever,
            self._sweeper.sweep_forever,
            self._replays.replay_forever,
            self._trail.flush_forever,
            *([self._gate.recheck_forever] if self._access else []),
            *([self.refreshes.refresh_idle_forever] if self.refreshes else []),
            *([self.refreshes.adopt_forever] if self.refreshes else []),
            *([self._notices.give_forever] if self._has_keys else []),
        ):
            self._duties.append(asyncio.create_task(_for_ever(duty)))
        await self._set_serving(None)
        log.info(
            "serving",
            address=self.address,
            tls=bool(self._certificates),
            health=self.health_address or self.address,
            **({"metrics": self.metrics_address} if self.metrics_address else {}),
        )
        return self

    def _refresher(
        self, terms: Terms, durability: Durability, seals: Seals, budgets: Budgets
    ) -> Refresher:
        """Make what refreshes grants."""
        return Refresher(
            self.scripts,
            self.policies,
            seals,
            replica=self._replica,
            send=partial(Sending, reach=_reach(terms), limits=LIMITS),
            folder=str(terms.spool),
            is_copied=durability.replicas > 0,
            report=budgets.record_events,
        )

    def _duty(self, refresher: Refresher) -> Duty:
        """Make what refreshes those that are due."""
        duty = Duty(self.scripts, refresher)
        others = self.scripts.on_new_life

        def new_life(app: str) -> None:
            others(app)
            duty.new_life(app)

        self.scripts.on_new_life = new_life
        return duty

    async def _set_serving(self, refusal: Failure | None) -> None:
        """Tell health checks and callers that this replica serves, or why it does not."""
        self._gate.refusal = refusal
        for service in ("", *SERVICES):
            await self._health.set(service, _NOT_SERVING if refusal else _SERVING)

    async def _wait_for_store(self) -> None:
        """Return when the store is open, and its records are of this release.

        Raises:
            StoreError: Waiting does not help.
        """
        said = Seldom()
        while True:
            try:
                await self._watch.open()
                await self.scripts.upgrade()
            except StoreAwayError as error:
                reason = str(error)
            except Failure as failure:
                if failure.reason != "STORE_UNAVAILABLE":
                    raise StoreError(failure.message) from failure
                reason = failure.message
            else:
                return
            if said.due(reason) is not None:
                # Callers are refused, and health checks say NOT_SERVING.
                log.error("waiting for the store", reason=reason, address=self.address)
            await asyncio.sleep(WAIT_SECONDS)

    async def _listen_everywhere(self) -> None:
        """Open all ports.

        Raises:
            CannotListenError: One is taken, or its address is not ours.
        """
        await self._health.set(LIVENESS, _SERVING)
        await self._set_serving(store_trouble("STORE_UNAVAILABLE"))
        credentials = self._certificates.credentials() if self._certificates else None
        self.address = _open(self._server, self._listen, credentials)
        if self._health_listen:
            self.health_address = _open(self._health_server, self._health_listen)
            await self._health_server.start()
        if self._metrics and self._metrics_listen:
            try:
                serving = self._metrics.served(self._metrics_listen)
                self.metrics_address = await self._stack.enter_async_context(serving)
            except OSError:
                raise _cannot_listen(self._metrics_listen) from None
        await self._server.start()

    async def _report_health_forever(self) -> None:
        """Look at the store each second; while it is away, report that and end all streams."""
        missed = heard = 0
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            is_there = await self._watch.look() or self.scripts.answers > heard
            heard, missed = self.scripts.answers, 0 if is_there else missed + 1
            if missed == _MOST_MISSED:
                log.error("not serving: the store does not answer")
                await self._set_serving(store_trouble("STORE_UNAVAILABLE"))
                self.hub.lose_store()
            elif not missed and self.hub.store_is_away:
                log.info("serving again: the store answers")
                self.hub.store_is_away = False
                await self._set_serving(None)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        log.info("draining", seconds=self._drain_seconds)
        await self._health.enter_graceful_shutdown()
        self.hub.drain()
        drains = [self.refreshes.drain(self._drain_seconds)] if self.refreshes else []
        await asyncio.gather(self._close(), *drains)
        await self._sweeper.stop()

    async def _close(self) -> None:
        await self._server.stop(self._drain_seconds)
        await self._health_server.stop(None)
        await self._trail.flush(float("inf"))
        await self._stack.aclose()
        for duty in self._duties:
            duty.cancel()
        await asyncio.gather(*self._duties, return_exceptions=True)
        if self._has_keys:
            await self._notices.withdraw()


def _reach(terms: Terms) -> Reach:
    """Say where requests for access tokens may go."""
    return Reach(
        terms.networks,
        plain_http=terms.loopback_http,
        ca_files=(str(terms.ca_file.absolute()),) if terms.ca_file else (),
    )


def _open(
    server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Open a port and return its address.

    Raises:
        CannotListenError: It cannot be.
    """
    try:
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if not port:
        raise _cannot_listen(listen)
    return f"{listen.rpartition(':')[0]}:{port}"


def _cannot_listen(listen: str) -> CannotListenError:
    return CannotListenError(
        f"cannot listen on {listen}: is the port in use, is the address ours? Choose another with "
        "--listen HOST:PORT, for health checks --health-listen, for metrics --metrics-listen"
    )


async def _for_ever(duty: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Keep a duty going; it never ends by itself, so whatever ends it is a fault of ours."""
    while True:
        try:
            await duty()
        except Exception:
            log.exception("a duty died and is started again")
        await asyncio.sleep(1)


_SERVING = 1  # grpc.health.v1.HealthCheckResponse.SERVING
_NOT_SERVING = 2
