"""Watching: a snapshot, then every change, without a gap."""

from __future__ import annotations

import asyncio
import base64
import threading
import uuid
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from holdoff.v1 import admin_service_pb2, lease_pb2, lease_service_pb2, token_service_pb2
from holdoff_coordinator.resuming import ResumeTokens
from holdoff_coordinator.scripts import Position, Scripts
from tests.harness import Replica, Waiter, ask, lease_key, refusal, run_out, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import redis

    from tests.conftest import Server

Kind = lease_pb2.ChangeKind


class Watcher:
    """Listens in a thread of its own and keeps what it was told."""

    def __init__(self, replica: Replica, parent: str = "", resume_token: str = "") -> None:
        request = lease_service_pb2.WatchLeasesRequest(parent=parent, resume_token=resume_token)
        self.told: list[lease_service_pb2.WatchLeasesResponse] = []
        self.ended: grpc.RpcError | None = None
        self._stream = replica.leases.WatchLeases(request)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for response in self._stream:
                self.told.append(response)
        except grpc.RpcError as error:
            self.ended = error

    @property
    def snapshots(self) -> list[lease_pb2.Snapshot]:
        """The parts of snapshots that came."""
        return [told.snapshot for told in self.told if told.HasField("snapshot")]

    @property
    def changes(self) -> list[lease_pb2.Change]:
        """The changes that came."""
        return [told.change for told in self.told if told.HasField("change")]

    @property
    def kinds(self) -> list[str]:
        """What happened, in short."""
        return [Kind.Name(change.kind).removeprefix("CHANGE_KIND_") for change in self.changes]

    def shows(self, token: str) -> bool:
        """Tell whether a snapshot has this token."""
        return any(status.token == token for part in self.snapshots for status in part.tokens)

    def until(self, kind: str, count: int = 1) -> lease_pb2.Change:
        """Wait for a change; return the latest of its kind."""
        wait_until(lambda: self.kinds.count(kind) >= count)
        return [change for change in self.changes if Kind.Name(change.kind).endswith(kind)][-1]

    def stop(self) -> str:
        """Stop listening; return where to go on."""
        self._stream.cancel()
        self._thread.join(5)
        return self.told[-1].resume_token


@pytest.fixture
def watcher(replica: Replica) -> Iterator[Watcher]:
    """Watch a token that nobody else knows."""
    token = replica.create_token(0.2)
    watching = Watcher(replica, token)
    wait_until(lambda: watching.snapshots)
    yield watching
    watching.stop()


def token_of(watcher: Watcher) -> str:
    """The token that is watched."""
    return watcher.snapshots[0].tokens[0].token


def test_the_life_of_a_lease(replica: Replica, watcher: Watcher) -> None:
    """A grant, a release and the end of the cooldown are told, with how the token stands then."""
    token = token_of(watcher)
    free = watcher.snapshots[0].tokens[0]
    assert (free.wait_reason, free.HasField("lease"), free.queue_length) == (0, False, 0)

    offer = replica.hold(token, job="nightly")
    granted = watcher.until("GRANTED").status
    assert granted.lease.name == offer.lease.name
    assert granted.lease.holder.job == "nightly"
    assert granted.lease.state == lease_pb2.LEASE_STATE_ACTIVE
    assert granted.wait_reason == lease_pb2.WAIT_REASON_HELD

    replica.release(offer)
    released = watcher.until("RELEASED").status
    assert released.lease.state == lease_pb2.LEASE_STATE_RELEASED
    assert released.wait_reason == lease_pb2.WAIT_REASON_COOLING
    assert released.cooldown.ToMilliseconds() == 200
    assert not watcher.until("COOLING_ENDED").status.HasField("cooldown")
    assert watcher.kinds == ["GRANTED", "RELEASED", "COOLING_ENDED"]


def test_losses(replica: Replica, watcher: Watcher, store: redis.Redis) -> None:
    """An expiry, a late renewal, a break, and the end of what was broken are told."""
    token = token_of(watcher)
    run_out(store, replica.hold(token))
    assert watcher.until("EXPIRED").status.lease.state == lease_pb2.LEASE_STATE_EXPIRED
    wait_until(lambda: not replica.show_token(token).wait_reason)

    offer = replica.hold(token, ttl=60.0)
    store.hincrby(lease_key(offer.lease.name), "expires_us", -31_000_000)
    expire_us = replica.show(offer.lease.name).expire_time.ToMicroseconds()
    replica.renew(offer)
    late = watcher.until("RENEWED_LATE").status.lease
    assert late.expire_time.ToMicroseconds() > expire_us

    replica.admin.BreakLease(
        admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="maintenance")
    )
    breaking = watcher.until("BREAKING").status.lease
    assert breaking.state == lease_pb2.LEASE_STATE_BREAKING
    assert breaking.break_reason == "maintenance"
    replica.release(offer)
    assert watcher.until("BROKEN").status.lease.state == lease_pb2.LEASE_STATE_BROKEN


