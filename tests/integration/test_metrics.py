"""What /metrics tells, of a live coordinator, and what it does not."""

from __future__ import annotations

import os
import signal
import time
import uuid
from typing import TYPE_CHECKING, Any

import aiohttp
import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_service_pb2,
)
from holdoff_coordinator import metrics
from holdoff_coordinator.store import StoreError
from tests import stores
from tests.harness import (
    NO_PROXY,
    Replica,
    Waiter,
    ask,
    end_cooldown,
    refusal,
    request_hash,
    run_out,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from tests.conftest import Server, StartValkey
    from tests.stores import Store

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def valkey(
    start_shared_valkey: StartValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server | Store]:
    """Give a store of their own: a scrape reads all apps of a store."""
    kind = os.environ.get("HOLDOFF_TEST_STORE", "")
    if kind:
        with stores.of_kind(kind, tmp_path_factory.mktemp("store")) as own:
            yield own
    else:
        yield start_shared_valkey()


@pytest.fixture
def measured(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """Give a coordinator that serves metrics, read from the store at each scrape."""
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "READ_SECONDS", 30.0)
    with Replica(valkey.url, metrics_listen="127.0.0.1:0") as one:
        yield one


async def page(replica: Replica, path: str = "/metrics", **headers: str) -> tuple[int, str, str]:
    """Ask for a page: status, type, text."""
    url = f"http://{replica.coordinator.metrics_address}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, answer.headers["Content-Type"], await answer.text()


async def samples(replica: Replica) -> Samples:
    """Read all samples, by name and labels."""
    _, _, text = await page(replica)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    """Return one sample."""
    return found.get((f"holdoff_{name}", frozenset(labels.items())))


async def test_the_life_of_a_lease(measured: Replica, store: redis.Redis) -> None:
    """Held, waited for, cooling, idle; and each call, grant and loss is counted once.

    Fails when a gauge of a token stays after it is idle, when a hold of python-redis-lock is not
    seen, and when a call is counted under another status than it had.
    """
    token = measured.create_token(60)
    app, labels = token.split("/")[1], {"app": token.split("/")[1], "token": "t"}
    offer = measured.hold(token)
    waiter = Waiter(measured, ask(token))
    waiter.waiting()
    found = await samples(measured)
    assert value(found, "lease_held", **labels) == 1
    assert value(found, "token_waiters", **labels) == 1
    assert 0 <= (value(found, "token_first_waiter_seconds", **labels) or -1) < 60
    assert value(found, "token_cooldown_seconds", **labels) == 0
    lease = {"service": "holdoff.v1.LeaseService"}
    streams = {**lease, "method": "StreamAcquireLease"}
    assert value(found, "rpc_streams_open", **streams) == 1

    run_out(store, offer)
    assert not measured.show_token(token).lease
    found = await samples(measured)
    assert value(found, "audit_events_total", app=app, kind="lease_lost") == 1
    assert value(found, "lease_held", **labels) == 0
    assert 0 < (value(found, "token_cooldown_seconds", **labels) or 0) <= 60
    assert refusal(measured.renew, offer) == "LEASE_LOST"
    # As if it had waited for an hour more, and the cooldown had ended just now.
    request = f"holdoff:{{{app}}}:request:{request_hash(waiter.request)}"
    store.hincrby(request, "queued_us", -3_600_000_000)
    end_cooldown(store, token)
    second = waiter.offer()
    measured.renew(second)
    measured.release(second)
    found = await samples(measured)
    assert value(found, "audit_events_total", app=app, kind="lease_granted") == 2
    assert value(found, "lease_wait_seconds_count", app=app) == 2
    waited = value(found, "lease_wait_seconds_sum", app=app) or 0
    assert 3600 < waited < 3660
    assert 0 < (value(found, "lease_handover_seconds_sum", app=app) or 0) < 60
    renew = {**lease, "method": "RenewLease"}
    assert value(found, "rpcs_total", **renew, code="OK") == 2
    assert value(found, "rpcs_total", **renew, code="FAILED_PRECONDITION") == 1
    assert value(found, "rpc_seconds_count", **renew) == 3
    waiter.vanish()

    measured.create_token(0.0, name=f"apps/{app}/tokens/idle")
    assert value(await samples(measured), "lease_held", app=app, token="idle") is None
    store.set(f"lock:holdoff:{{{app}}}:idle", "a script's")
    measured.show_token(f"apps/{app}/tokens/idle")
    assert value(await samples(measured), "lease_held", app=app, token="idle") == 1


async def test_counters_begin_at_0(measured: Replica, valkey: Server) -> None:
    """A coordinator that has just started exposes a counter of everything that may happen.

    Fails when a counter first appears with its first event, which Prometheus then does not see.
    """
    app = measured.create_token().split("/")[1]
    with Replica(valkey.url, metrics_listen="127.0.0.1:0") as fresh:
        found = await samples(fresh)
    renewal = {"service": "holdoff.v1.LeaseService", "method": "RenewLease"}
    assert value(found, "rpcs_total", **renewal, code="INTERNAL") == 0
    assert value(found, "audit_events_total", app=app, kind="lease_lost") == 0
    assert value(found, "audit_events_total", app="", kind="call_refused") == 0
    assert value(found, "store_errors_total", reason="store_unavailable") == 0


async def test_budgets_back_offs_and_quarantine(measured: Replica, store: redis.Redis) -> None:
    """By state, limit and cause; no division, endpoint or holder is a label.

    Fails when a label tells an endpoint, or the fullest budget is not the one that counts.
    """
    token = measured.create_token(0.0)
    app = token.split("/")[1]

    def err(endpoint: str, count: int) -> None:
        scope = budget_pb2.Scope(token=token, division="nl-535193", endpoint=endpoint)
        event = budget_pb2.Event(
            id=str(uuid.uuid4()), kind=budget_pb2.EVENT_KIND_ERROR, scope=scope, count=count
        )
        event.holder.job = "nightly-secret-job"
        measured.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))

    for endpoint, count in (("a/spent", 9), ("a/one", 1), ("a/two", 2), ("a/low", 6)):
        err(endpoint, count)
    wish = admin_service_pb2.SetBackOffRequest(scope=budget_pb2.Scope(app=f"apps/{app}"))
    wish.length.FromSeconds(60)
    wish.reason = "the provider asked"
    measured.admin.SetBackOff(wish)
    found = await samples(measured)
    for state, number in (("open", 2), ("low", 1), ("spent", 1)):
        assert value(found, "budgets", app=app, limit="errors", state=state) == number
    assert value(found, "budget_least_room", app=app, limit="errors") == 0
    assert value(found, "back_offs", app=app, cause="spent", state="quiet") == 1
    assert value(found, "back_offs", app=app, cause="operator", state="quiet") == 1
    assert value(found, "quarantine_seconds", app=app) == 0
    now_us = int(store.time()[0]) * 1_000_000
    store.hset(f"holdoff:{{{app}}}", "quarantine_until_us", str(now_us + 100_000_000))
    assert 90 < (value(await samples(measured), "quarantine_seconds", app=app) or 0) <= 101
    _, _, text = await page(measured)
    for hidden in ("a/low", "nl-535193", "nightly-secret-job", "the provider asked"):
        assert hidden not in text


