"""Unmodified clients call the simulator through a gateway; only their base URL is set.

They ask the gateway for an access token, or send none: the coordinator requests the only one.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyodata
import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from exactonline.api import ExactApi
from exactonline.storage.ini import IniStorage
from requests_oauthlib import OAuth2Session

from holdoff import testing
from holdoff._authority import server_context
from holdoff.gateway.serving import GatewayThread, Listen
from tests.clients.test_stock_clients import NODE, PAGES, run, use_api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LATER = {"refresh_token": "kept-by-the-job", "access_token": "old", "expires_at": 1}
CALLS = {"200": 2 + len(PAGES), "201": 1, "204": 2}


@dataclass
class Through:
    """A gateway, and the provider behind it."""

    url: str
    """In place of the provider's."""
    custody: testing.Custody

    @property
    def token_url(self) -> str:
        """Where stand-ins are issued."""
        return f"{self.url}/api/oauth2/token"

    def check_report(self, calls: dict[str, int]) -> None:
        """Assert that one access token was requested, and which calls were made."""
        report = requests.get(f"{self.custody.provider}/_simulator/report", timeout=60).json()
        assert report["violations"] == []
        assert report["token_requests"] == {**report["token_requests"], "accepted": 1, "refused": 0}
        assert report["api_calls"]["by_status"] == calls


@pytest.fixture
def through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """Give a gateway with TLS for one test, whose authority clients trust by their settings."""
    ca_file = tmp_path / "ca.pem"
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(ca_file))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listen = Listen(tls=server_context("Holdoff gateway", "127.0.0.1", ca_file))
    with (
        testing.custody() as custody,
        GatewayThread(custody.endpoint, custody.token, listen=listen) as gateway,
    ):
        yield Through(gateway.url, custody)


def test_requests(through: Through) -> None:
    """Without any access token: the path has the secret."""
    with requests.Session() as session:
        use_api(session, through)
    through.check_report(CALLS)


def test_requests_oauthlib(through: Through) -> None:
    """It refreshes the token that it kept, and gets a stand-in."""
    kept: list[dict[str, Any]] = []
    with OAuth2Session(
        "app", token=LATER, auto_refresh_url=through.token_url, token_updater=kept.append
    ) as session:
        use_api(session, through)
    assert len(kept) == 1
    through.check_report(CALLS)


def test_authlib(through: Through) -> None:
    """With Basic, and a margin of a minute that is an hour early for the provider."""
    with AuthlibSession("app", "secret", token_endpoint=through.token_url) as session:
        session.refresh_token(refresh_token="kept-by-the-job")
        for _ in range(3):  # stand-ins never need it, but may be refreshed at any time
            session.refresh_token(refresh_token="kept-by-the-job")
        use_api(session, through)
    through.check_report(CALLS)


def test_exactonline(through: Through, tmp_path: Path) -> None:
    """A client made for Exact Online, on urllib, which exchanges a code first."""
    ini = tmp_path / "exact.ini"
    ini.write_text(
        f"[server]\nauth_url = {through.url}/api/oauth2/auth\nrest_url = {through.url}/api\n"
        f"token_url = {through.token_url}\n"
        "[application]\nbase_url = https://example.com\nclient_id = app\nclient_secret = secret\n"
    )
    api = ExactApi(storage=IniStorage(str(ini)))
    api.request_token("any-code")
    divisions, current = api.get_divisions()
    assert set(divisions) == set(through.custody.seed.divisions)
    api.set_division(current)
    assert len(api.relations.all()) == sum(PAGES)
    created = api.relations.create({"Code": "7001", "Name": "New"})
    api.relations.update(created["ID"], {"Name": "Changed"})
    assert api.relations.get(relation_code="7001")["Name"] == "Changed"
    api.relations.delete(created["ID"])
    through.check_report({"200": 4 + len(PAGES), "201": 1, "204": 2})


def test_pyodata(through: Through) -> None:
    """A client of OData reads the types of entities, and follows the links to all pages."""
    with requests.Session() as session:
        division = through.custody.seed.divisions[0]
        service = pyodata.Client(f"{through.url}/api/v1/{division}/crm/", session)
        accounts = service.entity_sets.Accounts
        pages = [accounts.get_entities().execute()]
        while pages[-1].next_url:
            assert urlsplit(pages[-1].next_url).netloc == urlsplit(through.url).netloc
            pages.append(accounts.get_entities().next_url(pages[-1].next_url).execute())
    assert [len(page) for page in pages] == PAGES
    through.check_report({"200": 1 + len(PAGES)})


def test_a_file_is_uploaded_and_compression_is_left(through: Through) -> None:
    """A body of some megabytes that comes in parts, and one that is announced first."""
    division = through.custody.seed.divisions[0]
    url = f"{through.url}/api/v1/{division}/crm/Accounts"

    def parts() -> Iterator[bytes]:
        yield b'{"Name": "'
        for _ in range(64):
            yield b"x" * 32_768
        yield b'"}'

    answer = requests.post(
        url, data=parts(), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code in {201, 400, 413}, answer.text
    assert "Holdoff-Reason" not in answer.headers


async def test_fetch_of_node(through: Through) -> None:
    """Node's fetch, with the links to all pages."""
    script = """
        const pages = []
        let url = `${process.env.EXACT_URL}/api/v1/${process.argv[1]}/crm/Accounts`
        while (url) {
          const answer = await fetch(url, { headers: { Accept: 'application/json' } })
          const { d } = await answer.json()
          pages.push(d.results.length)
          url = d.__next
        }
        console.log(JSON.stringify(pages))
    """
    division = through.custody.seed.divisions[0]
    words = ("--input-type=module", "-e", script, division)
    assert json.loads(await run(NODE, *words, exact=through)) == PAGES


async def test_curl(through: Through) -> None:
    """A HEAD, a request for a part, and a body that waits for the word to continue."""
    division = through.custody.seed.divisions[0]
    url = f"{through.url}/api/v1/{division}/crm/Accounts?$top=1"
    process = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--show-error", "--head", url, "--next", "--silent", "--fail"),
        *("--header", "Expect: 100-continue", "--header", "Content-Type: application/json"),
        *("--data", '{"Name": "New"}', url.partition("?")[0]),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.startswith(b"HTTP/1.1 ")
    assert b"New" in output