def test_a_renewal_in_time_is_not_told(replica: Replica, watcher: Watcher) -> None:
    """Renewals are no news: fails when each is told."""
    offer = replica.hold(token_of(watcher), ttl=60.0)
    for _ in range(5):
        replica.renew(offer)
    replica.release(offer)
    watcher.until("RELEASED")
    assert watcher.kinds[:2] == ["GRANTED", "RELEASED"]


def test_the_queue(replica: Replica, watcher: Watcher) -> None:
    """Who comes to the queue or leaves it moves it, and the lease that is held shows as before."""
    token = token_of(watcher)
    offer = replica.hold(token)
    waiters = [Waiter(replica, ask(token)) for _ in range(2)]
    moved = watcher.until("QUEUE_MOVED", 2).status
    assert (moved.queue_length, moved.lease.name) == (2, offer.lease.name)
    waiters[0].withdraw()
    assert watcher.until("QUEUE_MOVED", 3).status.queue_length == 1
    replica.release(offer)
    replica.renew(waiters[1].offer())
    assert watcher.until("GRANTED", 2).status.queue_length == 0
    for waiter in waiters:
        waiter.vanish()


def test_an_offer_that_lapses(replica: Replica, watcher: Watcher, store: redis.Redis) -> None:
    """What was shown as offered is told to be offered no more."""
    token = token_of(watcher)
    run_out(store, replica.acquire(token).offer)
    withdrawn = watcher.until("WITHDRAWN").status
    assert withdrawn.lease.state == lease_pb2.LEASE_STATE_WITHDRAWN
    assert withdrawn.wait_reason == lease_pb2.WAIT_REASON_UNSPECIFIED


def test_quarantine(watcher: Watcher, store: redis.Redis) -> None:
    """A quarantine is no change of one token: a fresh snapshot tells its beginning and its end.

    Fails when only changes are looked at.
    """
    token = token_of(watcher)

    def until_told(seconds: float, reason: int) -> None:
        end_us = round((store.time()[0] + seconds) * 1e6)
        store.hset(f"holdoff:{{{token.split('/')[1]}}}", "quarantine_until_us", str(end_us))
        wait_until(lambda: watcher.snapshots[-1].tokens[0].wait_reason == reason)

    until_told(60, lease_pb2.WAIT_REASON_QUARANTINED)
    until_told(2, lease_pb2.WAIT_REASON_UNSPECIFIED)
    assert not watcher.changes


