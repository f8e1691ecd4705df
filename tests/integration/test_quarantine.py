"""What holds grants back when the store may have forgotten something, or its clock jumped."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import redis
from click.testing import CliRunner

from holdoff.cli import main
from holdoff.v1 import admin_service_pb2, audit_pb2, lease_pb2, lease_service_pb2
from holdoff_coordinator.scripts import boottime_us
from holdoff_coordinator.store import Epoch
from tests.harness import Replica, Waiter, ask, refusal, request_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Server, StartValkey


QUARANTINE_SECONDS = 60.0


class SteppedClock:
    """A boot clock that a test sets off against the store's; only the difference matters."""

    def __init__(self) -> None:
        self.step_us = 0

    def __call__(self) -> int:
        """Read the clock."""
        return boottime_us() + self.step_us


@pytest.fixture(scope="module")
def valkey(start_shared_valkey: StartValkey) -> Server:
    """Give a store of its own: a jump is declared for all apps that a replica has seen."""
    return start_shared_valkey()


def end_quarantine(valkey: Server, token: str) -> None:
    """Let the quarantine of a token's app be over, which lasts for the safe time until then."""
    with redis.Redis.from_url(valkey.url) as store:
        shard = f"holdoff:{{{token.split('/')[1]}}}"
        seconds, _ = store.time()
        (until_us,) = store.hmget(shard, "quarantine_until_us")
        left_seconds = int(until_us or 0) / 1e6 - seconds
        assert QUARANTINE_SECONDS / 2 < left_seconds < QUARANTINE_SECONDS + 1
        store.hset(shard, "quarantine_until_us", seconds * 1_000_000)


@contextlib.contextmanager
def stepped(valkey: Server, seconds: float) -> Iterator[tuple[Replica, str]]:
    """Give a replica in whose eyes the store's clock has just jumped, and a token."""
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        replica.release(replica.hold(token))
        clock.step_us = -round(seconds * 1e6)
        yield replica, token


def test_a_clock_that_jumped_forward_grants_nothing_for_the_safe_time(valkey: Server) -> None:
    """A step forward expires leases too early, so that nothing is granted until they are over.

    Fails when `Scripts` passes no estimate and declares no quarantine.
    """
    with stepped(valkey, 5.0) as (replica, token):
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        waiter = Waiter(replica, ask(token))
        assert waiter.waiting().reason == lease_pb2.WAIT_REASON_QUARANTINED
        end_quarantine(valkey, token)
        waiter.offer()
        waiter.vanish()


def test_a_clock_that_jumped_back_grants_nothing_for_the_safe_time(valkey: Server) -> None:
    """A step back is no better: cooldowns are measured from times that have not come yet."""
    with stepped(valkey, -5.0) as (replica, token):
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        end_quarantine(valkey, token)
        assert replica.acquire(token).HasField("offer")


def test_a_store_that_is_only_slow_grants(valkey: Server) -> None:
    """A call without a wait gets its lease although the store took more than a second for it.

    Fails when the answer to a script that ran late is believed: QUARANTINED.
    """
    with Replica(valkey.url) as replica, redis.Redis.from_url(valkey.url) as store:
        token = replica.create_token(0)
        replica.release(replica.hold(token))
        store.client_pause(1500)
        assert replica.acquire(token).HasField("offer")


def test_a_small_step_is_borne(valkey: Server) -> None:
    """Less than a second is what clocks do."""
    with stepped(valkey, 0.3) as (replica, token):
        assert replica.acquire(token).HasField("offer")


