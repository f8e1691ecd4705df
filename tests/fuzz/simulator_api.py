"""Calls of the simulated API with a valid access token.

An input has a line each for the method, the path with the query, Accept and Content-Type; the rest
is the body.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl
from xml.etree import ElementTree as ET

from holdoff.simulator import Provider, Seed
from holdoff.simulator.api import Request
from holdoff.simulator.oauth import TokenForm
from tests.fuzz.engine import Target, edited, files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.simulator.answers import Answer
    from tests.fuzz.engine import Check

STATUSES = {200, 201, 204, 400, 403, 404, 405}
ORIGIN = "http://simulator:1"
SEED = Seed(expired_divisions=(535194,))
_JSON, _ATOM = b"application/json", b"application/atom+xml"
_ENTITY = (
    b'{"Name": "x", "Timestamp": "x", "Code": [1], "Amount": 1.5, "Lines": [{"a": null}],'
    b' "Due": "/Date(0)/"}'
)
_DOCUMENT = b'<eExact><Items><Item code="1"><Description>x</Description></Item></Items></eExact>'
_GUID = b"guid'0fb7554c-7b77-5659-bb6f-fd0d999071a1'"
_FILTER = (
    b"$filter=(Code eq '1' or substringof('x',Name)) and not (Amount gt 1.5m)"
    b" and Modified lt datetime'2026-01-01' and ID ne " + _GUID
)


def _input(method: bytes, path: bytes, accept: bytes = _JSON, body: bytes = b"") -> bytes:
    return b"\n".join((method, path, accept, _JSON, body))


_ACCOUNTS = b"/api/v1/535193/crm/Accounts"
_ITEMS = b"/api/v1/535193/bulk/Logistics/Items"
_SHOWN = (
    ("/docs/XMLDownload.aspx?Topic=Accounts&TSPaging=0x96", ""),
    ("/api/v1/535193/sync/CRM/Accounts?$filter=Timestamp gt 150", "application/atom+xml"),
    ("/api/v1/535193/crm/Accounts?$orderby=Name,Code,Amount,Due", "application/json"),
)
"""A list of each kind with the accounts, also those that were written."""
VALID = [
    _input(b"GET", _ACCOUNTS + b"?$select=ID,Name&$orderby=Name desc,Code&$inlinecount=allpages"),
    _input(b"GET", _ACCOUNTS + b"?" + _FILTER, _ATOM),
    _input(b"GET", _ACCOUNTS + b"?$top=70&$skip=2&$expand=Lines&$format=atom"),
    _input(b"GET", _ACCOUNTS + b"?$skiptoken=" + _GUID),
    _input(b"GET", _ACCOUNTS + b"/$count?$filter=year(Created) eq 2024"),
    _input(b"GET", _ACCOUNTS + b"(" + _GUID + b")", _ATOM),
    _input(b"POST", _ACCOUNTS, _ATOM, _ENTITY),
    _input(b"PUT", _ACCOUNTS + b"(" + _GUID + b")", _JSON, _ENTITY),
    _input(b"DELETE", _ACCOUNTS + b"(ID=" + _GUID + b")"),
    _input(b"GET", b"/api/v1/beta/535193/sync/CRM/Accounts?$filter=Timestamp gt 5L"),
    _input(b"GET", _ITEMS + b"?$select=ID&$filter=startswith(tolower(Name),'item')"),
    _input(b"GET", b"/api/v1/current/Me?$select=*", _ATOM),
    _input(b"GET", b"/api/v1/1/system/Divisions(535193)"),
    _input(b"GET", b"/api/v1/535194/crm/Accounts"),
    _input(b"GET", b"/api/v1/535193/crm/$metadata"),
    _input(b"GET", b"/docs/XMLDownload.aspx?Topic=Items&_Division_=535193&TSPaging=0x1F"),
    _input(b"POST", b"/docs/XMLUpload.aspx?Topic=Items&Division=535193", _ATOM, _DOCUMENT),
]
WORDS = [
    *(
        b"'",
        b"''",
        b"(",
        b")",
        b"/",
        b"//",
        b"%",
        b"%25",
        b"%2F",
        b"%ff",
        b"\xff",
        b"\0",
        b";",
        b",",
    ),
    *(b" and ", b" or ", b"not ", b" eq null", b" ge ", b"length(Name)", b"$", b"&", b"=", b"+"),
    *(b"9" * 400, b"-1", b"1e400", b"NaN", b"null", b"[" * 100, b'"', b"\\ud800", b'"<": 1', b"{}"),
    *(b"datetime'9999-12-31T23:59:59-23:00'", b"/Date(99999999999999)/", b"$top=0", b"HEAD"),
    *(b'"Timestamp": ', b'"ID": ', b'"Code": ', b'"Division": '),
    *(b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<a>", b"</a>", b"<?xml encoding='utf-16'?>"),
]


@contextlib.contextmanager
def opened() -> Iterator[Check]:
    """A call is answered with a documented status and a valid body, and its links work."""
    form = TokenForm("refresh_token", SEED.client_id, SEED.client_secret, SEED.refresh_token)

    def check(data: bytes) -> None:
        provider = Provider([SEED])
        answer = provider.token(form, "fuzz", 0)
        provider.sent(answer, 0)
        assert not isinstance(answer.body, str)
        bearer = str(answer.body["access_token"])

        def call(url: str, method: str = "GET", *more: str, body: bytes = b"") -> Answer:
            path, _, query = url.partition("?")
            options = tuple(parse_qsl(query, keep_blank_values=True))
            accept, content_type = (*more, "", "")[:2]
            request = Request(
                path, bearer, "fuzz", options, method, accept, content_type, body, ORIGIN
            )
            return provider.call(request, 0)

        head, body = data.split(b"\n", 4)[:4], b"".join(data.split(b"\n", 4)[4:])
        method, url, *more = (*(one.decode("latin-1") for one in head), "", "")[:4]
        answer = call(url, method, *more, body=body)
        assert answer.status in STATUSES, answer
        _check_body(answer)
        json.dumps(provider.report(0), allow_nan=False)
        if method in ("POST", "PUT"):  # what was written can be read everywhere
            for path, accept in _SHOWN:
                shown = call(path, "GET", accept)
                assert shown.status == 200, shown
                _check_body(shown)
        for link in _links(answer):
            path = link.removeprefix(ORIGIN)
            assert path != link, link
            assert call(path, "GET", "application/json").status == 200, link

    yield check


def _check_body(answer: Answer) -> None:
    if isinstance(answer.body, str):
        answer.body.encode()
        if "xml" in answer.content_type:
            ET.fromstring(answer.body)  # noqa: S314 -- our own
    else:
        json.dumps(answer.body, allow_nan=False)


def _links(answer: Answer) -> Iterator[str]:
    """The addresses in an answer that a client follows."""
    yield from (answer.headers[name] for name in ("Location",) if name in answer.headers)
    found = None if isinstance(answer.body, str) else answer.body.get("d")
    if isinstance(found, dict) and "__next" in found:
        yield found["__next"]


TARGETS = {"simulator-api": Target(edited(files("simulator-api", *VALID), WORDS), opened)}
