"""A job that sees the answers of its provider says them, and its policy knows what they mean."""

from __future__ import annotations

import asyncio
import email
import http.client
import uuid
from typing import TYPE_CHECKING

import holdoff
from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.harness import Replica

URL = "https://ann:secret@start.exactonline.nl/api/v1/535193/crm/Accounts(guid'1')?token=secret"
ZOHO = b'{"error_description":"You have made too many requests.","error":"Access Denied"}'


def token_of(replica: Replica, policy: str = "exact-online") -> str:
    """Make a token of an app of its own."""
    name = f"apps/answered-{uuid.uuid4().hex[:12]}/tokens/t"
    return replica.create_token(0.001, name=name, token={"policy": policy})


def test_errors_count_and_quiet_the_holder(replica: Replica) -> None:
    """What the policy counts is counted where it happened, under the lease; the rest is not.

    Fails when a status that the policy does not count is reported, or the lease is not named.
    """
    token = token_of(replica)
    with (
        holdoff.Client(replica.address) as client,
        client.acquire(token, job="sync") as lease,
    ):
        assert not lease.answered(URL, 200)
        assert not lease.answered(URL, 408)
        assert lease.wait_while_quiet(0)
        for _ in range(8):
            assert lease.answered(URL, 404)
        wait_until(lambda: not lease.wait_while_quiet(0))
        [budget] = client.list_budgets(token.partition("/tokens/")[0])
        assert (budget.used, budget.scope.division) == (8, "535193")
        assert budget.scope.endpoint == "crm/Accounts"
        [error, *_] = client.explain(token).errors
        assert (error.status, error.holder.job) == (404, "sync")
        assert "secret" not in str(client.explain(token))


def test_a_class_of_statuses_counts(replica: Replica) -> None:
    """EVE Online counts all that is not 2xx or 3xx. Fails when only listed numbers count."""
    token = token_of(replica, "eve-esi")
    with holdoff.Client(replica.address) as client, client.acquire(token) as lease:
        for status in (418, 404, 502, 599):
            assert lease.answered("https://esi.evetech.net/status", status)
        for status in (200, 302):
            assert not lease.answered("https://esi.evetech.net/status", status)
        wait_until(lambda: used(client, token) == 4)


def used(client: holdoff.Client, token: str) -> int:
    """Return how many events the budgets of an app have counted."""
    return sum(one.used for one in client.list_budgets(token.partition("/tokens/")[0]))


def test_a_block_is_recognised_by_status_headers_and_body(replica: Replica) -> None:
    """Exact Online's 429 with its headers, Zoho's 200 with its body.

    Fails when only statuses are looked at, or no header says how long.
    """
    exact, zoho = token_of(replica), token_of(replica, "zoho")
    with holdoff.Client(replica.address) as client:
        with client.acquire(exact) as lease:
            assert lease.answered(URL, 429, {"retry-after": "90"})
            wait_until(lambda: not lease.wait_while_quiet(0))
        [back_off] = client.list_back_offs(exact.partition("/tokens/")[0])
        assert (back_off.status, back_off.scope.division) == (429, "535193")
        length = back_off.end_time.ToMicroseconds() - back_off.start_time.ToMicroseconds()
        assert length == 90_000_000

        async def asynchronously() -> None:
            async with (
                holdoff.aio.Client(replica.address) as other,
                await other.acquire(zoho) as held,
            ):
                assert not await held.answered("https://z/crm/v2/Leads", 200, body=b"{}")
                assert await held.answered("https://z/crm/v2/Leads", 200, body=ZOHO)

        asyncio.run(asynchronously())
        [back_off] = client.list_back_offs(zoho.partition("/tokens/")[0])
        assert "access-denied" in back_off.reason


def test_headers_and_body_may_be_what_a_library_has(replica: Replica) -> None:
    """The headers of `urllib`, which are no `Mapping`, and a body that is not there.

    Fails when headers are read as a `Mapping`, or the body is taken for bytes.
    """
    headers = email.message_from_string("Retry-After: 90\n", http.client.HTTPMessage)
    with (
        holdoff.Client(replica.address) as client,
        client.acquire(token_of(replica)) as lease,
    ):
        assert not lease.answered(URL, 200, headers, None)
        assert lease.answered(URL, 429, headers, None)
