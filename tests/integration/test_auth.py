"""The adapters for requests and httpx, against a simulated provider and a scripted one."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Protocol

import httpx
import pytest
import requests

import holdoff
from holdoff import auth, errors, testing
from holdoff.auth._rules import Target, patience_seconds
from holdoff_coordinator.gate import AccessFile
from tests.custodian import Custodian, key_directory
from tests.integration.test_hand_out import Refreshed
from tests.integration.test_isolation import credential_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import StartValkey


@dataclass
class Scripted:
    """A server whose answers a test says, and what it received."""

    host: str = ""
    answers: dict[str, Callable[[str], tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """By path: what to answer to a value of `Authorization`."""
    received: list[tuple[str, str]] = field(default_factory=list)
    """Paths and values of `Authorization`."""

    def url(self, path: str) -> str:
        """Return a URL of it."""
        return f"http://{self.host}{path}"


def fine(_: str) -> tuple[int, dict[str, str]]:
    """Answer without an error."""
    return 200, {}


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    """Run a scripted server."""
    one = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            authorization = self.headers.get("Authorization", "")
            one.received.append((self.path, authorization))
            status, headers = one.answers.get(self.path, fine)(authorization)
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - as the base class wants it

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        one.host = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield one
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def api() -> Iterator[Scripted]:
    """Give a server that is an API host of the grant."""
    with scripted() as one:
        yield one


@pytest.fixture(scope="module")
def other() -> Iterator[Scripted]:
    """Give a server that is none."""
    with scripted() as one:
        yield one


@pytest.fixture(scope="module")
def custody(api: Scripted) -> Iterator[testing.Custody]:
    """Give a token in custody of a simulated provider."""
    with testing.custody(api.host) as one:
        yield one


@pytest.fixture(scope="module")
def client(custody: testing.Custody) -> Iterator[holdoff.Client]:
    """Give a client to look with."""
    with holdoff.Client(custody.endpoint) as one:
        yield one


class Call(Protocol):
    """Makes a call with a library and its adapter."""

    def __call__(self, url: str, method: str = "GET", wait_seconds: float = 30) -> int:
        """Return the status."""
        ...


class Careless(requests.Session):
    """A session that keeps credentials in redirects, as some programs need it for another host."""

    def should_strip_auth(self, old_url: str, new_url: str) -> bool:  # noqa: ARG002
        """Keep them."""
        return False


@pytest.fixture(params=["requests", "httpx", "async httpx"])
def call(request: pytest.FixtureRequest, custody: testing.Custody) -> Call:
    """Give what makes calls with each library."""

    def by_requests(url: str, method: str = "GET", wait_seconds: float = 30) -> int:
        with (
            holdoff.Client(custody.endpoint) as client,
            client.access_token(custody.token) as access,
            Careless() as session,
        ):
            access.current(30)  # so that a short wait is not for that
            session.auth = auth.RequestsAuth(client, access, wait_seconds=wait_seconds)
            return session.request(method, url, timeout=60).status_code

    def by_httpx(url: str, method: str = "GET", wait_seconds: float = 30) -> int:
        with (
            holdoff.Client(custody.endpoint) as client,
            client.access_token(custody.token) as access,
            httpx.Client(
                auth=auth.HttpxAuth(client, access, wait_seconds=wait_seconds),
                follow_redirects=True,
                timeout=60,
            ) as session,
        ):
            access.current(30)
            return session.request(method, url).status_code

    async def by_async_httpx(url: str, method: str, wait_seconds: float) -> int:
        async with (
            holdoff.aio.Client(custody.endpoint) as client,
            client.access_token(custody.token) as access,
            httpx.AsyncClient(
                auth=auth.AsyncHttpxAuth(client, access, wait_seconds=wait_seconds),
                follow_redirects=True,
                timeout=60,
            ) as session,
        ):
            await access.current(30)
            return (await session.request(method, url)).status_code

    def in_loop(url: str, method: str = "GET", wait_seconds: float = 30) -> int:
        return asyncio.run(by_async_httpx(url, method, wait_seconds))

    calls: dict[str, Call] = {"requests": by_requests, "httpx": by_httpx, "async httpx": in_loop}
    return calls[request.param]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Give a name of an endpoint that no other test uses."""
    return "".join(filter(str.isalnum, request.node.name))


