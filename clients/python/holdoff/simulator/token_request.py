"""What a token request says: its fields, and who its client claims to be.

The rules are those of RFC 6749, sections 2.3, 3.2 and 5.2.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from holdoff.simulator.answers import Answer, oauth_error
from holdoff.simulator.oauth import ASK_FOR_BASIC, TokenForm

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIELDS = frozenset(
    {
        "grant_type",
        "client_id",
        "client_secret",
        "refresh_token",
        "code",
        "redirect_uri",
        "code_verifier",
    }
)


def read(authorization: str | None, fields: Iterable[tuple[str, str]]) -> TokenForm:
    """Read a token request.

    A client authenticates in one way: by Basic, or with fields of the body or the query.

    Args:
        authorization: the header of that name; None if there is none.
        fields: the fields of the query and of the body.
    """
    known: dict[str, Any] = {}
    for name, value in fields:
        if name not in _FIELDS or not value:  # without a value it counts as omitted
            continue
        if name in known:
            return _refused(known, _invalid(f"{name} is repeated."))
        known[name] = value
    if authorization is None:
        return TokenForm(**known)

    credentials = _basic(authorization)
    if credentials is None:
        answer = oauth_error(
            401, "invalid_client", "The Authorization header is not Basic.", ASK_FOR_BASIC
        )
        return _refused(known, answer)
    client_id, secret = credentials
    if "client_secret" in known:
        return _refused(known, _invalid("The client authenticates in more than one way."))
    if known.setdefault("client_id", client_id) != client_id:
        return _refused(known, _invalid("Two client ids."))
    known["client_secret"] = unquote_plus(secret)
    return TokenForm(**known, basic_secret=secret)


def _basic(authorization: str) -> tuple[str, str] | None:
    """The client id of a Basic header, and the secret as it was sent; None if it is another header.

    The RFC has both encoded as a form; many clients send the secret as it is.
    """
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        text = base64.b64decode(value.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    client_id, colon, secret = text.partition(":")
    return (unquote_plus(client_id), secret) if colon else None


def _refused(known: dict[str, Any], answer: Answer) -> TokenForm:
    return TokenForm(client_id=known.get("client_id", ""), refusal=answer)


def _invalid(description: str) -> Answer:
    return oauth_error(400, "invalid_request", description)
