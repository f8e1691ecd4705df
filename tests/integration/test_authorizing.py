"""A person authorizes an app: the right, the URL, the exchange of the code, and what it leaves."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
import redis
from click.testing import CliRunner

import holdoff
from holdoff import errors, testing
from holdoff.cli import main
from holdoff.v1 import audit_pb2, grant_pb2
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.v1 import custody_service_pb2

    Begun = custody_service_pb2.BeginAuthorizationResponse

State = grant_pb2.GrantState
REDIRECT = "https://app.example.com/callback?tenant=1"
INTERVAL_SECONDS = 572
TAKEOVER_SECONDS = 100


def browse(authorization_url: str, user: str) -> str:
    """Be the browser of a person who allows the app, or denies it; return where it is sent."""
    url = urlsplit(f"{authorization_url}&user={user}")
    provider = http.client.HTTPConnection(url.netloc)
    provider.request("GET", f"{url.path}?{url.query}")
    location = provider.getresponse().headers["Location"]
    provider.close()
    return location


@dataclass
class World:
    """A coordinator with a grant in custody, its client, and the provider."""

    custody: testing.Custody
    client: holdoff.Client

    @property
    def token(self) -> str:
        """The token."""
        return self.custody.token

    def begin(self, token: str = "") -> Begun:
        """Begin an authorization of the token, or of another one without a grant."""
        arguments: dict[str, Any] = {"redirect_uri": REDIRECT, "replace": True}
        if token:
            seed = self.custody.seed
            arguments |= {"client_id": seed.client_id, "client_secret": seed.client_secret}
            arguments["api_hosts"] = [urlsplit(self.custody.provider).netloc]
        return self.client.grants.begin_authorization(token or self.token, **arguments)

    def allow(self, begun: Begun) -> dict[str, str]:
        """Allow the app; return what comes back with the browser."""
        back = browse(begun.authorization_url, self.custody.seed.user)
        assert back.startswith(f"{REDIRECT}&")
        return {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}

    def complete(self, back: dict[str, str], token: str = "") -> grant_pb2.Grant:
        """Complete an authorization with what came back."""
        done = self.client.grants.complete_authorization(
            token or self.token, back["state"], code=back["code"]
        )
        assert done is not None
        return done

    def authorize(self, token: str = "") -> grant_pb2.Grant:
        """Do all of it."""
        return self.complete(self.allow(self.begin(token)), token)

    def fault(self, **fault: Any) -> None:
        """Have the next token request go wrong."""
        data = json.dumps({"path": "/api/oauth2/token", **fault}).encode()
        url = f"{self.custody.provider}/_simulator/faults"
        urllib.request.urlopen(url, data).close()  # noqa: S310

    def report(self) -> tuple[int, int, int]:
        """Return how many tokens were issued, requests were refused, and rules were violated."""
        url = f"{self.custody.provider}/_simulator/report"
        with urllib.request.urlopen(url) as answer:  # noqa: S310
            report = json.load(answer)
        totals = report["token_requests"]
        violations = report["agents"].get("holdoff", {"violations": 0})["violations"]
        return totals["accepted"], totals["refused"], violations

    def access_token(self) -> str:
        """Get an access token."""
        with self.client.access_token(self.token) as access:
            return access.current(20)

    def other_token(self) -> str:
        """Create a token without a grant."""
        token = f"apps/{uuid.uuid4().hex}/tokens/t"
        self.client.create_token(token, policy="simulated")
        return token


@pytest.fixture
def world() -> Iterator[World]:
    """Give a coordinator and a provider."""
    with testing.custody() as custody, holdoff.Client(custody.endpoint) as client:
        yield World(custody, client)


def test_a_new_grant_replaces_the_old_one(world: World) -> None:
    """It needs nothing but the redirect URI, and its access token is handed out at once.

    Fails when the exchange needs a second token request, or the interval does not count it.
    """
    before = world.client.grants.get(world.token)
    begun = world.client.grants.begin_authorization(
        world.token, redirect_uri=REDIRECT, scopes=["offline_access", "sales"], replace=True
    )
    query = parse_qs(urlsplit(begun.authorization_url).query)
    assert query["redirect_uri"] == [REDIRECT]
    assert query["scope"] == ["offline_access sales"]
    assert query["code_challenge_method"] == ["S256"]
    assert query["state"] == [begun.state]
    done = world.complete(world.allow(begun))
    assert done.chain_id != before.chain_id
    assert done.generation == before.generation + 1
    assert done.client_id == before.client_id
    assert done.status.state == State.GRANT_STATE_READY
    assert world.access_token()
    assert world.report() == (1, 0, 0)
    waits = done.not_before_time.ToSeconds() - done.refresh_time.ToSeconds()
    assert waits >= INTERVAL_SECONDS
    with pytest.raises(errors.TokenBusy) as caught:
        world.begin()
    assert caught.value.metadata["cause"] == "COOLING"
    assert 0 < (caught.value.retry_after_seconds or 0) <= INTERVAL_SECONDS
    world.custody.pass_seconds(INTERVAL_SECONDS + 3)
    assert world.access_token()
    assert world.report() == (2, 0, 0)


def test_a_first_grant(world: World) -> None:
    """No exclusive lease begins meanwhile; giving up frees the token at once.

    Fails when the right does not hold a token that is not in custody, or a given-up one stays.
    """
    token = world.other_token()
    begun = world.begin(token)
    with pytest.raises(errors.TokenCooling):
        world.client.acquire(token, wait_seconds=0)
    ended = world.client.grants.complete_authorization(token, begun.state, error="access_denied")
    assert ended is None
    with world.client.acquire(token, wait_seconds=0):
        with pytest.raises(errors.TokenBusy) as caught:
            world.begin(token)
        assert caught.value.metadata["cause"] == "LEASED"


def test_a_first_grant_is_put(world: World) -> None:
    """Where there was none; its token is in custody then."""
    token = world.other_token()
    done = world.authorize(token)
    assert (done.generation, done.client_id) == (1, world.custody.seed.client_id)
    first = world.client.acquire(token, wait_seconds=0)
    second = world.client.acquire(token, wait_seconds=0)  # shared, as in custody
    for one in (first, second):
        one.release()


def test_nothing_else_is_requested_meanwhile(world: World) -> None:
    """A refresh waits for the authorization, and is made when it is given up.

    Fails when `begin_refresh` does not regard the right.
    """
    begun = world.begin()
    with (
        world.client.access_token(world.token) as access,
        pytest.raises(errors.NoAccessToken, match="authoriz"),
    ):
        access.current(1)
    assert world.client.grants.get(world.token).status.state == State.GRANT_STATE_HELD
    assert world.report() == (0, 0, 0)
    world.client.grants.complete_authorization(world.token, begun.state, error="cancelled")
    assert world.access_token()
    assert world.report() == (1, 0, 0)


def test_only_the_last_one_can_be_completed(world: World) -> None:
    """A state that is wrong or was replaced ends nothing; a repeated request changes nothing."""
    first = world.allow(world.begin())
    second = world.allow(world.begin())
    for state in (first["state"], "x" * 64):
        with pytest.raises(errors.InvalidField, match="state"):
            world.complete({**second, "state": state})
    done = world.complete(second)
    assert world.complete(second).etag == done.etag
    assert world.report() == (1, 0, 0)
    with pytest.raises(errors.InvalidField, match="state"):
        world.complete(first)
    other = world.other_token()
    with pytest.raises(errors.AuthorizationNotFound):
        world.complete(second, other)


def test_it_expires(world: World) -> None:
    """After ten minutes its code is not sent, and it holds nothing."""
    back = world.allow(world.begin())
    world.custody.pass_seconds(601)
    with pytest.raises(errors.AuthorizationNotFound):
        world.complete(back)
    assert world.access_token()
    assert world.report() == (1, 0, 0)


@pytest.mark.parametrize(
    ("fault", "issued", "words"),
    [
        ({}, 0, "refused"),
        ({"fault": "partial-answer", "without": ["refresh_token"]}, 1, "offline_access"),
        ({"fault": "lost-answer"}, 1, "did not answer"),
        ({"fault": "error", "status": 302}, 0, "did not answer"),
    ],
    ids=["refused", "no refresh token", "no answer", "302"],
)
def test_the_old_grant_stays(world: World, fault: dict[str, Any], issued: int, words: str) -> None:
    """Where nothing comes of an exchange; one that may have been answered counts for the interval.

    Fails when the old grant is replaced before the answer is there, or an exchange without an
    answer, or with half a one, is forgotten.
    """
    before = world.client.grants.get(world.token)
    back = world.allow(world.begin())
    if fault:
        world.fault(**fault)
    else:
        back["code"] = "another"
    with pytest.raises(errors.AuthorizationFailed, match=words):
        world.complete(back)
    after = world.client.grants.get(world.token)
    assert after.etag == before.etag
    with pytest.raises(errors.AuthorizationNotFound):
        world.complete(back)
    if words == "refused":
        assert world.access_token()
        assert world.report() == (1, 1, 0)
        return
    with pytest.raises(errors.TokenBusy) as caught:
        world.begin()
    least = INTERVAL_SECONDS - 20 + (TAKEOVER_SECONDS if "did not" in words else 0)
    assert (caught.value.retry_after_seconds or 0) > least
    world.custody.pass_seconds(INTERVAL_SECONDS + TAKEOVER_SECONDS + 10)
    assert world.access_token()
    assert world.report() == (issued + 1, 0, 0)


def test_a_code_that_may_not_be_sent_yet_is_kept(world: World) -> None:
    """It is sent when what prevents that is over.

    Fails when the code is sent in spite of it, or the authorization ends.
    """
    token = world.other_token()
    back = world.allow(world.begin(token))
    world.client.set_back_off(token, 60, "maintenance")
    with pytest.raises(errors.TokenBusy, match="was not"):
        world.complete(back, token)
    assert world.report() == (0, 0, 0)
    (found,) = world.client.list_back_offs(token.partition("/tokens/")[0])
    world.client.clear_back_off(found.name, reason="done")
    assert world.complete(back, token).generation == 1


def test_what_makes_no_sense_is_refused(world: World) -> None:
    """With the field that is wrong, and before anything is held."""
    for fields, words in (
        ({"redirect_uri": "http://example.com/back"}, "redirect_uri"),
        ({"redirect_uri": "https://example.com/#here"}, "redirect_uri"),
        ({"redirect_uri": "nothing"}, "redirect_uri"),
        ({"redirect_uri": "x" * 3000}, "redirect_uri"),
        ({"scopes": ["a b"]}, "scopes"),
        ({"scopes": ["a"] * 51}, "scopes"),
        ({"client_secret": "ü"}, "client_secret"),
        ({"api_hosts": ["elsewhere.example.com"]}, "api_hosts"),
    ):
        arguments: dict[str, Any] = {"redirect_uri": REDIRECT, "replace": True, **fields}
        with pytest.raises(errors.InvalidField, match=words):
            world.client.grants.begin_authorization(world.token, **arguments)
    assert world.access_token()


def test_the_audit_trail(world: World) -> None:
    """Has who began an authorization, and what came of it."""
    begun = world.begin()
    world.client.grants.complete_authorization(world.token, begun.state, error="access_denied")
    world.authorize()
    app = world.token.partition("/tokens/")[0]
    found = [
        (audit_pb2.AuditKind.Name(one.kind).removeprefix("AUDIT_KIND_"), one.reason)
        for one in world.client.list_audit_events(app)
        if one.identity
    ]
    assert [one for one in found[::-1] if "AUTH" in f"{one}".upper()] == [
        ("AUTHORIZATION_BEGAN", ""),
        ("AUTHORIZATION_FAILED", "access_denied"),
        ("AUTHORIZATION_BEGAN", ""),
        ("GRANT_PUT", "authorized"),
    ]


class Command:
    """`holdoff grant authorize`, as a process."""

    def __init__(self, world: World, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("holdoff")), "--endpoint"),
                *(world.custody.endpoint, "grant", "authorize", world.token, *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        lines = iter(self.process.stderr.readline, "")
        self.url = next(line for line in lines if line.startswith("http")).strip()

    def end(self, text: str = "") -> tuple[int, str, str]:
        """Return exit code, output, and the rest of what it said."""
        output, said = self.process.communicate(text, timeout=60)
        return self.process.returncode, output, said


def get(url: str) -> int:
    """Return the status of an answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("GET", f"{parts.path}?{parts.query}")
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_command_serves_the_redirect(world: World) -> None:
    """It refuses what is not of this authorization, and shows the new grant."""
    uri = f"http://127.0.0.1:{free_port()}/callback"
    command = Command(world, "--redirect-uri", uri, "--output", "json")
    assert get(f"{uri}?code=stolen&state=another") == 400
    assert get(f"{uri}?code=twice&code=other&state=another") == 400
    assert get(f"{uri}?state=http://[&code=x") == 400
    assert get(f"{uri}/elsewhere?") == 404
    assert get(browse(command.url, world.custody.seed.user)) == 200
    code, output, _ = command.end()
    assert code == 0
    assert json.loads(output)["generation"] == "2"
    assert world.report() == (1, 0, 0)


