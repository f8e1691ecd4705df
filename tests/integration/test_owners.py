"""Two names for one grant, in different apps: a claim survives crashes, and goes with the grant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis

from holdoff.names import TokenName
from holdoff_coordinator.custody.owners import PENDING_US, Owners
from holdoff_coordinator.custody.rules import SECOND
from tests.custodian import REFRESH_TOKEN, Custodian, key_directory, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartValkey


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def custodian(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Custodian]:
    """Give a coordinator with a key."""
    keys = key_directory(tmp_path_factory.mktemp("keys"), "first")
    with Custodian(url, keys) as one:
        yield one


def claims(url: str) -> dict[str, str]:
    """Read all claims."""
    with redis.Redis.from_url(url, decode_responses=True) as store:
        found: Any = store.keys("holdoff:*:owner")
        return {key: str(store.get(key)) for key in found}


def age(url: str, by_us: int) -> None:
    """Have all claims be older."""
    with redis.Redis.from_url(url) as store:
        for key, claim in claims(url).items():
            owner, since_us = claim.split(" ")
            store.set(key, f"{owner} {int(since_us) - by_us}")


def test_a_claim_goes_with_the_grant(custodian: Custodian, url: str) -> None:
    """Neither a deletion nor a put that was refused leaves one."""
    token = custodian.token()
    custodian.put(token)
    (claim,) = claims(url).values()
    assert claim.startswith(f"{token} ")
    refused(custodian.put, token, refresh_token="another-that-nobody-may-read")
    assert list(claims(url).values()) == [claim]
    refused(custodian.put, token)  # the same one: it stays claimed
    assert len(claims(url)) == 1
    custodian.delete(token)
    assert claims(url) == {}


def test_a_put_that_crashed(custodian: Custodian, url: str) -> None:
    """Its claim counts for two minutes, and is then taken over; that of a grant counts forever.

    Fails when a claim is taken over while its put may be under way, or is never taken over.
    """
    token, other = custodian.token(), custodian.token()
    secret = {"refresh_token": "one-for-two-that-nobody-may-read"}
    custodian.put(token, **secret)
    age(url, 10 * PENDING_US)
    assert refused(custodian.put, other, **secret).reason == "GRANT_DUPLICATE"
    # As if the replica had crashed before the put.
    app = token.split("/")[1]
    with redis.Redis.from_url(url) as store:
        store.hset(f"holdoff:{{{app}}}:grant:t", mapping={"claim": "", "fingerprint": ""})
    age(url, -10 * PENDING_US)
    error = refused(custodian.put, other, **secret)
    assert error.reason == "TOKEN_BUSY"
    assert error.retry_after_seconds
    assert error.retry_after_seconds <= PENDING_US / SECOND
    age(url, PENDING_US)
    custodian.put(other, **secret)
    assert refused(custodian.put, token, replace=True, **secret).reason == "GRANT_DUPLICATE"
    custodian.delete(other)
    assert claims(url) == {}


def test_two_puts_at_once(custodian: Custodian) -> None:
    """Of two tokens that are put at the same time with one grant at most one has it.

    Fails when each looks before the other has put its own.
    """
    for number in range(8):
        tokens = [custodian.token() for _ in range(4)]

        def put(token: str, number: int = number) -> bool:
            try:
                custodian.put(token, refresh_token=f"at-once-{number}-that-nobody-may-read")
            except grpc.RpcError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(put, tokens))
        assert done.count(True) == 1
        custodian.delete(tokens[done.index(True)])


def test_a_replica_that_was_stopped(
    custodian: Custodian, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put is undone if another token took the claim over while the replica was stopped.

    Fails when the claim is not looked at again after the put.
    """
    token, other = custodian.token(), custodian.token()
    claim = Owners.claim

    async def stopped(owners: Owners, fingerprint: str, name: TokenName) -> str:
        mine = await claim(owners, fingerprint, name)
        monkeypatch.setattr(Owners, "claim", claim)
        age(url, PENDING_US)
        await owners.claim(fingerprint, TokenName.parse(other))
        return mine

    monkeypatch.setattr(Owners, "claim", stopped)
    error = refused(custodian.put, token)
    assert error.reason == "TOKEN_BUSY"
    assert custodian.list(token.partition("/tokens/")[0]) == [[]]
    assert [value.split()[0] for value in claims(url).values()] == [other]
    custodian.put(other, refresh_token=f"{REFRESH_TOKEN}-of-{token}")
    custodian.delete(other)
    assert claims(url) == {}
