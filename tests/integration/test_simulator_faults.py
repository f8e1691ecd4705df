"""Faults of the simulated provider over real sockets."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

from holdoff.simulator import Rotation, Rule, Seed, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SEED = Seed()
FORM = {
    "grant_type": "refresh_token",
    "client_id": SEED.client_id,
    "client_secret": SEED.client_secret,
    "refresh_token": SEED.refresh_token,
}


class Job:
    """A client of a simulator, and the one who asks for faults."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    async def ask_for(self, **fault: Any) -> None:
        """Ask for a fault."""
        async with self.http.post(f"{self.url}/_simulator/faults", json=fault) as response:
            assert response.status == 200, await response.text()

    async def refresh(self) -> tuple[int, str]:
        """Ask for a token."""
        async with self.http.post(f"{self.url}/api/oauth2/token", data=FORM) as response:
            return response.status, await response.text()

    async def report(self) -> Any:
        """Read the report."""
        async with self.http.get(f"{self.url}/_simulator/report") as response:
            return await response.json()


@asynccontextmanager
async def a_job(**options: Any) -> AsyncIterator[Job]:
    """Serve a simulator, and make a client of it that never retries by itself."""
    async with (
        serving(**options) as url,
        aiohttp.ClientSession(headers={"User-Agent": "job/a"}) as http,
    ):
        http._retry_connection = False
        yield Job(http, url)


@contextmanager
def was_reset() -> Iterator[None]:
    """Expect that a connection ends with RST, which is not how one that is closed ends."""
    with pytest.raises(aiohttp.ClientOSError) as caught:
        yield
    assert caught.value.errno == errno.ECONNRESET


def innocent(report: Any) -> bool:
    """Whether no client is blamed for anything, nor anything counted but the fault."""
    counts = dict(report["agents"]["job/a"])
    return counts.pop("faults_injected") == 1 and not any(counts.values())


async def test_error() -> None:
    """The next request gets the 5xx that was asked for, and a later one its token.

    Fails when the request is acted on: its token would make the next one too early.
    """
    async with a_job() as job:
        await job.ask_for(fault="error", status=503)
        assert (await job.refresh())[0] == 503
        report = await job.report()
        assert report["faults"]["injected"] == {"error": 1}
        assert innocent(report)
        assert (await job.refresh())[0] == 200


async def test_reset() -> None:
    """The connection is reset, not closed: the client's kernel says so."""
    async with a_job() as job:
        await job.ask_for(fault="reset")
        with was_reset():
            await job.refresh()
        assert innocent(await job.report())
        assert (await job.refresh())[0] == 200


async def test_reset_goes_by_path() -> None:
    """A fault for the API does not meet a token request, and is listed until it is cleared."""
    async with a_job() as job:
        await job.ask_for(fault="reset", path="/api/v1", count=3)
        assert (await job.refresh())[0] == 200
        faults = f"{job.url}/_simulator/faults"
        async with job.http.get(faults) as response:
            assert (await response.json())["pending"] == [
                {"fault": "reset", "path": "/api/v1", "count": 3}
            ]
        async with job.http.delete(faults) as response:
            assert (await response.json())["pending"] == []
        async with job.http.get(f"{job.url}/api/v1/535193/crm/Accounts") as response:
            assert response.status == 401


async def test_hang() -> None:
    """Nothing comes for the simulated time asked for, then the connection ends."""
    async with a_job(time_scale=100) as job:
        await job.ask_for(fault="hang", seconds=30)
        began = time.monotonic()
        with was_reset():
            await job.refresh()
        assert time.monotonic() - began >= 0.3
        assert innocent(await job.report())
        assert (await job.refresh())[0] == 200