def test_the_command_takes_an_address(world: World) -> None:
    """Where the redirect URI is not of this host; one that is wrong is asked for again."""
    command = Command(world, "--redirect-uri", REDIRECT)
    back = browse(command.url, world.custody.seed.user)
    code, output, said = command.end(f"https://elsewhere.example.com/?code=a\n{back}\n")
    assert code == 0, said
    assert "state" in said
    assert "ready" in output
    assert "code=" not in said + output


@pytest.mark.parametrize("ends", ["denied", "interrupted", "terminated"])
def test_the_command_gives_up(world: World, ends: str) -> None:
    """So that the token is refreshed at once; nothing changed."""
    uri = f"http://localhost:{free_port()}/callback"
    before = world.client.grants.get(world.token)
    command = Command(world, "--redirect-uri", uri)
    if ends == "denied":
        assert get(browse(command.url, "")) == 200
    else:
        sent = signal.SIGINT if ends == "interrupted" else signal.SIGTERM
        command.process.send_signal(sent)
    code, output, said = command.end()
    assert (code, output) == ({"denied": 77, "interrupted": 130, "terminated": 143}[ends], ""), said
    assert world.client.grants.get(world.token).etag == before.etag
    assert world.access_token()


def test_the_command_frees_the_token_when_the_code_cannot_be_sent(world: World) -> None:
    """It says what it waits for, and a signal ends that, too.

    Fails when the token stays held for ten minutes after the command has ended.
    """
    uri = f"http://127.0.0.1:{free_port()}/callback"
    command = Command(world, "--redirect-uri", uri)
    found = world.client.set_back_off(world.token, 300, "maintenance")
    assert get(browse(command.url, world.custody.seed.user)) == 200
    assert command.process.stderr
    waits = next(line for line in command.process.stderr if "waiting for apps/" in line)
    assert "backs off" in waits
    command.process.send_signal(signal.SIGINT)
    assert command.end()[0] == 130
    world.client.clear_back_off(found.name, "over")
    assert world.access_token()
    assert world.report() == (1, 0, 0)


