"""The simulated provider over real HTTP, and its command as a real process."""

from __future__ import annotations

import asyncio
import html
import io
import json
import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from click.testing import CliRunner

from holdoff.cli import main
from holdoff.simulator import Rotation, Rule, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


COMMAND = (str(Path(sys.executable).with_name("holdoff")), "simulator", "serve")


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that says who it is."""
    async with aiohttp.ClientSession(headers={"User-Agent": "job/test/a/1"}) as session:
        yield session


async def get(http: aiohttp.ClientSession, url: str) -> Any:
    """Read a JSON document."""
    async with http.get(url) as response:
        assert response.status == 200
        return await response.json()


async def grant(http: aiohttp.ClientSession, url: str) -> tuple[str, dict[str, str]]:
    """Ask the simulator for its seed: the token URL and the form that refreshes."""
    [seed] = (await get(http, f"{url}/_simulator/seed"))["seeds"]
    fields = {name: seed[name] for name in ("client_id", "client_secret", "refresh_token")}
    return seed["token_url"], {"grant_type": "refresh_token", **fields}


FORM = "application/x-www-form-urlencoded"
PART = b'--B\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\nrefresh_token\r\n--B--\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "encoding"),
    [
        (f"{FORM}; charset=nonsense", b"a=b", ""),
        (f"{FORM}; charset=base64", b"a=b", ""),
        (FORM, b"grant_type=\xff", ""),
        (FORM, b"&a=b" * 300_000, ""),
        (FORM, b"no gzip", "gzip"),
        ("application/json", b"{}", ""),
        ("multipart/form-data", PART, ""),
        ("multipart/form-data; boundary=C", PART, ""),
        ("multipart/form-data; boundary=B", PART[:50], ""),
        ("multipart/form-data; boundary=B", PART.replace(b'; name="grant_type"', b""), ""),
    ],
)
async def test_a_malformed_form_is_answered_with_400(
    http: aiohttp.ClientSession, kind: str, body: bytes, encoding: str
) -> None:
    """In the provider's form, and the next request is answered as ever.

    Fails when one of the parsers' many exceptions becomes a 500.
    """
    headers = {"Content-Type": kind} | ({"Content-Encoding": encoding} if encoding else {})
    async with serving() as url:
        token_url, form = await grant(http, url)
        data = io.BytesIO(body)
        async with http.post(token_url, data=data, headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"] == "invalid_request"
        async with http.post(token_url, data=form) as response:
            assert response.status == 200


@pytest.mark.parametrize("way", ["basic", "body", "query", "multipart", "charset"])
async def test_ways_to_send_a_token_request(http: aiohttp.ClientSession, way: str) -> None:
    """The credentials come by Basic, in the body or in the query; the body is any kind of form."""
    async with serving() as url:
        token_url, form = await grant(http, url)
        more: dict[str, Any] = {"data": form}
        if way == "basic":
            header = aiohttp.encode_basic_auth(form.pop("client_id"), form.pop("client_secret"))
            more["headers"] = {"Authorization": header}
        elif way == "query":
            more = {"params": form}
        elif way == "multipart":
            more["data"] = aiohttp.FormData(form, default_to_multipart=True)
        elif way == "charset":
            more["headers"] = {"Content-Type": "Application/X-WWW-Form-Urlencoded; charset=UTF-8"}
        async with http.post(token_url, **more) as response:
            assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"\xff", b"[" * 100_000, b"[" + b"1," * 600_000 + b"1]", b"9" * 5000),
        b'{"fault": "hang", "seconds": 1' + b"0" * 400 + b"}",
        b'{"fault": "error", "count": 1' + b"0" * 400 + b"}",
    ],
)
async def test_a_malformed_fault_is_answered_with_400(
    http: aiohttp.ClientSession, body: bytes
) -> None:
    """Fails when a document that is too deep, or a number that is too large, becomes a 500."""
    async with serving() as url:
        data = io.BytesIO(body)
        async with http.post(f"{url}/_simulator/faults", data=data) as response:
            assert response.status == 400
            assert (await response.json())["error"]
        assert await get(http, f"{url}/_simulator/faults") == {"pending": []}


async def test_a_job_refreshes_calls_and_is_told_off(http: aiohttp.ClientSession) -> None:
    """The whole way of a job: a token, calls with headers, too early, and the report of it.

    Fails when the server forgets to report that an answer left.
    """
    async with serving(rotation=Rotation.REUSABLE) as url:
        token_url, form = await grant(http, url)
        async with http.post(token_url, data=form) as response:
            assert response.status == 200
            tokens = await response.json()
        assert tokens["expires_in"] == "600"
        assert tokens["refresh_token"] != form["refresh_token"]

        bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
        async with http.get(f"{url}/api/v1/535193/crm/Accounts", headers=bearer) as response:
            assert response.status == 200
            assert response.headers["X-RateLimit-Minutely-Remaining"] == "59"
            assert len(response.headers["X-RateLimit-Minutely-Reset"]) == 13  # milliseconds
        bad = f"{url}/api/v1/535193/crm/Accounts?$filter=Code+is+bad"
        async with http.get(bad, headers=bearer) as response:
            assert response.status == 400
        async with http.get(f"{url}/api/v1/535193/crm/Accounts") as response:
            assert response.status == 401

        async with http.post(token_url, data=form) as response:
            assert response.status == 400
            assert response.headers["Reason"] == (
                "TooEarlyToRefreshTokens: Rate limit exceeded: access_token not expired"
            )
            assert await response.text() == (
                '{"error":"access_denied",'
                '"error_description":"Rate limit exceeded: access_token not expired"}'
            )

        report = await get(http, f"{url}/_simulator/report")
        text = json.dumps(report)
    [violation] = report["violations"]
    assert violation["rule"] == Rule.REFRESH_INTERVAL
    assert violation["agent"] == "job/test/a/1"
    assert violation["user"] == "finance@example.com"
    assert violation["call"] == 5
    assert (violation["method"], violation["path"]) == ("POST", "/api/oauth2/token")
    assert violation["status"] == 400
    assert report["token_requests"]["accepted"] == 1
    [first, second] = report["token_requests"]["requests"]
    assert first["gap_seconds"] is None
    assert 0 < second["gap_seconds"] < 570
    assert report["api_calls"]["by_status"] == {"200": 1, "400": 1, "401": 1}
    for secret in (
        tokens["access_token"],
        tokens["refresh_token"],
        form["refresh_token"],
        form["client_secret"],
    ):
        assert secret not in text


async def test_an_app_is_allowed_in_a_browser(http: aiohttp.ClientSession) -> None:
    """The page's first link redirects with a code, which the token endpoint exchanges."""
    async with serving() as url:
        token_url, form = await grant(http, url)
        callback = "http://127.0.0.1:1/callback"
        ask = {
            "client_id": form["client_id"],
            "redirect_uri": callback,
            "response_type": "code",
            "state": "x",
        }
        async with http.get(f"{url}/api/oauth2/auth", params=ask) as response:
            assert response.content_type == "text/html"
            link = re.search(r'href="([^"]+)"', await response.text())
        assert link
        address = f"{url}/api/oauth2/auth{html.unescape(link[1])}"
        async with http.get(address, allow_redirects=False) as response:
            assert response.status == 302
            location = response.headers["Location"]
        assert location.startswith(f"{callback}?code=")
        code = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(location).query))["code"]
        data = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": callback,
            "client_id": form["client_id"],
            "client_secret": form["client_secret"],
        }
        async with http.post(token_url, data=data) as response:
            assert response.status == 200
            assert "refresh_token" in await response.json()
        async with http.post(token_url, data=form) as response:
            assert response.status == 400
            assert "Reason" in response.headers


