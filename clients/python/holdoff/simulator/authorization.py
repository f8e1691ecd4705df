"""The authorization endpoint: a user allows an app, which gets a code or an access token."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from holdoff.simulator.answers import Answer
from holdoff.simulator.codes import Challenge, ChallengeMethod, Codes
from holdoff.simulator.switches import Consent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdoff.simulator.enforcement import Enforcement
    from holdoff.simulator.grants import Grant
    from holdoff.simulator.oauth import TokenEndpoint

_URI = re.compile(r"[!-~]++")
"""A URI has no other characters (RFC 3986)."""


class AuthorizationEndpoint:
    """Answers the browser of a user who allows an app.

    Without the parameter `user` it shows a page with the users of the app, or, by
    the switch `consent`, takes the first one. Any absolute redirect URI is
    accepted, since apps of the simulator register none.
    """

    def __init__(self, tokens: TokenEndpoint, codes: Codes, enforcement: Enforcement) -> None:
        self._tokens = tokens
        self._codes = codes
        self._enforcement = enforcement

    def authorize(self, query: Mapping[str, str], agent: str, now_ms: int) -> Answer:
        """Answer a GET.

        Args:
            query: its parameters.
            agent: who asks, by its User-Agent.
            now_ms: simulated time.
        """
        client_id, redirect_uri = query.get("client_id", ""), query.get("redirect_uri", "")
        users = {grant.seed.user: grant for grant in self._tokens.grants(client_id)}
        if not users:
            return _page(400, "Unknown client_id")
        if not _redirectable(redirect_uri):
            return _page(400, "redirect_uri is not an absolute URI without a fragment")
        if self._enforcement.blocked(client_id, agent, now_ms):
            return self._enforcement.block_answer()

        user = query.get("user")
        if user is None and self._enforcement.switches.consent is Consent.AUTO:
            user = next(iter(users))
        if user is None:
            return _consent_page(query, users)
        return self._decide(query, users.get(user), agent, now_ms)

    def _decide(
        self, query: Mapping[str, str], grant: Grant | None, agent: str, now_ms: int
    ) -> Answer:
        """Redirect to the app, with what the user allowed or with an error."""
        kind = query.get("response_type")
        in_fragment = kind == "token"
        answer: Answer | None = None
        if grant is None:
            told: dict[str, object] = {"error": "access_denied"}
        elif kind == "code":
            told = self._issue_code(query, grant, now_ms)
        elif kind == "token":
            answer = self._tokens.log_on(grant, agent, now_ms)
            told = dict(answer.body) if not isinstance(answer.body, str) else {}
        else:
            told = {"error": "unsupported_response_type"}
        if "state" in query:
            told["state"] = query["state"]
        redirect = _redirect(query["redirect_uri"], told, in_fragment=in_fragment)
        return replace(redirect, issued_to=answer.issued_to) if answer else redirect

    def _issue_code(self, query: Mapping[str, str], grant: Grant, now_ms: int) -> dict[str, object]:
        challenge = None
        try:
            if "code_challenge" in query:
                method = ChallengeMethod(query.get("code_challenge_method", ChallengeMethod.PLAIN))
                challenge = Challenge(query["code_challenge"], method)
        except ValueError as error:
            return {"error": "invalid_request", "error_description": str(error)}
        return {"code": self._codes.issue(grant, query["redirect_uri"], challenge, now_ms)}


def _redirectable(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    return bool(_URI.fullmatch(uri) and parts.scheme and "#" not in uri)


def _redirect(uri: str, told: Mapping[str, object], *, in_fragment: bool) -> Answer:
    separator = "#" if in_fragment else "&" if "?" in uri else "?"
    return Answer(302, "", {"Location": f"{uri}{separator}{urlencode(told)}"})


def _consent_page(query: Mapping[str, str], users: Mapping[str, Grant]) -> Answer:
    def link(user: str, text: str) -> str:
        address = f"?{urlencode({**query, 'user': user})}"
        return f'<li><a href="{escape(address)}">{escape(text)}</a></li>'

    links = [*(link(user, f"Allow as {user}") for user in users), link("", "Deny")]
    return _page(200, "An app asks for access", f"<ul>{''.join(links)}</ul>")


def _page(status: int, title: str, content: str = "") -> Answer:
    return Answer(
        status,
        f"<!DOCTYPE html><html><head><title>{title}</title></head>"
        f"<body><h1>{title}</h1>{content}</body></html>",
    )
