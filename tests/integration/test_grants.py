"""Grants in custody, over gRPC: put, look at, list and delete them; and who hears of a secret."""

from __future__ import annotations

import asyncio
import base64
import logging
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis_lock
import structlog.testing

from holdoff import errors
from holdoff._core import duration
from holdoff.policies import presets, read_policy
from holdoff.v1 import admin_service_pb2, audit_pb2, budget_pb2, custody_service_pb2, grant_pb2
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.custody.sealing import Binding, GrantSecrets, Keyring, UnsealableError
from holdoff_coordinator.gate import AccessFile
from tests.custodian import (
    CLIENT_SECRET,
    REFRESH_TOKEN,
    Custodian,
    key_directory,
    refused,
    request_of,
)
from tests.harness import Replica, end_cooldown, wait_until
from tests.integration.test_isolation import credential_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartValkey

XERO = "https://identity.xero.com/connect/token"
State = grant_pb2.GrantState


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def custodian(url: str, keys: Path) -> Iterator[Custodian]:
    """Give a coordinator with keys, which tests share, each with apps of its own."""
    with Custodian(url, keys) as one:
        yield one


@pytest.fixture
def store(url: str) -> Iterator[redis.Redis]:
    """Give a plain client of the store."""
    with redis.Redis.from_url(url) as client:
        yield client


def record(store: redis.Redis, token: str) -> dict[str, str]:
    """Read a record as the store has it."""
    _, app, _, token_id = token.split("/")
    found: Any = store.hgetall(f"holdoff:{{{app}}}:grant:{token_id}")
    return {field.decode(): value.decode() for field, value in found.items()}


def test_what_is_put_is_shown(custodian: Custodian) -> None:
    """Promise 8: all but the secrets, with what only the policy says; and READY."""
    token = custodian.token()
    grant = custodian.put(token)
    assert grant == custodian.grant(token)
    assert (grant.name, grant.client_id) == (f"{token}/grant", "our-client")
    assert (grant.token_url, list(grant.api_hosts)) == (XERO, ["api.xero.com"])
    assert grant.client_authentication == grant_pb2.CLIENT_AUTHENTICATION_BASIC
    assert (grant.key_id, grant.generation) == ("first", 1)
    assert grant.etag == f"{grant.chain_id}.1"
    assert grant.status.state == State.GRANT_STATE_READY
    day = 24 * 3600
    age = grant.create_time.ToSeconds() - grant.refresh_time.ToSeconds()
    assert age == pytest.approx(3600, abs=2)
    idle = grant.idle_expire_time.ToSeconds() - grant.refresh_time.ToSeconds()
    assert idle == pytest.approx(60 * day, abs=2)
    assert not grant.HasField("expire_time")
    assert not grant.HasField("last_attempt")


def test_an_unknown_last_refresh_begins_a_cooldown(custodian: Custodian) -> None:
    """Promise 2: nobody refreshes, with a lease or in custody, until an interval has passed."""
    token = custodian.token("exact-online")
    where = {"token_url": START, "api_hosts": [START_HOST]}
    grant = custodian.put(token, grant=where, last_refresh_age=None)
    assert grant.status.state == State.GRANT_STATE_COOLING
    interval = grant.not_before_time.ToMilliseconds() - grant.refresh_time.ToMilliseconds()
    assert interval == custodian.show_token(token).rules.refresh_interval.ToMilliseconds()
    assert custodian.show_token(token).not_before_time == grant.not_before_time
    assert grant.status.until_time == grant.not_before_time
    assert "holdoff token show" in grant.status.message


def test_the_secrets_are_sealed_where_they_belong(custodian: Custodian, store: redis.Redis) -> None:
    """They open with the key, and only as what they were put as.

    Fails when a part of the binding is not what the record says.
    """
    token = custodian.token()
    grant = custodian.put(token)
    sealed = base64.b64decode(record(store, token)["sealed_grant"])
    ring = Keyring(KeyDirectory(custodian.folder).keys(), None)
    facts = (grant.token_url, grant.client_id, tuple(grant.api_hosts))
    found = ring.open(sealed, Binding(token, grant.chain_id, 1, *facts), GrantSecrets)
    assert found.refresh_token == f"{REFRESH_TOKEN}-of-{token}"
    assert found.client_secret == CLIENT_SECRET
    with pytest.raises(UnsealableError):
        ring.open(sealed, Binding(token, grant.chain_id, 2, *facts), GrantSecrets)