def test_a_call_is_authorized_and_counted(
    call: Call, custody: testing.Custody, client: holdoff.Client, name: str
) -> None:
    """The provider accepts it; an error counts where it happened, once.

    Fails when the token is missing, or the answer is not reported with its division and endpoint.
    """
    assert call(f"{custody.api_url}/current/Me") == 200
    assert call(f"{custody.api_url}/535193/crm/{name}?$filter=secret") == 404
    budgets = client.list_budgets(custody.token.partition("/tokens/")[0])
    [found] = [one for one in budgets if one.scope.endpoint.lower() == f"crm/{name}".lower()]
    assert (found.used, found.reserved, found.scope.division) == (1, 0, "535193")


def test_no_other_host_gets_the_token(
    call: Call, api: Scripted, other: Scripted, name: str
) -> None:
    """Neither directly nor by a redirect; a redirect within the API keeps it."""
    path = f"/api/v1/1/{name}/"
    api.answers[f"{path}away"] = lambda _: (302, {"Location": other.url(f"{path}stolen")})
    api.answers[f"{path}within"] = lambda _: (302, {"Location": f"{path}there"})
    for url in (other.url(f"{path}direct"), api.url(f"{path}away"), api.url(f"{path}within")):
        assert call(url) == 200
    received = dict(api.received) | dict(other.received)
    assert received[f"{path}direct"] == received[f"{path}stolen"] == ""
    for end in ("away", "within", "there"):
        assert received[path + end].startswith("Bearer ")


def test_a_dead_token_is_replaced_once(
    call: Call, api: Scripted, custody: testing.Custody, name: str
) -> None:
    """A GET waits for another generation and is repeated with it; a POST is not.

    Fails when it is repeated with the same token, or again and again.
    """
    path = f"/api/v1/2/{name}"
    dead = 401, {"WWW-Authenticate": 'Bearer realm="api", error="invalid_token"'}

    renewal = threading.Timer(0.2, custody.pass_seconds, (575,))  # after the first answer

    def answer(_: str) -> tuple[int, dict[str, str]]:
        if not renewal.ident:
            renewal.start()
        return dead

    api.answers[path] = answer
    assert call(api.url(path)) == 401
    renewal.join()
    first, second = [value for where, value in api.received if where == path]
    assert first != second
    assert call(api.url(path), method="POST") == 401
    assert len([where for where, _ in api.received if where == path]) == 3


def test_it_waits_while_a_scope_backs_off(
    call: Call, api: Scripted, custody: testing.Custody, client: holdoff.Client, name: str
) -> None:
    """A block that one call meets holds all calls of its scope: they raise after their wait."""
    division = str(int.from_bytes(name[-3:].encode(), "big"))
    path = f"/api/v1/{division}/{name}"
    api.answers[path] = lambda _: (429, {"Retry-After": "90"})
    assert call(api.url(path)) == 429
    with pytest.raises(errors.BackingOff):
        call(api.url(path), wait_seconds=0.1)
    app = custody.token.partition("/tokens/")[0]
    [back_off] = [one for one in client.list_back_offs(app) if one.scope.division == division]
    assert back_off.status == 429
    api.answers.clear()
    client.clear_back_off(back_off.name, "the test is over")
    assert call(api.url(path)) == 200
    assert len([where for where, _ in api.received if where == path]) == 2


def test_without_an_access_token_nothing_is_sent(custody: testing.Custody, api: Scripted) -> None:
    """It raises, and no room stays reserved."""
    with holdoff.Client(custody.endpoint) as client:
        access = client.access_token(custody.token)
        session = requests.Session()
        session.auth = auth.RequestsAuth(client, access)
        access.close()
        before = len(api.received)
        with pytest.raises(errors.HoldoffError, match="was closed"):
            session.get(api.url("/api/v1/3/x"), timeout=60)
        assert len(api.received) == before