def test_renewals_go_on_in_quarantine(valkey: Server) -> None:
    """Who holds a lease keeps it while nothing new is granted.

    Fails when renew.lua refuses while `now < quarantined_until()`.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        offer = replica.hold(token)
        clock.step_us = -5_000_000
        for _ in range(3):
            replica.renew(offer)
        assert replica.show(offer.lease.name).state == lease_pb2.LEASE_STATE_ACTIVE
        replica.release(offer)
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"


def test_a_store_that_lost_its_data_is_quarantined(start_valkey: StartValkey) -> None:
    """A token made anew after its data vanished is not grantable at once, though never refreshed.

    Fails when `ensure_epoch` does not look at the epoch that the replica knew.
    """
    valkey = start_valkey()
    with Replica(valkey.url, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        replica.hold(token)
        with redis.Redis.from_url(valkey.url) as store:
            store.flushall()
        assert refusal(lambda: replica.acquire(token)) == "TOKEN_NOT_FOUND"
        replica.create_token(0, name=token)
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        end_quarantine(valkey, token)
        assert replica.acquire(token).HasField("offer")


def test_a_changed_epoch_is_quarantined(valkey: Server) -> None:
    """An epoch other than the one a replica knows means other data."""
    with Replica(valkey.url, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        with redis.Redis.from_url(valkey.url) as store:
            store.hset(f"holdoff:{{{token.split('/')[1]}}}", "epoch", "another")
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        end_quarantine(valkey, token)
        assert replica.acquire(token).HasField("offer")


def test_a_directory_that_knew_another_epoch_quarantines_new_tokens(valkey: Server) -> None:
    """After a loss that the data directory shows, tokens made anew wait out the safe time."""
    lost = Epoch("fresh", lost=True)
    with Replica(valkey.url, epoch=lost, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        end_quarantine(valkey, token)
        assert replica.acquire(token).HasField("offer")


def test_a_restart_with_its_epoch_intact_is_not_quarantined(valkey: Server) -> None:
    """A coordinator that comes back to its store grants at once."""
    with Replica(valkey.url) as replica:
        token = replica.create_token(0)
    with Replica(valkey.url) as replica:
        assert replica.acquire(token).HasField("offer")


def test_after_an_outage_waiters_may_return_to_their_places(valkey: Server) -> None:
    """Promise 4: after a time without a coordinator a newcomer waits for those who were first.

    Fails when common.lua sets no `recovery_until_us` after a gap.
    """
    with Replica(valkey.url) as replica:
        token = replica.create_token(0)
        held = replica.hold(token)
        first = ask(token)
        assert replica.leases.AcquireLease(first).waiting.place == 1
        replica.release(held)
    shard = f"holdoff:{{{token.split('/')[1]}}}"
    with redis.Redis.from_url(valkey.url) as store:  # nobody came by for ten seconds
        for field in ("tick_us", "high_water_us"):
            store.hincrby(shard, field, -10_000_000)
        store.hincrby(f"{shard}:request:{request_hash(first)}", "heard_us", -10_000_000)
    with Replica(valkey.url) as replica:
        newcomer = replica.leases.AcquireLease(ask(token)).waiting
        assert (newcomer.reason, newcomer.place) == (lease_pb2.WAIT_REASON_QUEUED, 2)
        assert replica.leases.AcquireLease(first).HasField("offer")


# Shown and ended by an operator

LOST = "the store lost the data of this app"


def shown(replica: Replica, app: str = "") -> list[lease_pb2.Quarantine]:
    """Read which apps are in quarantine."""
    request = lease_service_pb2.ListQuarantinesRequest(parent=app)
    return list(replica.leases.ListQuarantines(request).quarantines)


def holdoff(replica: Replica, *arguments: str) -> tuple[int, str]:
    """Run a command; return its exit code, and what it wrote."""
    result = CliRunner().invoke(main, ["--endpoint", replica.address, *arguments])
    return result.exit_code, result.output


@contextlib.contextmanager
def quarantined(start_valkey: StartValkey) -> Iterator[tuple[Replica, str, str]]:
    """Give a replica, an app whose data was lost, and its token, made again."""
    valkey = start_valkey()
    with Replica(valkey.url, quarantine_seconds=QUARANTINE_SECONDS) as replica:
        token = replica.create_token(0)
        with redis.Redis.from_url(valkey.url) as store:
            store.flushall()
        replica.create_token(0, name=token)
        yield replica, token.partition("/tokens/")[0], token


def test_a_quarantine_is_shown(start_valkey: StartValkey) -> None:
    """Until when, why and what is at risk; an app without one is no error.

    Fails when an app that is not in quarantine is listed, or the reason is left out.
    """
    with quarantined(start_valkey) as (replica, app, token):
        [one] = shown(replica)
        assert shown(replica, app)[0].app == one.app == app
        assert one.reason == LOST
        assert one.at_risk.startswith("everything")
        assert 0 < one.remaining.ToMicroseconds() <= QUARANTINE_SECONDS * 1e6
        assert shown(replica, "apps/no-such-app") == []
        status = replica.leases.AcquireLease(ask(token)).waiting
        assert status.message.endswith(f"holdoff quarantine show {app}")
        code, text = holdoff(replica, "quarantine", "show", app)
        assert (code, LOST in text, one.at_risk[:40] in text) == (0, True, True)
        code, text = holdoff(replica, "quarantine", "show", "apps/no-such-app")
        assert (code, text) == (0, "apps/no-such-app is not in quarantine\n")
        for scope in (app, token):
            code, text = holdoff(replica, "explain", scope)
            assert (code, LOST in text) == (0, True)


def test_an_operator_ends_a_quarantine(start_valkey: StartValkey) -> None:
    """Who waits gets the lease at once, and the audit trail has who ended it and why.

    Fails when the end is not audited, or a second one is not refused.
    """
    with quarantined(start_valkey) as (replica, app, token):
        waiter = Waiter(replica, ask(token))
        assert waiter.waiting().reason == lease_pb2.WAIT_REASON_QUARANTINED
        code, text = holdoff(replica, "quarantine", "end", app)
        assert (code, "--reason" in text) == (64, True)
        code, text = holdoff(replica, "quarantine", "end", app, "--reason", "nothing ran")
        assert (code, "everything" in text) == (0, True)
        waiter.offer()
        waiter.vanish()
        assert shown(replica) == []
        request = admin_service_pb2.EndQuarantineRequest(app=app, reason="again")
        assert refusal(replica.admin.EndQuarantine, request) == "QUARANTINE_NOT_FOUND"
        code, text = holdoff(replica, "quarantine", "end", app, "--reason", "again")
        assert (code, f"{app} is not in quarantine" in text) == (77, True)
        wanted = admin_service_pb2.ListAuditEventsRequest(
            parent=app, kinds=[audit_pb2.AUDIT_KIND_QUARANTINE_ENDED]
        )
        [event] = replica.admin.ListAuditEvents(wanted).events
        assert (event.resource, event.reason, event.identity) == (app, "nothing ran", "anonymous")


@pytest.mark.parametrize(
    ("reason", "at_risk"),
    [
        ("the clock of the store went back", "no record is lost"),
        ("another server of the store took over, and may lack the last writes", "the last moments"),
        ("the store was restored from a backup", "since the backup"),
        ("something new", "everything"),
    ],
)
def test_what_is_at_risk(valkey: Server, reason: str, at_risk: str) -> None:
    """What may be lost depends on the reason, and is everything if the reason is not known.

    Fails when an unknown reason promises that something is safe.
    """
    with Replica(valkey.url) as replica, redis.Redis.from_url(valkey.url) as store:
        app = replica.create_token(0).partition("/tokens/")[0]
        now_us = store.time()[0] * 1_000_000
        fields = {
            "quarantine_reason": reason,
            "quarantine_since_us": now_us - 5_000_000,
            "quarantine_until_us": now_us + 60_000_000,
        }
        store.hset(f"holdoff:{{{app.removeprefix('apps/')}}}", mapping=fields)
        [one] = shown(replica, app)
        assert (one.reason, at_risk in one.at_risk) == (reason, True)
        assert one.start_time.ToMicroseconds() == now_us - 5_000_000


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_the_end_asks_on_a_terminal(valkey: Server, answer: str, code: int) -> None:
    """It says what is at risk, and ends the quarantine only after a yes.

    Fails when the answer is not looked at.
    """
    with Replica(valkey.url) as replica, redis.Redis.from_url(valkey.url) as store:
        app = replica.create_token(0).partition("/tokens/")[0]
        until_us = (store.time()[0] + 600) * 1_000_000
        shard = f"holdoff:{{{app.removeprefix('apps/')}}}"
        store.hset(shard, mapping={"quarantine_until_us": until_us, "quarantine_reason": LOST})
        ours, theirs = pty.openpty()
        program = [sys.executable, "-c", "from holdoff.cli import main; main(prog_name='holdoff')"]
        options = ["--endpoint", replica.address, "quarantine", "end", app, "--reason", "a drill"]
        try:
            os.write(ours, answer.encode())
            result = subprocess.run(
                [*program, *options],
                stdin=theirs,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            os.close(ours)
            os.close(theirs)
        assert result.returncode == code, result.stderr
        assert f"{LOST}\nThe store may have lost: everything" in result.stderr
        assert ("not ended" in result.stderr) is bool(code)
        assert [one.app for one in shown(replica, app)] == [app] * code