async def test_the_page_and_nothing_else(measured: Replica) -> None:
    """Text for Prometheus, or OpenMetrics for who asks for it; any other path is not found.

    Fails when another path answers, or the type is not what was asked for.
    """
    status, kind, text = await page(measured)
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert "# HELP holdoff_store_up " in text
    wanted = "application/openmetrics-text; version=1.0.0"
    _, kind, text = await page(measured, Accept=wanted)
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    for path in ("/", "/metrics/", "/../etc/passwd", "/metrics%00"):
        assert (await page(measured, path))[0] == 404


async def test_who_is_refused_makes_no_series(measured: Replica) -> None:
    """Neither an unknown method, nor a name that a stranger made up, nor a secret, is a label.

    Fails when calls are counted by the method that was asked for, or refusals by its app.
    """
    secret = uuid.uuid4().hex
    with grpc.insecure_channel(measured.address, NO_PROXY) as channel:
        call: Any = channel.unary_unary(f"/holdoff.v1.LeaseService/{secret}")
        with pytest.raises(grpc.RpcError):
            call(b"", timeout=5)
    token = measured.create_token(0.0)
    offer = measured.hold(token)
    request = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=secret * 2)
    assert refusal(measured.leases.RenewLease, request) == "WRONG_SECRET"
    missing = lease_service_pb2.GetLeaseRequest(name=f"apps/{secret}/tokens/t/leases/1")
    assert refusal(measured.leases.GetLease, missing) in ("TOKEN_NOT_FOUND", "LEASE_NOT_FOUND")
    found = await samples(measured)
    assert value(found, "audit_events_total", app="", kind="call_refused") == 1
    _, _, text = await page(measured)
    assert secret not in text
    assert offer.secret not in text


