"""Grant records in the store: who may request an access token, and what is stored of it."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdoff._core import duration
from holdoff.names import TokenName
from holdoff.v1 import admin_service_pb2, budget_pb2
from holdoff.v1.lease_pb2 import LEASE_MODE_SHARED
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.custody.records import (
    Answer,
    BeginRefresh,
    DeleteGrant,
    EndRefresh,
    Facts,
    IntendRefresh,
    PutGrant,
    Record,
    Request,
    ask,
    read,
)
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US, Condition
from holdoff_coordinator.scripts import Scripts
from tests.harness import end_cooldown

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from tests.conftest import Server
    from tests.harness import Replica

INTERVAL = 572 * SECOND
FACTS = msgspec.json.encode(
    Facts(
        client_id="c",
        token_url="https://login.example/token",
        api_hosts=("api.example",),
        client_authentication="basic",
        key_id="k",
    )
).decode()


class Grant:
    """The scripts of custody for one token, as a replica runs them."""

    def __init__(self, url: str, token: str) -> None:
        self.name = TokenName.parse(token)
        self._url = url
        self.chain = ""

    def _run(self, request: Request | None) -> Any:
        async def run() -> Any:
            client = connect(self._url)
            try:
                scripts = Scripts(client, quarantine_us=0)
                if request is None:
                    return await read(scripts, self.name, sealed=True)
                return await ask(scripts, self.name.app, request)
            finally:
                await client.aclose()

        return asyncio.run(run())

    def do(self, request: Request) -> Answer:
        """Run the script of a request."""
        answer = self._run(request)
        assert isinstance(answer, Answer)
        return answer

    def record(self) -> Record:
        """Read the record."""
        return self._run(None).record  # type: ignore[no-any-return]

    def held(self) -> str:
        """Return what holds the next request besides the grant."""
        return self._run(None).reason  # type: ignore[no-any-return]

    def put(self, **fields: Any) -> Answer:
        """Put the grant, whose last refresh is an interval ago by default."""
        defaults = {
            "token": self.name.token,
            "chain": uuid.uuid4().hex,
            "generation": 1,
            "sealed_grant": "c2VhbGVk",
            "facts": FACTS,
            "fingerprint": uuid.uuid4().hex,
            "age_us": INTERVAL,
            "idle_us": 0,
            "takeover_us": TAKEOVER_US,
        }
        request = PutGrant(**{**defaults, **fields})
        answer = self.do(request)
        if answer.status == "OK":
            self.chain = request.chain
        if answer.status == "MOVED":
            return self.put(**{**fields, "generation": answer.generation})
        return answer

    def delete(self, **fields: Any) -> Answer:
        """End custody."""
        return self.do(
            DeleteGrant(**{"token": self.name.token, "takeover_us": TAKEOVER_US, **fields})
        )

    def begin(self, attempt: str = "one", generation: int = 1, **fields: Any) -> Answer:
        """Take the right to a request."""
        defaults = {
            "token": self.name.token,
            "chain": self.chain,
            "generation": generation,
            "attempt": attempt,
            "replica": "r",
            "takeover_us": TAKEOVER_US,
            "quarantine": "",
            "fears": "",
            "event": uuid.uuid4().hex,
            "budgets": [],
        }
        return self.do(BeginRefresh(**{**defaults, **fields}))

    def intend(self, attempt: str = "one", generation: int = 1) -> str:
        """Confirm the intent."""
        return self.do(
            IntendRefresh(
                token=self.name.token, chain=self.chain, generation=generation, attempt=attempt
            )
        ).status

    def end(self, attempt: str = "one", from_generation: int = 1, **fields: Any) -> Answer:
        """Store an answer with an access token."""
        defaults = {
            "token": self.name.token,
            "chain": self.chain,
            "from_generation": from_generation,
            "attempt": attempt,
            "step": "STORED",
            "result": "ISSUED",
            "outcome": "an access token",
            "condition": Condition.READY,
            "message": "",
            "generation": from_generation + 1,
            "unproven": 0,
            "first_unproven_us": 0,
            "not_sent": 0,
            "refreshed_age_us": 1 * SECOND,
            "not_before_in_us": INTERVAL - 1 * SECOND,
            "expires_in_us": 598 * SECOND,
            "idle_us": 30 * 24 * 3600 * SECOND,
            "sealed_grant": "bmV3",
            "sealed_access": "YWNjZXNz",
            "fingerprint": uuid.uuid4().hex,
            "facts": FACTS,
        }
        return self.do(EndRefresh(**{**defaults, **fields}))


@pytest.fixture
def grant(replica: Replica, valkey: Server) -> Grant:
    """Give a grant that was put, of a token that was never refreshed."""
    grant = Grant(valkey.url, replica.create_token(interval_seconds=572))
    assert grant.put().status == "OK"
    return grant


def test_one_replica_has_the_right(grant: Grant) -> None:
    """Of two, one may send; the other learns until when it waits."""
    assert grant.begin("one").status == "BEGUN"
    other = grant.begin("two")
    assert (other.status, other.reason) == ("WAIT", "REFRESHING")
    assert 0 < other.until_us - other.now_us <= TAKEOVER_US
    assert grant.intend("one") == "OK"
    assert grant.intend("two") == "LOST"


def test_a_right_that_was_not_used_passes(grant: Grant) -> None:
    """Nothing was sent without an intent, so that another replica takes over."""
    assert grant.begin("one").status == "BEGUN"
    assert grant.begin("two", takeover_us=0).status == "BEGUN"
    assert grant.intend("one") == "LOST"
    assert grant.intend("two") == "OK"


def test_a_request_that_may_have_been_sent_is_not_repeated_at_once(grant: Grant) -> None:
    """Promise 2: an intent without an answer counts as a request at its last possible moment."""
    grant.begin("one")
    grant.intend("one")
    lost = grant.begin("two", takeover_us=0)
    assert lost.status == "LOST"
    assert lost.grant is not None
    assert lost.over_us == lost.grant.attempt_begun_us


def test_an_answer_is_stored_once(grant: Grant, replica: Replica) -> None:
    """It is stored whole, begins the cooldown, and an answer to the same generation is dropped."""
    grant.begin()
    grant.intend()
    stored = grant.end()
    assert stored.status == "OK"
    record = grant.record()
    assert record.generation == 2
    assert (record.sealed_grant, record.sealed_access) == ("bmV3", "YWNjZXNz")
    assert record.attempt_step == "STORED"
    assert record.not_before_us - record.refreshed_us == INTERVAL
    assert record.expires_us > record.not_before_us
    assert grant.end("late").status == "MOVED"
    waiting = grant.begin("two", 2)
    assert (waiting.status, waiting.reason) == ("WAIT", "COOLING")
    token = replica.show_token(str(grant.name))
    assert token.not_before_time.ToMicroseconds() == record.not_before_us


def test_a_request_without_proof_counts_once(grant: Grant) -> None:
    """What its replica reports after it was counted changes nothing.

    Fails when the attempt would be under way again, and so be counted twice.
    """
    unproven: dict[str, Any] = {
        "generation": 1,
        "outcome": "time-out",
        "sealed_grant": "",
        "sealed_access": "",
        "expires_in_us": -1,
        "idle_us": -1,
    }
    grant.begin("one")
    grant.intend("one")
    assert grant.end("one", step="UNPROVEN", unproven=1, **unproven).status == "OK"
    before = grant.record()
    assert (before.attempt_step, before.unproven) == ("UNPROVEN", 1)
    assert grant.end("one", step="UNPROVEN", unproven=1, **unproven).status == "OK"
    for late in ("INTENDED", "NOT_ISSUED"):
        assert grant.end("one", step=late, **unproven).status == "MOVED"
    assert grant.end("another", step="UNPROVEN", unproven=2, **unproven).status == "MOVED"
    assert grant.record() == before


def test_a_late_answer_is_adopted(grant: Grant) -> None:
    """One whose right has passed counts while no other was stored."""
    grant.begin("one")
    grant.intend("one")
    assert grant.begin("two", takeover_us=0).status == "LOST"
    assert grant.end("one").status == "OK"
    assert grant.record().generation == 2


def test_put_takes_the_etag(grant: Grant) -> None:
    """A grant is replaced only by who names it, or says so."""
    assert grant.put().status == "EXISTS"
    assert grant.put(etag_chain="another", etag_generation=1).status == "CHANGED"
    assert grant.put(etag_chain=grant.chain, etag_generation=1).status == "OK"
    assert grant.put(etag_chain=grant.chain, etag_generation=1).status == "CHANGED"
    assert grant.put(replace=True).status == "OK"
    assert grant.record().generation == 3


def test_a_grant_that_is_put_again_still_waits(grant: Grant, store: redis.Redis) -> None:
    """Promise 2: the tombstone keeps the generation, and the token its cooldown."""
    grant.begin()
    grant.intend()
    grant.end()
    before = grant.record()
    etag = {"etag_chain": grant.chain, "etag_generation": 2}
    assert grant.delete(**{**etag, "etag_generation": 1}).status == "CHANGED"
    assert grant.delete(**etag).status == "OK"
    assert grant.delete().status == "GONE"
    left = store.hmget(f"holdoff:{{{grant.name.app}}}:grant:t", "sealed_grant", "sealed_access")
    assert left == [b"", b""]
    assert grant.begin("two", 2).status == "GONE"
    waiting = grant.put()
    assert (waiting.status, waiting.reason) == ("WAIT", "COOLING")
    assert waiting.until_us == before.not_before_us
    end_cooldown(store, str(grant.name))
    assert grant.put().status == "OK"
    after = grant.record()
    assert after.generation == before.generation + 1
    assert after.refreshed_us == before.refreshed_us


def test_a_pause_of_a_refresh_token_outlives_its_grant(grant: Grant, store: redis.Redis) -> None:
    """Put again it is not sent sooner; another one is, after the cooldown of the token.

    Fails when a deletion, or a replacement, is a way around the pause.
    """
    first, key = grant.record().fingerprint, f"holdoff:{{{grant.name.app}}}:grant:t"
    seconds, _ = store.time()
    pause_us = (seconds + 3600) * SECOND
    store.hset(key, "not_before_us", pause_us)
    assert grant.put(fingerprint=first, replace=True).status == "OK"
    assert grant.record().not_before_us == pause_us
    assert grant.delete().status == "OK"
    assert grant.put(fingerprint=first).status == "OK"
    assert grant.record().not_before_us == pause_us
    assert grant.put(replace=True).status == "OK"
    assert grant.record().not_before_us < pause_us


@pytest.mark.parametrize("deleted", [True, False])
def test_a_token_that_is_made_again_still_waits(
    grant: Grant, replica: Replica, store: redis.Redis, *, deleted: bool
) -> None:
    """Promise 2, also if the token was removed from the store by hand, with its grant or not."""
    grant.begin()
    grant.intend()
    grant.end()
    before = grant.record()
    key = f"holdoff:{{{grant.name.app}}}:token:{grant.name.token}"
    fencing = int(replica.show_token(str(grant.name)).fencing_token or 0)
    if deleted:
        assert grant.delete().status == "OK"
    store.delete(key)
    replica.create_token(572, name=str(grant.name))
    token = replica.show_token(str(grant.name))
    assert token.not_before_time.ToMicroseconds() == before.refreshed_us + INTERVAL
    assert token.fencing_token >= fencing
    if deleted:
        waiting = grant.put()
        assert (waiting.status, waiting.reason) == ("WAIT", "COOLING")
        end_cooldown(store, str(grant.name))
        assert grant.put().status == "OK"
        assert grant.record().generation == before.generation + 1
    else:
        assert grant.record().generation == before.generation
        assert grant.held() == "COOLING"


def test_two_names_of_one_grant_are_refused(grant: Grant, replica: Replica, valkey: Server) -> None:
    """They would refresh it in turns, each within the interval of the other."""
    other = replica.create_token(572, name=f"apps/{grant.name.app}/tokens/other")
    again = Grant(valkey.url, other).put(fingerprint=grant.record().fingerprint)
    assert (again.status, again.of) == ("DUPLICATE", grant.name.token)


def test_a_token_in_use_is_not_taken_into_custody(replica: Replica, valkey: Server) -> None:
    """Its holder may refresh unseen."""
    token = replica.create_token()
    replica.hold(token)
    waiting = Grant(valkey.url, token).put()
    assert (waiting.status, waiting.reason) == ("WAIT", "LEASED")


def test_a_back_off_of_the_app_holds_the_request(grant: Grant, replica: Replica) -> None:
    """One of an endpoint does not."""
    assert grant.held() == ""
    scope = budget_pb2.Scope(token=str(grant.name))
    replica.admin.SetBackOff(
        admin_service_pb2.SetBackOffRequest(
            scope=scope, reason="the provider asked", length=duration(60)
        )
    )
    assert grant.held() == "BACKING_OFF"
    waiting = grant.begin()
    assert (waiting.status, waiting.reason) == ("WAIT", "BACKING_OFF")


def test_a_request_whose_result_is_unknown_counts_at_its_last_possible_moment(
    grant: Grant, replica: Replica, store: redis.Redis
) -> None:
    """Promise 2: neither a new grant nor a deletion shortens the cooldown after it.

    Fails when `lost_at` is left out of one of the two.
    """
    changes: tuple[Callable[..., Answer], ...] = (partial(grant.put, replace=True), grant.delete)
    for change in changes:
        record = grant.record()
        grant.chain = record.chain
        grant.begin("one", record.generation)
        grant.intend("one", record.generation)
        waiting = change()
        assert (waiting.status, waiting.reason) == ("WAIT", "REFRESHING")
        begun_us = grant.record().attempt_begun_us
        assert change(takeover_us=1).status == "OK"
        token = replica.show_token(str(grant.name))
        assert token.last_refresh_time.ToMicroseconds() == begun_us + 1
        assert token.cooldown.ToMicroseconds() > 0
        end_cooldown(store, str(grant.name))
        store.hset(f"holdoff:{{{grant.name.app}}}:grant:t", "not_before_us", 0)


def test_a_shared_lease_holds_no_request(grant: Grant, replica: Replica) -> None:
    """Its holder does not refresh: an access token is requested while jobs run."""
    assert replica.hold(str(grant.name)).lease.mode == LEASE_MODE_SHARED
    assert grant.begin().status == "BEGUN"


def test_secrets_are_sealed_for_the_generation_that_they_get(grant: Grant) -> None:
    """Fails when a put stores secrets that were sealed for another generation: they never open."""
    generation = grant.record().generation
    request = PutGrant(
        token=grant.name.token,
        chain=uuid.uuid4().hex,
        generation=generation,
        sealed_grant="b3RoZXI=",
        facts=FACTS,
        fingerprint="f",
        age_us=0,
        idle_us=0,
        takeover_us=TAKEOVER_US,
        replace=True,
    )
    answer = grant.do(request)
    assert (answer.status, answer.generation) == ("MOVED", generation + 1)
    assert grant.record().generation == generation
