"""Authorizations in the store: what holds a token, for how long, and which answer is too late."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from holdoff_coordinator.custody.records import (
    BeginAuthorization,
    EndAuthorization,
    IntendAuthorization,
)
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US
from tests.integration.test_clocks import go_back, shard_of
from tests.integration.test_grant_records import FACTS, INTERVAL, Grant

if TYPE_CHECKING:
    import redis

    from tests.conftest import Server
    from tests.harness import Replica

VALID_US = 600 * SECOND
DAY_US = 86_400 * SECOND


class Authorization(Grant):
    """The scripts of an authorization of one token."""

    def begin_authorization(self, **fields: Any) -> str:
        """Take the right."""
        self.new_chain = uuid.uuid4().hex
        request = BeginAuthorization(
            token=self.name.token,
            chain=self.new_chain,
            facts=FACTS,
            sealed="c2VhbGVk",
            state_hash="hash",
            valid_us=VALID_US,
            takeover_us=TAKEOVER_US,
            budgets=(),
            **fields,
        )
        return self.do(request).status

    def intend_authorization(self) -> str:
        """Say that the code is about to be sent."""
        request = IntendAuthorization(
            token=self.name.token,
            chain=self.new_chain,
            attempt="ours",
            takeover_us=TAKEOVER_US,
            event=str(uuid.uuid4()),
            budgets=(),
        )
        return self.do(request).status

    def end_authorization(self, result: str) -> str:
        """End it without a grant."""
        request = EndAuthorization(
            token=self.name.token,
            chain=self.new_chain,
            attempt="ours",
            result=result,
            outcome="a test",
        )
        return self.do(request).status

    def complete(self, **fields: Any) -> str:
        """Store the grant that the code gave."""
        return self.put(chain=self.new_chain, attempt="ours", age_us=0, **fields).status


def left_us(store: redis.Redis, token: str) -> int:
    """Return how long a token is held yet."""
    name = token.rpartition("/")[2]
    until = store.hget(f"{shard_of(token)}:token:{name}", "not_before_us")
    seconds, micros = store.time()
    return int(until or 0) - (seconds * SECOND + micros)


def test_a_grant_that_moved_since_is_not_replaced_by_a_late_answer(
    replica: Replica, valkey: Server, store: redis.Redis
) -> None:
    """After the end of the right; within it the grant of the person is the newer one.

    Fails when an answer from the spool replaces what was refreshed since.
    """
    for is_late in (False, True):
        one = Authorization(valkey.url, replica.create_token(INTERVAL / SECOND))
        assert one.put().status == "OK"
        assert one.begin_authorization(replace=True) == "OK"
        assert one.intend_authorization() == "OK"
        record = f"holdoff:{{{one.name.app}}}:grant:{one.name.token}"
        store.hincrby(record, "generation", 1)  # a refresh
        if is_late:
            key = f"holdoff:{{{one.name.app}}}:authorization:{one.name.token}"
            store.hincrby(key, "begun_us", -TAKEOVER_US - SECOND)
        assert one.complete(generation=3) == ("GONE" if is_late else "OK")


def test_a_clock_that_goes_back_lengthens_no_hold(
    replica: Replica, valkey: Server, store: redis.Redis
) -> None:
    """An authorization that is pending, under way, or ended without an answer, holds as before.

    Fails when the instants of a day later count.
    """
    for step, most_us in (
        ("PENDING", VALID_US),
        ("INTENDED", TAKEOVER_US + INTERVAL),
        ("UNPROVEN", TAKEOVER_US + INTERVAL),
    ):
        token = replica.create_token(INTERVAL / SECOND)
        one = Authorization(valkey.url, token)
        assert one.begin_authorization() == "OK"
        if step != "PENDING":
            assert one.intend_authorization() == "OK"
        if step == "UNPROVEN":
            assert one.end_authorization(step) == "OK"
        assert left_us(store, token) <= most_us
        go_back(store, token, DAY_US)
        one.begin_authorization()  # any script of the token
        assert left_us(store, token) <= most_us, step


def test_who_holds_the_right(replica: Replica, valkey: Server) -> None:
    """A second attempt, a state that was replaced, and an end that comes twice are refused."""
    one = Authorization(valkey.url, replica.create_token(INTERVAL / SECOND))
    assert one.begin_authorization() == "OK"
    first = one.new_chain
    assert one.begin_authorization() == "OK"
    second, one.new_chain = one.new_chain, first
    assert one.intend_authorization() == "GONE"
    one.new_chain = second
    assert one.intend_authorization() == "OK"
    assert one.intend_authorization() == "OK"  # sent again
    assert one.end_authorization("NOT_SENT") == "OK"
    assert one.intend_authorization() == "OK"
    assert one.end_authorization("REFUSED") == "OK"
    assert one.end_authorization("REFUSED") == "GONE"
    assert one.complete() == "GONE"
