"""What an operator learns of grants in custody: metrics, trail, explanations and checks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import redis
from click.testing import CliRunner

from holdoff.cli import exits, main
from holdoff.policies import presets
from holdoff.simulator import Rotation, Switches, serving
from holdoff.simulator.switches import RefreshInterval
from holdoff.v1 import admin_service_pb2, audit_pb2, custody_service_pb2, grant_pb2
from holdoff_coordinator import metrics
from holdoff_coordinator.custody import checking, measuring
from holdoff_coordinator.custody.rules import Condition
from tests.custodian import Custodian, key_directory, refused
from tests.integration.test_hand_out import Refreshed, stream
from tests.integration.test_metrics import Samples, samples, value
from tests.integration.test_refreshing import SEED, policy_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

    from holdoff.policies import Policy
    from tests.conftest import StartValkey

Results = grant_pb2.GrantCheckResult


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


@pytest.fixture(scope="module")
def provider() -> Iterator[socket.socket]:
    """Give a server that accepts connections, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(30)
        yield listening


@pytest.fixture(scope="module")
def policies(provider: socket.socket) -> dict[str, Policy]:
    """Give a policy for that server."""
    host = f"127.0.0.1:{provider.getsockname()[1]}"
    quick = presets()["quickbooks"]
    oauth = msgspec.structs.replace(
        quick.oauth, token_urls=(f"http://{host}/token",), hosts=(host, "127.0.0.1:1")
    )
    return {**presets(), "local": msgspec.structs.replace(quick, name="local", oauth=oauth)}


@pytest.fixture(scope="module")
def custodian(url: str, keys: Path, policies: dict[str, Policy]) -> Iterator[Custodian]:
    """Give a coordinator with metrics that requests no access tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "FRESH_SECONDS", 0.0)
        patch.setattr(metrics, "READ_SECONDS", 30.0)
        patch.setattr(measuring, "FRESH_SECONDS", 0.0)
        patch.setattr(checking, "FRESH_SECONDS", 0.0)
        options = {"policies": policies, "metrics_listen": "127.0.0.1:0"}
        with Custodian(url, keys, terms={"loopback_http": True}, **options) as one:
            yield one


def local(custodian: Custodian, **grant: Any) -> str:
    """Put a grant of the policy for the server."""
    token = custodian.token("local")
    hosts = custodian.coordinator.policies.find("", "local").oauth.hosts
    custodian.put(token, grant={"api_hosts": [hosts[0]], **grant})
    return token


def run(custodian: Custodian, *words: str) -> Result:
    """Run a command; it prints no secret."""
    done = CliRunner().invoke(main, ["--endpoint", custodian.address, *words])
    assert "nobody-may-read" not in done.stdout + done.stderr
    return done


def measured(custodian: Custodian) -> Samples:
    """Read all metrics."""
    return asyncio.run(samples(custodian))


def checks(custodian: Custodian, token: str) -> dict[str, list[grant_pb2.GrantCheck]]:
    """Check a grant; return what was found by subject."""
    request = custody_service_pb2.CheckGrantRequest(name=f"{token}/grant")
    found: dict[str, list[grant_pb2.GrantCheck]] = {}
    for one in custodian.custody.CheckGrant(request).checks:
        assert "nobody-may-read" not in str(one)
        assert bool(one.remedy) == (one.result != Results.GRANT_CHECK_RESULT_OK)
        word = grant_pb2.GrantCheckSubject.Name(one.subject)
        found.setdefault(word.removeprefix("GRANT_CHECK_SUBJECT_").lower(), []).append(one)
    return found


def failed(found: dict[str, list[grant_pb2.GrantCheck]]) -> set[str]:
    """Return what failed."""
    return {
        subject
        for subject, some in found.items()
        if any(one.result == Results.GRANT_CHECK_RESULT_FAILED for one in some)
    }


def test_the_metrics_of_a_grant(custodian: Custodian, url: str) -> None:
    """State, ages and times left follow a grant, and its requests are counted by result."""
    one = Refreshed(custodian, url)
    app = one.scripts.name.app
    labels = {"app": app, "token": "t"}
    found = measured(custodian)
    assert value(found, "grant_state", **labels, state="ready") == 1
    assert value(found, "grant_access_token_seconds", **labels) == 0
    assert value(found, "grants_not_shown", app=app) == 0
    assert value(found, "grant_refreshes_total", app=app, result="issued") == 0
    assert value(found, "grant_life_seconds", **labels) is None
    one.refresh()
    one.begin()
    with stream(custodian, one.token) as some, stream(custodian, one.token) as other:
        some.token(), other.token()
        found = measured(custodian)
    assert value(found, "grant_state", **labels, state="ready") is None
    assert value(found, "grant_state", **labels, state="refreshing") == 1
    assert value(found, "grant_callers", **labels) == 2
    assert 1600 < (value(found, "grant_access_token_seconds", **labels) or 0) <= 1800
    assert 0 < (value(found, "grant_refresh_age_seconds", **labels) or 0) < 200
    days = (value(found, "grant_refresh_token_seconds", **labels) or 0) / 86400
    assert 29 < days <= 30
    refused = {"condition": Condition.REAUTHORIZE, "generation": one.generation}
    one.scripts.end("one", one.generation, step="NOT_ISSUED", result="REFUSED", **refused)
    found = measured(custodian)
    assert value(found, "grant_state", **labels, state="reauthorize") == 1
    assert value(found, "grant_callers", **labels) == 0
    custodian.delete(one.token)
    found = measured(custodian)
    assert value(found, "grant_state", **labels, state="reauthorize") is None


async def test_a_refresh_is_counted_by_the_replica_that_stored_it(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """From a request to a provider to the metric, and to the entry with the replica's name."""
    switches = Switches(refresh_interval=RefreshInterval.ENFORCED)
    async with serving(rotation=Rotation.UNTIL_USED, switches=switches) as provider:
        policy = policy_of(provider, Rotation.UNTIL_USED, has_interval=True)
        await asyncio.to_thread(_refresh_once, url, keys, tmp_path, policy)