def test_a_public_client_has_no_secret(custodian: Custodian) -> None:
    """Fails when a client secret is required."""
    assert custodian.put(custodian.token(), client_secret="").generation == 1


# Conditions --------------------------------------------------------------------------------------


def test_a_grant_is_replaced_only_on_purpose(custodian: Custodian) -> None:
    """By its etag, or with `replace`; the generation rises with each put."""
    token = custodian.token()
    first = custodian.put(token)
    assert refused(custodian.put, token).reason == "GRANT_EXISTS"
    second = custodian.put(token, etag=first.etag)
    assert second.generation == 2
    assert second.chain_id != first.chain_id
    assert refused(custodian.put, token, etag=first.etag).reason == "GRANT_CHANGED"
    assert custodian.put(token, replace=True).generation == 3
    for etag in ("x", f"{second.etag} ", "a.b"):
        error = refused(custodian.put, token, etag=etag)
        assert (error.reason, "etag" in str(error)) == ("INVALID_FIELD", True)


def test_a_request_that_is_sent_again(custodian: Custodian) -> None:
    """Fails when a client whose answer was lost is told that there is a grant, or puts two."""
    token, request_id = custodian.token(), str(uuid.uuid4())
    first = custodian.put(token, request_id=request_id)
    assert first.chain_id == uuid.UUID(request_id).hex
    assert custodian.put(token, request_id=request_id) == first
    assert custodian.put(token, request_id=request_id, replace=True) == first
    second = custodian.put(token, etag=first.etag)
    assert second.generation == 2
    assert refused(custodian.put, token, request_id=request_id).reason == "GRANT_EXISTS"
    assert refused(custodian.put, token, request_id="x").reason == "INVALID_FIELD"


def test_a_token_without_a_grant(custodian: Custodian) -> None:
    """`replace` puts one; an etag names none; there is nothing to show or delete."""
    token = custodian.token()
    for call in (custodian.grant, custodian.delete):
        error = refused(call, token)
        assert error.reason == "GRANT_NOT_FOUND"
        assert "holdoff grant put" in str(error)
    etag = f"{'0' * 32}.1"
    assert refused(custodian.put, token, etag=etag).reason == "GRANT_CHANGED"
    assert custodian.put(token, replace=True).generation == 1


def test_a_deletion_takes_the_secrets_and_leaves_the_cooldown(
    custodian: Custodian, store: redis.Redis
) -> None:
    """Promise 2: a grant that is put again waits, and gets a generation of its own."""
    token = custodian.token("exact-online")
    where = {"token_url": START, "api_hosts": [START_HOST]}
    first = custodian.put(token, grant=where, last_refresh_age=None)
    wrong = f"{first.chain_id}.2"
    assert refused(custodian.delete, token, wrong).reason == "GRANT_CHANGED"
    custodian.delete(token, first.etag)
    assert refused(custodian.grant, token).reason == "GRANT_NOT_FOUND"
    left = record(store, token)
    assert (left["sealed_grant"], left["facts"], left["fingerprint"]) == ("", "", "")
    error = refused(custodian.put, token, grant=where)
    assert (error.reason, error.metadata["cause"]) == ("TOKEN_BUSY", "COOLING")
    end_cooldown(store, token)
    assert custodian.put(token, grant=where).generation == 2


# Refusals ----------------------------------------------------------------------------------------


def test_without_keys_nothing_is_put(url: str, custodian: Custodian) -> None:
    """The error says how to generate a key, and reading goes on: the state is KEY_MISSING."""
    token = custodian.token()
    with Replica(url) as plain:
        error = refused(plain.custody.PutGrant, request_of(token))
        assert error.reason == "CUSTODY_OFF"
        assert "key generate" in str(error)
        custodian.put(token)
        request = custody_service_pb2.GetGrantRequest(name=f"{token}/grant")
        status = plain.custody.GetGrant(request).grant.status
        assert status.state == State.GRANT_STATE_KEY_MISSING
        assert "first.key" in status.message


