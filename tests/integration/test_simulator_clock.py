"""The simulator's clock, which a test can step forward instead of waiting."""

from __future__ import annotations

import io
from datetime import datetime

import aiohttp
import pytest

from holdoff.simulator import Seed, serving

SEED = Seed()
FORM = {
    "grant_type": "refresh_token",
    "client_id": SEED.client_id,
    "client_secret": SEED.client_secret,
    "refresh_token": SEED.refresh_token,
}


async def advance(http: aiohttp.ClientSession, url: str, seconds: float) -> datetime:
    """Step the clock of a simulator forward; it answers with its time."""
    document = {"advance_seconds": seconds}
    async with http.post(f"{url}/_simulator/clock", json=document) as response:
        assert response.status == 200
        return datetime.fromisoformat((await response.json())["time"])


async def test_a_client_may_refresh_after_a_step_of_the_clock() -> None:
    """A refresh is too early after 540 s and accepted 570 s after the last one, without a wait."""
    async with serving() as url, aiohttp.ClientSession() as http:

        async def refresh() -> int:
            async with http.post(f"{url}/api/oauth2/token", data=FORM) as response:
                return response.status

        statuses = [await refresh()]
        before = await advance(http, url, 540)
        statuses.append(await refresh())
        after = await advance(http, url, 30)
        statuses.append(await refresh())
        assert statuses == [200, 400, 200]
        assert (after - before).total_seconds() >= 30


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"\xff", b"[" * 100_000, b"[]", b"{}"),
        *(b'{"advance_seconds": %s}' % value for value in (b"0", b"-1", b'"9"', b"true", b"NaN")),
        b'{"advance_seconds": 1' + b"0" * 400 + b"}",
    ],
)
async def test_a_malformed_step_is_answered_with_400(body: bytes) -> None:
    """Fails when a value that is not a number above 0 stops the clock or becomes a 500."""
    async with serving() as url, aiohttp.ClientSession() as http:
        async with http.post(f"{url}/_simulator/clock", data=io.BytesIO(body)) as response:
            assert response.status == 400
            assert (await response.json())["error"]
        await advance(http, url, 1)


async def test_steps_end_before_the_last_date() -> None:
    """Fails when many steps take the clock to a year that the report cannot write."""
    async with serving() as url, aiohttp.ClientSession() as http:
        document = {"advance_seconds": 3_650 * 86_400}
        for _ in range(1_000):
            async with http.post(f"{url}/_simulator/clock", json=document) as response:
                if response.status != 200:
                    break
        assert response.status == 400
        async with http.get(f"{url}/_simulator/report") as response:
            assert (await response.json())["time"].startswith("99")