def test_the_role_gateway_is_enough(
    start_valkey: StartValkey, api: Scripted, tmp_path: Path
) -> None:
    """Fails when an adapter needs a call of the coordinator that takes another role."""
    url, keys = start_valkey().url, tmp_path / "keys"
    keys.mkdir()
    key_directory(keys, "first")
    policy = testing._simulated("http://127.0.0.1:1", (api.host,))
    options = {"policies": {policy.name: policy}, "terms": {"loopback_http": True}}
    with Custodian(url, keys, **options) as operator:
        one = Refreshed(operator, url, operator.token(policy.name))
        access_token = one.refresh()
    rights, credential = tmp_path / "access.toml", tmp_path / "credential"
    rights.write_text(
        '[[grants]]\nidentities = ["credential:job"]\nrole = "gateway"\n'
        f'resources = ["{one.token}"]\n'
    )
    credential.touch(mode=0o600)
    credential.write_text(credential_of(url, "job"))
    path = "/api/v1/4/gateway"
    with (
        Custodian(url, keys, access=AccessFile(rights), **options) as guarded,
        holdoff.Client(guarded.address, credential_file=credential) as client,
        client.access_token(one.token) as access,
        requests.Session() as session,
    ):
        session.auth = auth.RequestsAuth(client, access)
        api.answers[path] = lambda _: (429, {})
        assert session.get(api.url(path), timeout=60).status_code == 429
        assert (path, f"Bearer {access_token}") in api.received
        assert client.list_back_offs(one.token.partition("/tokens/")[0])


@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_a_library_that_is_missing_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    name = {"httpx": "HttpxAuth", "requests": "RequestsAuth"}[library]
    monkeypatch.delitem(vars(auth), name, raising=False)
    monkeypatch.delitem(sys.modules, f"holdoff.auth._{library}", raising=False)
    for module in [one for one in sys.modules if one.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"holdoff\[{library}\]"):
        getattr(auth, name)


def test_the_other_kind_of_httpx_client_is_refused(custody: testing.Custody) -> None:
    """It would stop the event loop, or find none."""
    with (
        holdoff.Client(custody.endpoint) as client,
        client.access_token(custody.token) as access,
    ):
        adapter = auth.HttpxAuth(client, access)

        async def use() -> None:
            async with httpx.AsyncClient(auth=adapter) as session:
                await session.get(custody.api_url)

        with pytest.raises(TypeError, match="AsyncHttpxAuth"):
            asyncio.run(use())


@pytest.mark.parametrize(
    ("url", "may_have"),
    [
        ("https://api.example/x", True),
        ("https://API.example:443/x", True),
        ("https://api.example:8443/x", False),
        ("https://sub.api.example/x", False),
        ("https://api.example.evil/x", False),
        ("http://api.example/x", False),
        ("ftp://api.example/x", False),
        ("https://user@api.example/x", False),
        ("https://api.example@evil.example/x", False),
        ("https://api.example\\@evil.example/x", False),
        ("https://api.example:99999/x", False),
        ("http://127.0.0.1:8080/x", True),
        ("https://127.0.0.1:8080/x", True),
        ("http://127.0.0.1/x", False),
        ("http://[::1]:8080/x", True),
        ("http://10.0.0.1:8080/x", False),
        ("/x", False),
    ],
)
def test_where_an_access_token_may_go(url: str, may_have: bool) -> None:
    """To the API hosts alone: over https, or within this host."""
    hosts = ("api.example", "127.0.0.1:8080", "[::1]:8080", "10.0.0.1:8080")
    target = Target.of(url)
    assert (target is not None and target.may_have_token(hosts)) is may_have


def test_only_a_proof_is_worth_a_long_wait() -> None:
    """RFC 6750's `invalid_token` is one; a bare 401 is none."""
    assert patience_seconds({"www-authenticate": 'Bearer error="invalid_token"'}, 60) == 60
    for challenge in ("Bearer", 'Bearer error="insufficient_scope"', ""):
        assert patience_seconds({"www-authenticate": challenge}, 60) == 2