async def test_scaled_time_lets_a_refresh_through_sooner(http: aiohttp.ClientSession) -> None:
    """At 600 times the speed the interval of 570 s is over within a second or so.

    Fails when the rules are asked with unscaled time.
    """
    async with serving(time_scale=600, rotation=Rotation.REUSABLE) as url:
        token_url, form = await grant(http, url)

        async def status() -> int:
            async with http.post(token_url, data=form) as response:
                return response.status

        assert await status() == 200
        await asyncio.sleep(580 / 600)  # the interval and some more, at that speed
        assert await status() == 200
        report = await get(http, f"{url}/_simulator/report")
    assert report["token_requests"]["requests"][1]["gap_seconds"] >= 570


async def test_concurrent_refreshes_give_one_token(http: aiohttp.ClientSession) -> None:
    """Of twenty refreshes at once one gets a token, and the eleventh refusal blocks the key."""
    async with serving(rotation=Rotation.SINGLE_USE) as url:
        token_url, form = await grant(http, url)

        async def status() -> int:
            async with http.post(token_url, data=form) as response:
                return response.status

        statuses = await asyncio.gather(*(status() for _ in range(20)))
        report = await get(http, f"{url}/_simulator/report")
    assert sorted(statuses) == [200] + [401] * 11 + [403] * 8
    assert report["totals"]["by_rule"][Rule.OLD_REFRESH_TOKEN] == 11
    assert report["totals"]["by_rule"][Rule.ERROR_LIMIT] == 1
    assert len(report["blocks"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_prints_its_url_and_ends_on_a_signal(number: signal.Signals) -> None:
    """The command prints one line with its URL, answers there, and a signal ends it with 0."""
    with subprocess.Popen(
        [*COMMAND, "--time-scale", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert match
            with urllib.request.urlopen(f"{match[0]}/_simulator/report", timeout=10) as answer:  # noqa: S310 -- our own server
                assert json.load(answer)["time_scale"] == 60
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    "arguments", [["--listen", "nowhere"], ["--time-scale", "0"], ["--time-scale", "601"]]
)
def test_command_refuses_bad_options(arguments: list[str]) -> None:
    """An address without a port, and a speed at which nothing could be tested, are refused."""
    done = CliRunner().invoke(main, ["simulator", "serve", *arguments], prog_name="holdoff")
    assert done.exit_code == 64
    assert arguments[0] in done.stderr
