"""Token requests of the simulated provider: the ways in which a client authenticates."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote_plus

import pytest

from holdoff.simulator import Provider, Seed
from holdoff.simulator.token_request import read

SEED = Seed(client_id="app:1", client_secret="s+e/c%72e t")
REFRESH = {"grant_type": "refresh_token", "refresh_token": SEED.refresh_token}
IN_BODY = {"client_id": SEED.client_id, "client_secret": SEED.client_secret}


def basic(client_id: str, secret: str) -> str:
    """Write a Basic header, with the credentials as they are."""
    return "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()


ENCODED = basic(quote_plus(SEED.client_id), quote_plus(SEED.client_secret))


def asked(authorization: str | None, *fields: tuple[str, str]) -> Any:
    """Send a token request to a new provider."""
    return Provider([SEED]).token(read(authorization, fields), "job/a", 0)


@pytest.mark.parametrize(
    ("authorization", "more"),
    [
        (None, IN_BODY),
        (ENCODED, {}),
        (ENCODED.replace("Basic", "bASIC"), {}),
        (basic(quote_plus(SEED.client_id), SEED.client_secret), {}),
        (ENCODED, {"client_id": SEED.client_id}),
        (ENCODED, {"client_secret": ""}),
    ],
)
def test_ways_to_authenticate(authorization: str | None, more: dict[str, str]) -> None:
    """Fields and Basic both work, encoded as a form or not; an empty field counts as omitted."""
    assert asked(authorization, *REFRESH.items(), *more.items()).status == 200


@pytest.mark.parametrize(
    ("authorization", "more", "status", "error"),
    [
        ("Bearer x", IN_BODY, 401, "invalid_client"),
        ("Basic", {}, 401, "invalid_client"),
        ("Basic \u00e9", {}, 401, "invalid_client"),
        ("Basic " + base64.b64encode(b"no colon").decode(), {}, 401, "invalid_client"),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), {}, 401, "invalid_client"),
        (basic(quote_plus(SEED.client_id), "no"), {}, 401, "invalid_client"),
        (basic("nobody", ""), {}, 401, "invalid_client"),
        (ENCODED, IN_BODY, 400, "invalid_request"),
        (ENCODED, {"client_id": "other"}, 400, "invalid_request"),
    ],
)
def test_wrong_ways_to_authenticate(
    authorization: str, more: dict[str, str], status: int, error: str
) -> None:
    """Another scheme or two ways at once are refused; a 401 names the scheme that is accepted."""
    answer = asked(authorization, *REFRESH.items(), *more.items())
    assert (answer.status, answer.body["error"]) == (status, error)
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)


def test_a_repeated_field_is_refused() -> None:
    """A field of OAuth that occurs twice is refused, an unknown one is ignored."""
    fields = [*REFRESH.items(), *IN_BODY.items(), ("x", "1"), ("x", "2")]
    assert asked(None, *fields).status == 200
    answer = asked(None, *fields, ("refresh_token", SEED.refresh_token))
    assert (answer.status, answer.body["error"]) == (400, "invalid_request")


def test_a_refused_form_is_an_error_of_its_app() -> None:
    """A request that is refused by its form counts as an error of the app that it names."""
    provider = Provider([SEED])
    fields = [*REFRESH.items(), ("client_id", SEED.client_id)]
    assert provider.token(read("Bearer x", fields), "job/a", 0).status == 401
    report: Any = provider.report(0)
    assert [(one["key"], one["total"]) for one in report["errors"]] == [(SEED.client_id, 1)]
