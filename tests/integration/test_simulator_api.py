"""The simulated API over real HTTP, with clients that take what it answers literally."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.request
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import aiohttp
import pytest
from yarl import URL

from holdoff.simulator import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Client:
    """A client with an access token."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def send(self, method: str, path: str, **more: Any) -> tuple[int, Any, str]:
        """Call a path or URL: the status, the headers and the body."""
        url = path if path.startswith("http") else f"{self.url}{path}"
        async with self.session.request(method, url, **more) as response:
            return response.status, response.headers, await response.text()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """A client of a simulator, which asks for JSON."""
    async with serving() as url, aiohttp.ClientSession() as session:
        async with session.get(f"{url}/_simulator/seed") as response:
            [seed] = (await response.json())["seeds"]
        fields = ("client_id", "client_secret", "refresh_token")
        form = {"grant_type": "refresh_token"} | {name: seed[name] for name in fields}
        # However the path is spelled.
        async with session.post(f"{url}//API/oauth2/Token/", data=form) as response:
            bearer = (await response.json())["access_token"]
        headers = {"Authorization": f"bEARER {bearer}", "Accept": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as own:
            yield Client(url, own)


ACCOUNTS = "/api/v1/535193/crm/Accounts"


async def test_an_entity_lives_from_post_to_delete(client: Client) -> None:
    """201, 200, 204 with no bytes and no content type, 204, and then 404."""
    status, headers, body = await client.send("POST", ACCOUNTS, json={"Name": "Acme"})
    assert status == 201
    address = headers["Location"]
    assert address == f"{client.url}{ACCOUNTS}(guid'{json.loads(body)['d']['ID']}')"
    status, headers, body = await client.send("PUT", address, json={"Name": "Other"})
    assert (status, body) == (204, "")
    assert "Content-Type" not in headers
    assert headers["X-RateLimit-Minutely-Remaining"] == "58"
    status, _, body = await client.send("GET", address)
    assert (status, json.loads(body)["d"]["Name"]) == (200, "Other")
    status, _, body = await client.send("DELETE", address)
    assert (status, body) == (204, "")
    assert (await client.send("GET", address))[0] == 404


async def test_urllib_reads_what_has_no_body(client: Client) -> None:
    """A client that waits for the end of an answer does not wait after a 204.

    Fails when an answer without a body announces one.
    """
    _, headers, _ = await client.send("POST", ACCOUNTS, json={})
    request = urllib.request.Request(  # noqa: S310 -- our own server
        headers["Location"],
        data=b"{}",
        method="PUT",
        headers={**client.session.headers, "Content-Type": "application/json"},
    )

    def send() -> tuple[int, bytes]:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 -- our own server
            return answer.status, answer.read()

    assert await asyncio.to_thread(send) == (204, b"")


async def test_next_links_are_followed_as_they_are(client: Client) -> None:
    """Links lead through all entities, with the host and the query that the client used."""
    url, seen = f"{ACCOUNTS}?%24select=ID%2CName&$filter=startswith(Name,'Account')", []
    while url:
        status, _, body = await client.send("GET", url)
        assert status == 200
        page = json.loads(body)["d"]
        seen += [row["ID"] for row in page["results"]]
        url = page.get("__next", "")
        assert url.startswith(client.url) or not url
    assert len(set(seen)) == len(seen) == 150


async def test_atom_links_are_followed_as_they_are(client: Client) -> None:
    """The next link of a feed leads through all entities, too."""
    space = "{http://www.w3.org/2005/Atom}"
    url, seen = ACCOUNTS, 0
    while url:
        status, headers, body = await client.send("GET", url, headers={"Accept": "*/*"})
        assert status == 200
        assert headers["Content-Type"] == "application/atom+xml;type=feed;charset=utf-8"
        feed = ET.fromstring(body)  # noqa: S314 -- our own
        seen += len(feed.findall(f"{space}entry"))
        link = feed.find(f"{space}link[@rel='next']")
        url = "" if link is None else link.attrib["href"]
    assert seen == 150


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//api/V1/535193//CRM/Accounts", 200),
        ("/api/v1/535193/%63rm/Accounts/%24count", 200),
        ("/api/v1/beta/535193/crm/Accounts", 200),
        ("/api/v1/current/Me", 200),
        ("/docs/xmldownload.aspx?Topic=Items&_Division_=535193", 200),
        ("/api/v1/535193/crm/../crm/Nothing", 404),
        ("/api/v1/535193/crm/Accounts(guid'%FF')", 400),
        ("/api/v1/535193/crm/Accounts?$filter=%FF", 400),
        ("/api/v1/535193/crm/Accounts?$skiptoken=%00", 400),
        ("/api/v1/", 404),
        ("/", 404),
        ("/api/oauth2/token", 405),
        ("/_simulator/nothing", 404),
    ],
)
async def test_paths(client: Client, path: str, status: int) -> None:
    """The spelling of a path does not count; what cannot be read is a client's error."""
    url = URL(f"{client.url}{path}", encoded=True)
    async with client.session.get(url) as response:
        assert response.status == status


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{" * 2_000_000, {}),
        (b"no gzip", {"Content-Encoding": "gzip"}),
        (b"[" * 100_000, {}),
    ],
)
async def test_a_body_that_cannot_be_read_is_answered_with_400(
    client: Client, body: bytes, headers: dict[str, str]
) -> None:
    """The next request is answered as before.

    Fails when one of the parsers' many exceptions becomes a 500.
    """
    headers = {"Content-Type": "application/json", **headers}
    for path in (ACCOUNTS, "/docs/XMLUpload.aspx?Topic=Items"):
        status, _, text = await client.send("POST", path, data=io.BytesIO(body), headers=headers)
        assert status == 400
        assert "error" in text or "Message" in text
    assert (await client.send("GET", ACCOUNTS))[0] == 200


async def test_head_gets_no_body(client: Client) -> None:
    """HEAD is not a method of the API, and its answer has no body."""
    status, headers, body = await client.send("HEAD", ACCOUNTS)
    assert (status, body) == (405, "")
    assert headers["Allow"] == "GET, POST"


async def test_a_token_in_the_query_is_refused(client: Client) -> None:
    """Only the header admits a call."""
    bearer = client.session.headers["Authorization"].split()[1]
    async with aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": f"Basic {bearer}"}, {"Authorization": bearer}):
            url = f"{client.url}{ACCOUNTS}?access_token={bearer}"
            async with session.get(url, headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_a_fault_meets_its_path_however_it_is_spelled(client: Client) -> None:
    """A fault of an endpoint comes to another spelling of it, too, and once."""
    fault = {"fault": "error", "path": "/api/v1/535193/crm", "status": 503}
    await client.send("POST", "/_simulator/faults", json=fault)
    assert (await client.send("GET", "//API/v1/535193//CRM/Accounts"))[0] == 503
    assert (await client.send("GET", ACCOUNTS))[0] == 200