def test_a_coordinator_with_other_keys(
    url: str, custodian: Custodian, tmp_path: Path, keys: Path
) -> None:
    """It puts nothing that others could not open, and says which key it needs.

    Fails when each coordinator seals with a key of its own choice.
    """
    token = custodian.token()
    custodian.put(token)
    with Custodian(url, key_directory(tmp_path, "second")) as other:
        error = refused(other.put, other.token())
        assert error.reason == "CUSTODY_KEY_MISSING"
        assert "first.key" in str(error)
        assert other.grant(token).status.state == State.GRANT_STATE_KEY_MISSING
        first = tmp_path / "first.key"
        first.write_bytes((keys / "first.key").read_bytes())
        first.chmod(0o600)
        assert other.put(other.token()).key_id == "first"
        assert other.grant(token).status.state == State.GRANT_STATE_READY


def test_another_key_of_the_same_id(url: str, custodian: Custodian, tmp_path: Path) -> None:
    """Two hosts that each generated a key are told to compare them."""
    custodian.put(custodian.token())
    with Custodian(url, key_directory(tmp_path, "first")) as other:
        error = refused(other.put, other.token())
    assert (error.reason, "CHECK" in str(error)) == ("CUSTODY_KEY_MISSING", True)


def test_an_open_coordinator_changes_nothing(url: str, keys: Path, custodian: Custodian) -> None:
    """One that the network can reach, and that asks nobody who they are."""
    token = custodian.token()
    custodian.put(token)
    with Custodian(url, keys, terms={"is_closed": False}) as other:
        for call in (lambda: other.put(other.token()), lambda: other.delete(token)):
            error = refused(call)
            assert (error.reason, "--access-file" in str(error)) == ("CUSTODY_OFF", True)


def test_a_lease_keeps_a_token_out_of_custody(custodian: Custodian) -> None:
    """Its holder may refresh by itself; the error says when the lease ends at the latest."""
    token = custodian.token()
    offer = custodian.hold(token, ttl=60.0)
    error = refused(custodian.put, token)
    assert (error.reason, error.metadata["cause"]) == ("TOKEN_BUSY", "LEASED")
    assert error.retry_after_seconds == pytest.approx(60, abs=20)
    custodian.release(offer)
    custodian.put(token)
    custodian.hold(token)  # a shared one, whose holder does not refresh
    custodian.put(token, replace=True)


def test_a_foreign_lock_keeps_a_token_out_of_custody(
    custodian: Custodian, store: redis.Redis
) -> None:
    """A user of python-redis-lock may refresh, too."""
    token = custodian.token()
    with redis_lock.Lock(store, custodian.show_token(token).lock_name, expire=60):
        assert refused(custodian.put, token).metadata["cause"] == "LOCKED"


def test_a_cooldown_keeps_a_token_out_of_custody(custodian: Custodian) -> None:
    """Until it has passed; a grant that is in custody already may be replaced meanwhile."""
    where = {"token_url": START, "api_hosts": [START_HOST]}
    token = custodian.token("exact-online", last_refresh_unknown=True)
    error = refused(custodian.put, token, grant=where)
    assert (error.reason, error.metadata["cause"]) == ("TOKEN_BUSY", "COOLING")
    assert error.retry_after_seconds
    assert error.retry_after_seconds > 60
    other = custodian.token("exact-online")
    custodian.put(other, grant=where, last_refresh_age=None)
    replaced = custodian.put(other, grant=where, replace=True)
    assert replaced.status.state == State.GRANT_STATE_COOLING


def test_a_quarantine_keeps_a_token_out_of_custody(
    custodian: Custodian, store: redis.Redis
) -> None:
    """What is known of its last refresh may be wrong."""
    token = custodian.token()
    app = token.split("/")[1]
    seconds, _ = store.time()
    store.hset(f"holdoff:{{{app}}}", "quarantine_until_us", (seconds + 60) * 1_000_000)
    error = refused(custodian.put, token)
    assert (error.reason, "quarantine show" in str(error)) == ("QUARANTINED", True)
    assert error.retry_after_seconds