async def test_damaged_requests_are_counted_and_no_flood_of_the_log(
    measured: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no message are counted, from 0, and logged once a minute for each method.

    Fails when gRPC logs a traceback for each of them.
    """
    before = value(await samples(measured), "malformed_requests_total")
    assert before == 0
    with (
        structlog.testing.capture_logs() as lines,
        grpc.insecure_channel(measured.address, NO_PROXY) as channel,
    ):
        call: Any = channel.unary_unary("/holdoff.v1.TokenService/ListTokens")
        for _ in range(50):
            with pytest.raises(grpc.RpcError) as refused:
                call(b"\xff" * 9, timeout=20)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as refused:
            health(b"\xff" * 9, timeout=20)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        with pytest.raises(grpc.RpcError) as refused:
            next(watch(b"\xff" * 9, timeout=20))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for version in ("v1", "v1alpha"):
            method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            reflection: Any = channel.stream_stream(method)
            with pytest.raises(grpc.RpcError) as refused:
                next(reflection(iter([b"\xff" * 9]), timeout=20))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        too_long = health_pb2.HealthCheckRequest(service="x" * 1001).SerializeToString()
        with pytest.raises(grpc.RpcError) as refused:
            health(too_long, timeout=20)
        assert "at most 1000" in str(refused.value.details())
    told = [line for line in lines if "cannot be decoded" in line["event"]]
    assert len(told) <= 2 * 5  # the minute may end meanwhile
    assert not caplog.records
    found = await samples(measured)
    assert value(found, "malformed_requests_total") == 54


async def test_tokens_beyond_the_bound(measured: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many have series of their own; how many have none is told.

    Fails when the number of series is not bounded.
    """
    monkeypatch.setattr(metrics, "TOKENS_MOST", 3)
    app = f"apps/m{uuid.uuid4().hex[:12]}"
    for number in range(5):
        measured.hold(measured.create_token(0.0, name=f"{app}/tokens/t{number}"))
    found = await samples(measured)
    shown = [labels for name, labels in found if name == "holdoff_lease_held"]
    assert len([one for one in shown if ("app", app[5:]) in one]) == 3
    assert value(found, "tokens_not_shown", app=app[5:]) == 2


async def test_a_store_that_is_away(
    start_valkey: StartValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page comes all the same, within the time of a scrape, and says so.

    Fails when the scrape waits for the store, or old gauges are told as if they were true.
    """
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "READ_SECONDS", 30.0)
    monkeypatch.setattr(metrics, "JUDGE_SECONDS", 0.0)
    server = start_valkey()
    judged: list[bool] = []

    async def judge() -> list[str]:
        judged.append(True)
        return []

    with Replica(server.url, metrics_listen="127.0.0.1:0", judge=judge) as replica:
        token = replica.create_token(0.0)
        labels = {"app": token.split("/")[1], "token": "t"}
        replica.hold(token, ttl=60)
        found = await samples(replica)
        assert (value(found, "store_up"), value(found, "lease_held", **labels)) == (1, 1)
        os.kill(server.pid, signal.SIGSTOP)
        monkeypatch.setattr(metrics, "READ_SECONDS", 0.3)
        began = time.monotonic()
        try:
            found = await samples(replica)
            assert time.monotonic() - began < 4.5  # not the five seconds that a call may take
            assert (value(found, "store_up"), value(found, "lease_held", **labels)) == (0, None)
            assert value(found, "store_safe") == 1  # nobody can tell
            assert len(judged) == 1
        finally:
            os.kill(server.pid, signal.SIGCONT)
        monkeypatch.setattr(metrics, "READ_SECONDS", 30.0)
        found = await samples(replica)
        assert (value(found, "store_up"), value(found, "lease_held", **labels)) == (1, 1)


async def test_a_store_that_is_not_safe(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the coordinator warns of at its start is a metric, looked at again from time to time.

    Fails when it is looked at once.
    """
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "READ_SECONDS", 30.0)
    monkeypatch.setattr(metrics, "JUDGE_SECONDS", 0.0)
    warnings: list[str] = []

    async def judge() -> list[str]:
        if "evicts" in warnings:
            raise StoreError("it evicts")
        return warnings

    options: dict[str, Any] = {"metrics_listen": "127.0.0.1:0", "judge": judge}
    with Replica(valkey.url, **options) as replica:
        assert value(await samples(replica), "store_safe") == 1
        for warning in ("it does not fsync", "evicts"):
            warnings.append(warning)
            found = await samples(replica)
            assert (value(found, "store_safe"), value(found, "store_up")) == (0, 1)


async def test_idle_apps_cost_a_scrape_nothing(
    measured: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape runs scripts of busy apps only: 2,000 idle ones are read in a few round trips.

    Fails when each app is read by itself.
    """
    idle = measured.create_token(0.0).split("/")[1]
    token = measured.create_token(0.0)
    measured.hold(token)
    scripts = measured.coordinator.scripts
    ran, run = list[str](), scripts.run

    async def counted(name: str, app: str, *args: Any, **options: Any) -> Any:
        ran.append(app)
        return await run(name, app, *args, **options)

    monkeypatch.setattr(scripts, "run", counted)
    found = await samples(measured)
    assert value(found, "apps_unread") == 0
    assert value(found, "quarantine_seconds", app=idle) == 0
    assert value(found, "lease_held", app=token.split("/")[1], token="t") == 1
    assert token.split("/")[1] in ran
    assert idle not in ran


async def test_a_scrape_says_what_it_could_not_read(
    measured: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is up although there was no time for any app; what was read before stays.

    Fails when health is measured by reading all apps, or a gauge vanishes as its app is not read.
    """
    token = measured.create_token(0.0)
    labels = {"app": token.split("/")[1], "token": "t"}
    measured.hold(token)
    assert value(await samples(measured), "lease_held", **labels) == 1
    monkeypatch.setattr(metrics, "READ_SECONDS", 0.0)
    found = await samples(measured)
    assert value(found, "store_up") == 1
    assert (value(found, "apps_unread") or 0) >= 1
    assert value(found, "lease_held", **labels) == 1
    monkeypatch.setattr(metrics, "READ_SECONDS", 30.0)
    assert value(await samples(measured), "apps_unread") == 0


async def test_what_was_not_read_comes_first_next_time(
    measured: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is too slow for one scrape is read in several.

    Fails when each look begins with the same apps.
    """
    apps = {measured.create_token(0.0).split("/")[1] for _ in range(2)}
    for app in apps:
        measured.hold(f"apps/{app}/tokens/t")
    one = measured.coordinator._metrics
    assert one
    read, read_busy = list[str](), one._read_busy

    async def slow(app: str) -> Any:
        if app in apps:
            if read[-1:] != ["a look begins"]:
                raise TimeoutError
            read.append(app)
        return await read_busy(app)

    monkeypatch.setattr(one, "_read_busy", slow)
    for _ in range(2):
        read.append("a look begins")
        assert (value(await samples(measured), "apps_unread") or 0) >= 1
    assert apps <= set(read)


async def test_limits(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit has its value, its use and its refusals, from 0 on."""
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 0.0)
    few = {"watches": 1}
    with Replica(valkey.url, metrics_listen="127.0.0.1:0", limits=few) as one:
        found = await samples(one)
        assert value(found, "limit", limit="watches") == 1
        assert value(found, "limit_used", limit="watches") == 0
        assert value(found, "limit_refusals_total", limit="watches") == 0
        assert value(found, "limit_refusals_total", limit="reservations") == 0
        request = lease_service_pb2.WatchLeasesRequest()
        stream = one.leases.WatchLeases(request)
        next(stream)
        assert refusal(lambda: next(one.leases.WatchLeases(request))) == "LIMIT_REACHED"
        found = await samples(one)
        assert value(found, "limit_used", limit="watches") == 1
        assert value(found, "limit_refusals_total", limit="watches") == 1
        stream.cancel()