@pytest.mark.parametrize(
    "uri", ["http://[", "http://127.0.0.1:99999/", "http://localhost:x/", "http://127.0.0.1:-1/"]
)
def test_a_redirect_uri_that_cannot_be_is_named(world: World, uri: str) -> None:
    """Before anything is held."""
    words = ["--endpoint", world.custody.endpoint, "grant", "authorize", world.token]
    done = CliRunner().invoke(main, [*words, "--redirect-uri", uri])
    assert done.exit_code == 64, done.stderr
    assert world.access_token()


def test_a_redirect_uri_leads_to_the_app_only(world: World) -> None:
    """Browsers read some of these in another way."""
    for uri in (
        *("https:", "https://", "javascript:alert(1)", "data:text/html,x", "file:///x"),
        *("http://evil.example\\\\@localhost/", "https://a b/", "https://a:0/"),
    ):
        with pytest.raises(errors.InvalidRequest, match="redirect_uri"):
            world.client.grants.begin_authorization(world.token, redirect_uri=uri, replace=True)
    for uri in ("com.example.app:/callback", "http://localhost:80/x", "https://app.example/x?y=1"):
        world.client.grants.begin_authorization(world.token, redirect_uri=uri, replace=True)


def test_a_lock_user_waits_for_a_code_without_an_answer(world: World) -> None:
    """An exchange that may have issued a token holds python-redis-lock's key, too.

    Fails when its end frees the lock before the cooldown is over.
    """
    token = world.other_token()
    back = world.allow(world.begin(token))
    world.fault(fault="lost-answer")
    with pytest.raises(errors.AuthorizationFailed):
        world.complete(back, token)
    _, app, _, name = token.split("/")
    with redis.Redis(unix_socket_path=world.custody._store_url.removeprefix("unix://")) as store:
        key = f"lock:holdoff:{{{app}}}:{name}"
        assert store.get(key) == b"holdoff-cooldown"
        assert store.pttl(key) > INTERVAL_SECONDS * 1000
    shown = world.client.get_token(token)
    assert shown.not_before_time.ToSeconds() - shown.last_refresh_time.ToSeconds() > (
        INTERVAL_SECONDS + TAKEOVER_SECONDS - 10
    )
    world.client.update_token(token, refresh_interval_seconds=3600)
    shown = world.client.get_token(token)
    assert shown.not_before_time.ToSeconds() - time.time() > 3500


def test_deleting_a_grant_deletes_what_an_authorization_left(world: World) -> None:
    """The client secret is in no other record."""
    world.authorize()
    world.client.grants.delete(world.token)
    _, app, _, name = world.token.split("/")
    with redis.Redis(unix_socket_path=world.custody._store_url.removeprefix("unix://")) as store:
        assert not store.exists(f"holdoff:{{{app}}}:authorization:{name}")