def test_a_change_of_a_token_hides_none_of_its_app(
    replica: Replica, watcher: Watcher, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of one token and a quarantine that one look finds are both told.

    Fails when a watcher that reaches the change does not read the whole app again.
    """
    token, told = token_of(watcher), len(watcher.snapshots)
    looks, both_happened = threading.Event(), threading.Event()
    stands = Scripts.stands

    async def stands_after_both(self: Scripts, apps: Iterable[str]) -> Any:
        looks.set()
        await asyncio.to_thread(both_happened.wait, 30)
        return await stands(self, apps)

    monkeypatch.setattr(Scripts, "stands", stands_after_both)
    assert looks.wait(30)
    replica.hold(token)
    end_us = (store.time()[0] + 60) * 1_000_000
    store.hset(f"holdoff:{{{token.split('/')[1]}}}", "quarantine_until_us", str(end_us))
    both_happened.set()
    watcher.until("GRANTED")
    wait_until(lambda: len(watcher.snapshots) > told)


def test_foreign_locks(replica: Replica, watcher: Watcher, store: redis.Redis) -> None:
    """A lock that a python-redis-lock user takes and frees is told."""
    token = token_of(watcher)
    lock = f"lock:{replica.show_token(token).lock_name}"
    store.set(lock, "somebody else")
    replica.show_token(token)  # whoever looks sees it
    assert watcher.until("LOCK_TAKEN").status.wait_reason == lease_pb2.WAIT_REASON_HELD
    store.delete(lock)
    replica.show_token(token)
    assert watcher.until("LOCK_FREED").status.wait_reason == lease_pb2.WAIT_REASON_COOLING
    assert watcher.kinds.count("LOCK_TAKEN") == 1


def test_tokens(replica: Replica) -> None:
    """Tokens that are made or changed show up; an app that does not exist yet may be watched."""
    app = f"apps/{uuid.uuid4().hex}"
    watcher = Watcher(replica, app)
    wait_until(lambda: watcher.snapshots)
    first = replica.create_token(name=f"{app}/tokens/first")
    wait_until(lambda: watcher.shows(first))
    second = replica.create_token(name=f"{app}/tokens/second")
    assert watcher.until("TOKEN_CREATED").status.token == second
    update = token_service_pb2.UpdateTokenRequest()
    update.token.name = first
    replica.tokens.UpdateToken(update)
    watcher.until("TOKEN_UPDATED")
    watcher.stop()


def test_everything(replica: Replica, watcher: Watcher) -> None:
    """A watch of everything tells of every app, also of one that is made later."""
    everything = Watcher(replica)
    first = token_of(watcher)
    wait_until(lambda: everything.shows(first))
    later = replica.create_token()
    wait_until(lambda: everything.shows(later))
    replica.hold(first)
    replica.hold(later)

    def granted() -> set[str]:
        grants = [c for c in everything.changes if c.kind == Kind.CHANGE_KIND_GRANTED]
        return {change.status.token for change in grants}

    wait_until(lambda: {first, later} <= granted())
    everything.stop()


def test_resuming_misses_nothing(replica: Replica, second_replica: Replica) -> None:
    """A watcher that comes back, at another replica, gets what happened meanwhile and no more.

    Fails when the position is not taken from the token, or when a snapshot stands in for it.
    """
    token = replica.create_token(0.0)
    first = Watcher(replica, token)
    wait_until(lambda: first.snapshots)
    replica.release(replica.hold(token))
    first.until("RELEASED")
    resume_token = first.stop()
    for _ in range(3):
        replica.release(replica.hold(token))
    second = Watcher(second_replica, token, resume_token)
    replica.release(replica.hold(token))
    second.until("RELEASED", 4)
    assert second.told[0].WhichOneof("event") is None  # it is connected, nothing happened yet
    assert second.told[0].resume_token == resume_token
    assert second.kinds == ["GRANTED", "RELEASED"] * 4
    assert not second.snapshots
    second.stop()


def test_a_gap_brings_a_fresh_snapshot(replica: Replica, store: redis.Redis) -> None:
    """A watcher whose next change is gone is told how things stand instead.

    Fails when the first change that is left is taken for the next one.
    """
    token = replica.create_token(0.0)
    watcher = Watcher(replica, token)
    wait_until(lambda: watcher.snapshots)
    resume_token = watcher.stop()
    for _ in range(3):
        replica.release(replica.hold(token))
    app = token.split("/")[1]
    store.xtrim(f"holdoff:{{{app}}}:changes", maxlen=2, approximate=False)
    late = Watcher(replica, token, resume_token)
    wait_until(lambda: late.snapshots)
    replica.hold(token)
    late.until("GRANTED")
    assert late.kinds == ["GRANTED"]
    assert late.told[1].HasField("snapshot")
    late.stop()


def test_another_life_of_the_store_brings_a_fresh_snapshot(
    replica: Replica, store: redis.Redis
) -> None:
    """Numbers of another epoch say nothing: fails when the epoch is not compared."""
    token = replica.create_token(0.0)
    app = token.split("/")[1]
    latest = store.hget(f"holdoff:{{{app}}}", "changes")
    assert isinstance(latest, bytes)
    store.set("{holdoff}:resume-key", b"x" * 64, nx=True)  # as the first watcher does
    tokens = ResumeTokens(cast("bytes", store.get("{holdoff}:resume-key")))
    other_life = tokens.write([(app, Position("0" * 32, int(latest)))])
    watcher = Watcher(replica, token, other_life)
    wait_until(lambda: watcher.snapshots)
    watcher.stop()


def test_a_slow_reader_costs_no_memory(replica: Replica, store: redis.Redis) -> None:
    """One that does not read is not written to; when it reads again it gets a snapshot.

    Fails when changes are kept for it: it would then get every one of them.
    """
    token = replica.create_token(0.0)
    app = token.split("/")[1]
    stream = replica.leases.WatchLeases(lease_service_pb2.WatchLeasesRequest(parent=token))
    assert next(stream).HasField("snapshot")
    # Far more than the buffers of gRPC and of the sockets between them hold.
    entry = {**_entry(store, replica, token), b"lease.break_reason": b"x" * 2000}
    shard, count = f"holdoff:{{{app}}}", 10_000
    first = int(cast("Any", store.hget(shard, "changes"))) + 1
    with store.pipeline(transaction=True) as pipeline:
        for number in range(first, first + count):
            pipeline.xadd(
                f"{shard}:changes", entry, id=f"{number}-0", maxlen=1000, approximate=True
            )
        pipeline.hincrby(shard, "changes", count)
        pipeline.execute()
    told = 0
    for response in stream:
        told += 1
        if response.HasField("snapshot"):
            break
    assert told < count / 2
    stream.cancel()


def _entry(store: redis.Redis, replica: Replica, token: str) -> Any:
    """Return a change as the scripts write it."""
    replica.release(replica.hold(token))
    key = f"holdoff:{{{token.split('/')[1]}}}:changes"
    [(_, entry)] = cast("Any", store.xrevrange(key, count=1))
    return entry


@pytest.mark.parametrize(
    ("parent", "resume_token", "reason"),
    [
        ("apps/a/tokens/none", "", "TOKEN_NOT_FOUND"),
        ("tokens/t", "", "INVALID_FIELD"),
        ("", "nonsense", "INVALID_FIELD"),
        ("", "a:zz:1", "INVALID_FIELD"),
        ("", f"a:{'0' * 32}:1", "INVALID_FIELD"),
        ("", "A" * 22, "INVALID_FIELD"),
    ],
)
def test_refusals(replica: Replica, parent: str, resume_token: str, reason: str) -> None:
    """A wrong question gets a clear answer."""
    request = lease_service_pb2.WatchLeasesRequest(parent=parent, resume_token=resume_token)
    assert refusal(lambda: next(replica.leases.WatchLeases(request))) == reason


@pytest.mark.parametrize("spoil", ["cut", "changed", "foreign"])
def test_a_resume_token_that_cannot_be_read(replica: Replica, spoil: str) -> None:
    """A token that was changed, or whose key is gone, brings a snapshot."""
    token = replica.create_token(0.0)
    watcher = Watcher(replica, token)
    wait_until(lambda: watcher.snapshots)
    resume_token = watcher.stop()
    spoiled = {
        "cut": resume_token[:-4],
        "changed": ("B" if resume_token[0] == "A" else "A") + resume_token[1:],
        "foreign": ResumeTokens(b"x" * 64).write([("a", Position("0" * 32, 1))]),
    }[spoil]
    again = Watcher(replica, token, spoiled)
    wait_until(lambda: again.snapshots)
    again.stop()


def test_a_resume_token_can_be_read_by_no_caller(replica: Replica) -> None:
    """A resume token does not contain the name of the app, in any encoding that it may have."""
    token = replica.create_token(0.0)
    watcher = Watcher(replica, token)
    wait_until(lambda: watcher.snapshots)
    resume_token = watcher.stop()
    app = token.split("/")[1]
    assert app not in resume_token
    assert app.encode() not in base64.urlsafe_b64decode(resume_token + "===")


def test_a_snapshot_in_parts(replica: Replica) -> None:
    """An app with more tokens than are read at once comes in parts, whole and in order."""
    app = f"apps/{uuid.uuid4().hex}"
    tokens = [replica.create_token(name=f"{app}/tokens/t{number:03}") for number in range(230)]
    watcher = Watcher(replica, app)
    wait_until(lambda: watcher.snapshots and watcher.snapshots[-1].last)
    parts = watcher.snapshots
    assert [part.first for part in parts] == [True, False, False]
    assert [part.last for part in parts] == [False, False, True]
    assert [status.token for part in parts for status in part.tokens] == tokens
    assert [bool(told.resume_token) for told in watcher.told] == [False, False, True]
    watcher.stop()


def test_a_drain_sends_watchers_away(valkey: Server) -> None:
    """A coordinator that stops tells its watchers to go on elsewhere."""
    with Replica(valkey.url, drain_seconds=5.0) as leaving:
        watcher = Watcher(leaving, leaving.create_token())
        wait_until(lambda: watcher.snapshots)
    wait_until(lambda: watcher.ended)
    assert "resume_token" in str(watcher.ended)