def _refresh_once(url: str, keys: Path, spool: Path, policy: Policy) -> None:
    terms = {"loopback_http": True, "spool": spool}
    known = {**presets(), policy.name: policy}
    options = {"policies": known, "metrics_listen": "127.0.0.1:0"}
    with Custodian(url, keys, terms=terms, **options) as one:
        token = one.token(policy.name)
        one.put(
            token,
            grant={"client_id": SEED.client_id, "api_hosts": [policy.oauth.hosts[0]]},
            refresh_token=SEED.refresh_token,
            client_secret=SEED.client_secret,
        )
        app = token.split("/")[1]
        with stream(one, token) as some:
            some.token()
            found = measured(one)
        assert value(found, "grant_refreshes_total", app=app, result="issued") == 1
        assert value(found, "grant_callers", app=app, token="t") == 1
        request = admin_service_pb2.ListAuditEventsRequest(
            parent=token, kinds=[audit_pb2.AUDIT_KIND_GRANT_REFRESHED]
        )
        [event] = one.admin.ListAuditEvents(request).events
        assert (event.result, event.generation) == (grant_pb2.REFRESH_RESULT_ISSUED, 2)
        assert event.replica == f"{socket.gethostname()}:{os.getpid()}"


def test_grants_beyond_the_limit_are_counted(
    custodian: Custodian, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the number of series of an app has no bound."""
    first = custodian.token()
    second = custodian.token(name=f"{first}-2")
    for token in (first, second):
        custodian.put(token)
    measures: Any = custodian.coordinator._metrics
    monkeypatch.setattr(measures._grants, "_most", 1)
    app = first.split("/")[1]
    found = measured(custodian)
    assert value(found, "grants_not_shown", app=app) == 1
    assert value(found, "grant_callers", app=app, token="t") == 0
    assert value(found, "grant_callers", app=app, token="t-2") is None
    monkeypatch.setattr(measuring, "MOST", 0)
    found = measured(custodian)
    assert value(found, "grants_not_shown", app=app) == 2
    assert value(found, "grant_callers", app=app, token="t") is None


def test_the_end_of_a_grant_and_a_key_that_is_missing(
    custodian: Custodian, url: str, policies: dict[str, Policy], tmp_path: Path
) -> None:
    """The life of a grant counts from when it was put; another replica may lack the key."""
    token = local(custodian)
    labels = {"app": token.split("/")[1], "token": "t"}
    found = measured(custodian)
    years = (value(found, "grant_life_seconds", **labels) or 0) / 86400 / 365
    assert 4.9 < years <= 5
    assert 0 <= (value(found, "grant_age_seconds", **labels) or 0) < 300
    options = {"policies": policies, "metrics_listen": "127.0.0.1:0"}
    with Custodian(url, key_directory(tmp_path, "other"), **options) as other:
        found = measured(other)
        assert value(found, "grant_state", **labels, state="key_missing") == 1
        assert failed(checks(other, token)) == {"key", "spool", "token_url"}


def test_the_trail_has_each_refresh(custodian: Custodian, url: str) -> None:
    """By which replica, with which result and generation; hand-outs are counted."""
    one = Refreshed(custodian, url)
    one.refresh()
    one.begin()
    one.scripts.end(
        "one",
        one.generation,
        step="NOT_ISSUED",
        result="REFUSED",
        outcome="refused (dead): invalid_grant",
        generation=one.generation,
        condition=Condition.REAUTHORIZE,
    )
    request = admin_service_pb2.ListAuditEventsRequest(
        parent=one.token, kinds=[audit_pb2.AUDIT_KIND_GRANT_REFRESHED]
    )
    told = [
        (event.replica, event.result, event.generation, event.reason)
        for event in custodian.admin.ListAuditEvents(request).events
    ]
    assert told == [
        ("r", grant_pb2.REFRESH_RESULT_REFUSED, 2, "refused (dead): invalid_grant"),
        ("r", grant_pb2.REFRESH_RESULT_ISSUED, 2, "an access token"),
    ]
    shown = run(custodian, "audit", one.token, "--kind", "grant-refreshed").stdout
    assert "generation 2, refused: refused (dead): invalid_grant" in shown


def test_why_there_is_no_token(custodian: Custodian, url: str) -> None:
    """`explain` has state, reason, remedy, last request and users, for people and programs."""
    one = Refreshed(custodian, url)
    one.refresh()
    with stream(custodian, one.token) as some, stream(custodian, one.token) as other:
        some.token(), other.token()
        answer = json.loads(run(custodian, "explain", one.token, "--output", "json").stdout)
    grant = answer["grant"]
    assert (grant["status"]["state"], grant["has_access_token"]) == ("GRANT_STATE_READY", True)
    assert grant["users"] == [{"identity": "anonymous", "host": "ipv4:127.0.0.1", "streams": 2}]
    assert grant["last_attempt"]["outcome"] == "an access token"
    one.begin()
    dead = {"condition": Condition.REAUTHORIZE, "message": "the provider says invalid_grant"}
    facts = one.scripts.record().facts
    one.scripts.end("one", one.generation, expires_in_us=0, facts=facts, **dead)
    shown = run(custodian, "explain", one.token).stdout
    for words in (
        "access token  no",
        "reauthorize",
        "the provider says invalid_grant",
        f"holdoff grant authorize {one.token}",
    ):
        assert words in shown
    assert "reauthorize: the provider says" in run(custodian, "token", "show", one.token).stdout
    plain = custodian.create_token()
    assert "access token" not in run(custodian, "explain", plain).stdout
    assert run(custodian, "token", "show", plain).stdout.splitlines()[-1].split() == [
        "custody",
        "no",
    ]


def test_a_check_finds_nothing_wrong_and_sends_nothing(
    url: str, keys: Path, policies: dict[str, Policy], provider: socket.socket, tmp_path: Path
) -> None:
    """It connects and leaves: fails when a byte of a request is sent, or the grant changes."""
    terms = {"loopback_http": True, "spool": tmp_path}
    with Custodian(url, keys, terms=terms, policies=policies) as one:
        token = local(one)
        before = one.grant(token)
        done = run(one, "grant", "show", token, "--check")
        assert done.exit_code == exits.OK, done.stdout
        assert one.grant(token) == before
        connection, _ = provider.accept()
        with connection:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert list(tmp_path.iterdir()) == []
        words = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
        assert words == [
            *("policy", "state", "key", "seal", "spool", "clock", "token url", "api host")
        ]


def test_a_check_says_what_is_wrong(
    custodian: Custodian, url: str, policies: dict[str, Policy]
) -> None:
    """Each failure has a remedy; an API host that only jobs call is a warning."""
    token = local(custodian, api_hosts=["127.0.0.1:1"])
    found = checks(custodian, token)
    assert failed(found) == {"spool"}
    [host] = found["api_host"]
    assert (host.target, host.result) == ("127.0.0.1:1", Results.GRANT_CHECK_RESULT_WARNING)
    with redis.Redis.from_url(url) as store:
        key = f"holdoff:{{{token.split('/')[1]}}}:grant:t"
        store.hset(key, mapping={"sealed_grant": "c2VhbGVk", "condition": "STALE"})
    local_policy = policies["local"]
    oauth = msgspec.structs.replace(local_policy.oauth, hosts=("elsewhere.test",))
    changed = msgspec.structs.replace(local_policy, oauth=oauth)
    options = {"policies": {**policies, "local": changed}}
    with Custodian(url, custodian.folder, **options) as strict:
        assert failed(checks(strict, token)) == {"policy", "state", "seal", "spool", "token_url"}
        done = run(strict, "grant", "show", token, "--check", "--output", "json")
    assert done.exit_code == exits.CHECK_FAILED
    told = {one["subject"]: one["message"] for one in json.loads(done.stdout)["checks"]}
    assert told["GRANT_CHECK_SUBJECT_TOKEN_URL"] == "plain http is not allowed"


def test_an_answer_is_given_again_for_a_few_seconds(
    custodian: Custodian, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks in a row connect once; a host that takes too long is not waited for."""
    monkeypatch.setattr(checking, "FRESH_SECONDS", 60.0)
    monkeypatch.setattr(checking, "CHECK_SECONDS", 0.0)
    token = local(custodian)
    request = custody_service_pb2.CheckGrantRequest(name=f"{token}/grant")
    first = custodian.custody.CheckGrant(request)
    hosts = [one.message for one in first.checks if "in time" in one.message]
    assert len(hosts) == 2
    custodian.delete(token)
    assert custodian.custody.CheckGrant(request) == first
    monkeypatch.setattr(checking, "FRESH_SECONDS", 0.0)
    assert refused(custodian.custody.CheckGrant, request).reason == "GRANT_NOT_FOUND"