def test_two_names_for_one_grant(custodian: Custodian) -> None:
    """They would refresh it in turns, each within the interval of the other."""
    token = custodian.token()
    custodian.put(token)
    other = custodian.token(name=f"{token}-too")
    secret = {"refresh_token": f"{REFRESH_TOKEN}-of-{token}"}
    error = refused(custodian.put, other, **secret)
    assert error.reason == "GRANT_DUPLICATE"
    assert f"{token} has" in str(error)
    custodian.delete(token)
    custodian.put(other, **secret)
    elsewhere = custodian.token()  # in another app
    error = refused(custodian.put, elsewhere, **secret)
    assert (error.reason, f"{other} has" in str(error)) == ("GRANT_DUPLICATE", True)
    custodian.put(other, replace=True)  # another refresh token
    custodian.put(elsewhere, **secret)
    error = refused(custodian.put, other, replace=True, **secret)
    assert error.reason == "GRANT_DUPLICATE"


START = "https://start.exactonline.nl/api/oauth2/token"
START_HOST = "start.exactonline.nl"
WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a URL of another host": ("xero", {"token_url": START}, "token_url", XERO),
    "a URL with more": ("xero", {"token_url": f"{XERO}/"}, "token_url", XERO),
    "a host of nobody": ("xero", {"api_hosts": ["evil.example"]}, "api_hosts", "api.xero.com"),
    "a host twice": ("xero", {"api_hosts": ["api.xero.com"] * 2}, "api_hosts", "api.xero.com"),
    "one of several URLs": ("exact-online", {"api_hosts": [START_HOST]}, "token_url", START),
    "some of several hosts": ("exact-online", {"token_url": START}, "api_hosts", START_HOST),
    "none in the policy": ("shopify", {}, "token_url", 'like = "shopify"'),
    "another way": ("xero", {"client_authentication": 3}, "client_authentication", "BASIC"),
    "an unknown way": ("xero", {"client_authentication": 99}, "client_authentication", "BASIC"),
    "no client id": ("xero", {"client_id": ""}, "client_id", "1 to 500"),
    "a client id of two lines": ("xero", {"client_id": "a\nb"}, "client_id", "printable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_policy_does_not_allow(custodian: Custodian, case: str) -> None:
    """Token URL and hosts are exactly the policy's; the error lists what may be written."""
    policy, fields, field, words = WRONG[case]
    error = refused(custodian.put, custodian.token(policy), grant=fields)
    assert error.reason == "INVALID_FIELD"
    assert str(error).startswith(f"grant.{field}: ")
    assert words in str(error)


@pytest.mark.parametrize("field", ["refresh_token", "client_secret"])
@pytest.mark.parametrize("text", ["nobody-may-read\n", "nobody-may-read-\u00e9", "x" * 8001])
def test_a_secret_that_is_none(custodian: Custodian, field: str, text: str) -> None:
    """It is refused without being repeated."""
    error = refused(custodian.put, custodian.token(), **{field: text})
    assert error.reason == "INVALID_FIELD"
    assert str(error).startswith(f"{field}: must be ")
    assert "x" * 20 not in str(error)


def test_no_refresh_token(custodian: Custodian) -> None:
    """A grant without one is none."""
    assert refused(custodian.put, custodian.token(), refresh_token="").reason == "INVALID_FIELD"


def test_an_unknown_token(custodian: Custodian) -> None:
    """A grant belongs to a token, whose policy says where it may go."""
    error = refused(custodian.put, "apps/nobody/tokens/nothing")
    assert (error.reason, "holdoff token create" in str(error)) == ("TOKEN_NOT_FOUND", True)


def test_http_is_for_simulators(url: str, keys: Path, tmp_path: Path) -> None:
    """A policy with a token URL on this host is refused, unless the operator allows it."""
    path = tmp_path / "simulated.toml"
    path.write_text(
        'like = "xero"\nname = "simulated"\n[oauth]\n'
        'token_urls = ["http://127.0.0.1:8080/token"]\nhosts = ["127.0.0.1:8080"]\n'
    )
    policies = {**presets(), "simulated": read_policy(path)}
    with Custodian(url, keys, policies=policies) as strict:
        error = refused(strict.put, strict.token("simulated"))
        assert "--custody-loopback-http" in str(error)
    terms = {"loopback_http": True}
    with Custodian(url, keys, policies=policies, terms=terms) as allowing:
        assert allowing.put(allowing.token("simulated")).token_url.startswith("http://127.0.0.1")


# States ------------------------------------------------------------------------------------------


def test_a_back_off_holds_it(custodian: Custodian) -> None:
    """The state says what prevents a request, until when, and where to look."""
    token = custodian.token()
    custodian.put(token)
    custodian.admin.SetBackOff(
        admin_service_pb2.SetBackOffRequest(
            scope=budget_pb2.Scope(token=token), reason="the provider asked", length=duration(60)
        )
    )
    status = custodian.grant(token).status
    assert status.state == State.GRANT_STATE_HELD
    assert f"holdoff explain {token}" in status.message
    assert status.HasField("until_time")


# Lists -------------------------------------------------------------------------------------------


def test_lists_have_pages(start_valkey: StartValkey, keys: Path) -> None:
    """By name, of an app or of all; tokens without a grant are left out, and so are deleted ones.

    Fails when a page ends before its last grant, or repeats one.
    """
    with Custodian(start_valkey().url, keys) as alone:
        names = []
        for app in ("b", "a"):
            for number in range(3):
                token = alone.token(name=f"apps/{app}/tokens/t{number}")
                alone.put(token)
                names.append(f"{token}/grant")
        alone.token(name="apps/a/tokens/none")
        names.sort()
        assert alone.list() == [names]
        assert alone.list(size=2) == [names[:2], names[2:4], names[4:]]
        assert alone.list(size=4) == [names[:4], names[4:]]
        assert alone.list("apps/b", size=3) == [names[3:]]
        assert alone.list("apps/none") == [[]]
        alone.delete("apps/a/tokens/t1")
        assert alone.list("apps/a") == [[names[0], names[2]]]


@pytest.mark.parametrize(
    "damage", [{"generation": "x"}, {"condition": "x"}, {"facts": "x"}, {"created_us": "x"}]
)
def test_a_damaged_grant_affects_no_other(
    custodian: Custodian, store: redis.Redis, damage: dict[Any, Any]
) -> None:
    """A list leaves it out; who asks for it hears that it is damaged."""
    token = custodian.token()
    other = custodian.token(name=f"{token}-too")
    app = token.split("/")[1]
    for one in (token, other):
        custodian.put(one)
    store.hset(f"holdoff:{{{app}}}:grant:t", mapping=damage)
    assert custodian.list(f"apps/{app}") == [[f"{other}/grant"]]
    assert refused(custodian.grant, token).reason == "STORE_DAMAGED"


# Who hears of it ---------------------------------------------------------------------------------


def test_puts_and_deletions_are_audited(custodian: Custodian) -> None:
    """With who did it; they are among operators' actions."""
    token = custodian.token()
    custodian.put(token)
    custodian.put(token, replace=True)
    custodian.delete(token)
    request = admin_service_pb2.ListAuditEventsRequest(parent=token)
    events = custodian.admin.ListAuditEvents(request).events
    kinds = [(one.kind, one.reason, one.identity) for one in events]
    assert kinds[:3] == [
        (audit_pb2.AUDIT_KIND_GRANT_DELETED, "", "anonymous"),
        (audit_pb2.AUDIT_KIND_GRANT_PUT, "replaced", "anonymous"),
        (audit_pb2.AUDIT_KIND_GRANT_PUT, "", "anonymous"),
    ]


def test_a_custodian_of_one_token_hears_nothing_of_another(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """Who has the refresh token of a token that it may not see is not told which one that is."""
    with Custodian(url, keys) as operator:
        token = operator.token()
        other = operator.token(name=f"{token}-too")
        operator.put(token)
    access = tmp_path / "access.toml"
    access.write_text(
        '[[grants]]\nidentities = ["credential:some"]\nrole = "custodian"\n'
        f'resources = ["{other}"]\n'
    )
    metadata = (("authorization", f"Bearer {credential_of(url, 'some')}"),)
    with Custodian(url, keys, access=AccessFile(access)) as guarded:
        request = request_of(other, refresh_token=f"{REFRESH_TOKEN}-of-{token}")
        error = refused(lambda: guarded.custody.PutGrant(request, metadata=metadata))
        assert (error.reason, "another token" in str(error)) == ("GRANT_DUPLICATE", True)
        assert f"{token} " not in str(error)
        request = request_of(other)
        assert guarded.custody.PutGrant(request, metadata=metadata).grant.generation == 1
        listed = guarded.custody.ListGrants(
            custody_service_pb2.ListGrantsRequest(), metadata=metadata
        )
        assert [one.name for one in listed.grants] == [f"{other}/grant"]


def test_secrets_are_nowhere(
    start_valkey: StartValkey, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 8: neither in the store's commands, log and dump, nor in logs, audit or metrics.

    Fails when a secret is sent to the store as it is, or logged.
    """
    # gRPC crashes when the tracebacks that it logs at DEBUG are collected in another thread.
    caplog.set_level(logging.INFO, "grpc")
    caplog.set_level(logging.DEBUG)  # the last, since it also sets what is captured
    server = start_valkey("--appendonly", "yes", "--rdbcompression", "no")
    folder = Path(server.url.removeprefix("unix://")).parent
    seen: list[str] = []
    with (
        structlog.testing.capture_logs() as logs,
        Custodian(server.url, keys, metrics_listen="127.0.0.1:0") as custodian,
        redis.Redis.from_url(server.url) as store,
        store.monitor() as monitor,
    ):
        token = custodian.token()
        first = custodian.put(token)
        seen.append(str(first))
        refused(custodian.put, token)
        refused(custodian.put, token, replace=True, grant={"token_url": "https://evil.example/"})
        custodian.put(token, etag=first.etag)
        seen += map(str, (custodian.grant(token), custodian.list()))
        request = admin_service_pb2.ListAuditEventsRequest(parent=token)
        seen.append(str(custodian.admin.ListAuditEvents(request)))
        address = custodian.coordinator.metrics_address
        with urllib.request.urlopen(f"http://{address}/metrics") as metrics:
            seen.append(metrics.read().decode())
        store.save()
        store.echo("the-end")
        for command in monitor.listen():
            seen.append(command["command"])
            if "the-end" in seen[-1]:
                break
        custodian.delete(token)
    seen += [str(logs), caplog.text]
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen += [path.read_bytes().decode(errors="replace") for path in files]
    everything = "\n".join(seen)
    assert {"dump.rdb", "manifest"} <= {path.name.rpartition("aof.")[2] for path in files}
    assert "our-client" in everything  # which is no secret: what is searched has the record
    assert "sealed_grant" in everything
    for secret in (REFRESH_TOKEN, CLIENT_SECRET):
        assert secret not in everything
        assert base64.b64encode(secret.encode()).decode().rstrip("=")[:-2] not in everything


def test_the_clients(custodian: Custodian, store: redis.Redis) -> None:
    """Both clients do the same: put, get, list, delete; and raise errors of their own."""
    import holdoff  # noqa: PLC0415 - the asyncio client prepares gRPC when it is imported

    token = custodian.token()
    fields: dict[str, Any] = {"client_id": "our-client", "refresh_token": f"{token}'s"}
    with holdoff.Client(custodian.address) as client:
        first = client.grants.put(token, last_refresh_age_seconds=3600, **fields)
        assert client.grants.get(token) == first
        assert [one.name for one in client.grants.list(token.partition("/tokens/")[0])]
        with pytest.raises(errors.GrantExists):
            client.grants.put(token, **fields)
        with pytest.raises(ValueError, match="not both"):
            client.grants.put(token, etag=first.etag, replace=True, **fields)
        client.grants.delete(token, etag=first.etag)

    async def other() -> None:
        async with holdoff.aio.Client(custodian.address) as client:
            with pytest.raises(errors.GrantNotFound):
                await client.grants.get(token)
            put = await client.grants.put(token, client_authentication="basic", **fields)
            assert put.generation == 2
            app = token.partition("/tokens/")[0]
            assert [one async for one in client.grants.list(app)] == [
                await client.grants.get(token)
            ]
            await client.grants.delete(token)

    asyncio.run(other())
    wait_until(lambda: record(store, token)["sealed_grant"] == "")