async def test_a_hang_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that hangs for an hour ends at once when it is told to.

    Fails when the end waits for requests under way, here for 40 s.
    """
    patient = functools.partial(web.AppRunner, shutdown_timeout=40.0)
    monkeypatch.setattr(web, "AppRunner", lambda *args, **_: patient(*args, access_log=None))
    async with aiohttp.ClientSession() as http:
        async with serving() as url:
            job = Job(http, url)
            await job.ask_for(fault="hang", seconds=3600)
            hanging = asyncio.ensure_future(job.refresh())
            async with asyncio.timeout(10):
                while not (await job.report())["faults"]["requests"]:
                    pass
            began = time.monotonic()
        assert time.monotonic() - began < 30
        with was_reset():
            await hanging


async def test_slow_body() -> None:
    """The right answer arrives in pieces over the time asked for; 570 s start with the last one.

    Fails when the body comes at once, is cut, or the interval counts from its first byte.
    """
    async with a_job(time_scale=100) as job:
        await job.ask_for(fault="slow-body", seconds=50)
        began = time.monotonic()
        async with job.http.post(f"{job.url}/api/oauth2/token", data=FORM) as response:
            assert response.status == 200
            first = await response.content.readany()
            assert (await job.refresh())[0] == 400  # while the first answer is under way
            body = first + await response.content.read()
            assert len(first) < len(body)
        assert time.monotonic() - began > 0.5
        assert b"access_token" in body
        assert len(body) == response.content_length
        assert (await job.refresh())[0] == 400
        most = (time.monotonic() - began) * 100 - 50
        report = await job.report()
        gaps = [request["gap_seconds"] for request in report["token_requests"]["requests"]]
        assert gaps[:2] == [None, 0]
        assert gaps[2] < most + 1
        assert report["token_requests"]["requests"][0]["fault"] == "slow-body"


async def test_slow_body_that_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """A client that gives up leaves no noise behind, and its token counts as sent."""
    async with a_job(time_scale=100) as job:
        await job.ask_for(fault="slow-body", seconds=50)
        async with job.http.post(f"{job.url}/api/oauth2/token", data=FORM) as response:
            response.close()
        async with asyncio.timeout(10):
            while (await job.refresh())[1]:
                gap = (await job.report())["token_requests"]["requests"][-1]["gap_seconds"]
                if gap:
                    break
                await asyncio.sleep(0.1)
    assert caplog.records == []


async def test_lost_answer() -> None:
    """The token is issued and rotated, and its client hears nothing and is not to blame.

    Fails when the request is not acted on, or the client blamed for the old token.
    """
    async with a_job(rotation=Rotation.SINGLE_USE) as job:
        await job.ask_for(fault="lost-answer")
        with was_reset():
            await job.refresh()
        status, text = await job.refresh()
        assert (status, "Old refresh token used." in text) == (401, True)
        report = await job.report()
    assert report["token_requests"]["accepted"] == 1
    assert report["totals"]["by_rule"][Rule.OLD_REFRESH_TOKEN] == 0
    assert report["agents"]["job/a"]["tokens_received"] == 0
    assert report["faults"]["injected"] == {"lost-answer": 1}


async def test_lost_answer_of_the_api() -> None:
    """An API call whose answer is lost has been made and counts."""
    async with a_job() as job:
        await job.ask_for(fault="lost-answer", path="/api/v1/")
        with was_reset():
            await job.http.get(f"{job.url}/api/v1/535193/crm/Accounts")
        report = await job.report()
    assert report["api_calls"]["by_status"] == {"401": 1}


async def issued(job: Job) -> bool:
    """Whether the first request got a token from the provider, seen from the next ones."""
    statuses = [(await job.refresh())[0] for _ in range(2)]
    report = await job.report()
    return statuses == [401, 401] and report["token_requests"]["accepted"] == 1


async def test_hung_answer() -> None:
    """The token is issued, and its client gets nothing until the connection ends.

    Fails when the hang delays the start of the interval.
    """
    async with a_job(time_scale=100, rotation=Rotation.SINGLE_USE) as job:
        await job.ask_for(fault="hung-answer", seconds=30)
        began = time.monotonic()
        with was_reset():
            await job.refresh()
        assert time.monotonic() - began >= 0.3
        assert await issued(job)
        [first, *_] = (await job.report())["token_requests"]["requests"]
        assert (first["fault"], first["status"]) == ("hung-answer", 200)
        gap = (await job.report())["token_requests"]["requests"][1]["gap_seconds"]
        assert gap >= 30


async def test_error_answer() -> None:
    """The token is issued, and its client gets a 5xx."""
    async with a_job(rotation=Rotation.SINGLE_USE) as job:
        await job.ask_for(fault="error-answer", status=502)
        assert await job.refresh() == (502, "injected fault")
        assert await issued(job)


async def test_html_answer() -> None:
    """The token is issued, and its client gets a page with 200."""
    async with a_job(rotation=Rotation.SINGLE_USE) as job:
        await job.ask_for(fault="html-answer")
        status, text = await job.refresh()
        assert (status, "<h1>Maintenance" in text) == (200, True)
        assert await issued(job)


async def test_partial_answer() -> None:
    """The token is issued, and its answer lacks the fields that were named."""
    async with a_job(rotation=Rotation.SINGLE_USE) as job:
        await job.ask_for(fault="partial-answer", without=["access_token", "expires_in"])
        status, text = await job.refresh()
        assert status == 200
        assert sorted(json.loads(text)) == ["refresh_token", "token_type"]
        assert await issued(job)


async def test_late_answer() -> None:
    """The right answer comes after the time asked for, and starts the 570 s."""
    async with a_job(time_scale=100) as job:
        await job.ask_for(fault="late-answer", seconds=50)
        began = time.monotonic()
        status, text = await job.refresh()
        assert time.monotonic() - began >= 0.5
        assert (status, "access_token" in text) == (200, True)
        assert (await job.refresh())[0] == 400
        most = (time.monotonic() - began) * 100 - 50
        gap = (await job.report())["token_requests"]["requests"][1]["gap_seconds"]
        assert gap <= most + 1


async def test_late_answer_that_its_client_does_not_wait_for() -> None:
    """The token is issued although the client is gone, and it is sent when the time has passed."""
    async with a_job(time_scale=100) as job:
        await job.ask_for(fault="late-answer", seconds=50)
        giving_up = asyncio.ensure_future(job.refresh())
        async with asyncio.timeout(10):
            while not (await job.report())["token_requests"]["accepted"]:
                pass
            giving_up.cancel()
            while True:
                assert (await job.refresh())[0] in (400, 403)
                if (await job.report())["token_requests"]["requests"][-1]["gap_seconds"]:
                    break
                await asyncio.sleep(0.1)


async def test_html() -> None:
    """Any path gets a page with 200 instead of an answer, and the request has no effect."""
    async with a_job() as job:
        await job.ask_for(fault="html", count=2)
        status, text = await job.refresh()
        assert (status, "<h1>Maintenance" in text) == (200, True)
        async with job.http.get(f"{job.url}/docs/XMLDownload.aspx") as response:
            assert (response.status, response.content_type) == (200, "text/html")
        assert (await job.report())["faults"]["injected"] == {"html": 2}
        assert (await job.refresh())[0] == 200


@pytest.mark.parametrize("body", [b"{", b'{"fault": "reset", "count": -1}', b"\xff"])
async def test_wrong_requests_change_nothing(body: bytes) -> None:
    """What is no request for a fault gets a 400 that says why, and no fault is pending."""
    async with a_job() as job:
        faults = f"{job.url}/_simulator/faults"
        async with job.http.post(faults, data=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]
        async with job.http.get(faults) as response:
            assert (await response.json())["pending"] == []
