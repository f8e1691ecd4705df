"""The REST and XML API: which calls are admitted, and what they are answered.

Sources of texts and reasons of refusals: Exact Online, "Response codes and error handling",
and reports of users.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from holdoff.simulator import bodies, literals, metadata, xmlapi
from holdoff.simulator.accounting import Rule, Scope
from holdoff.simulator.answers import Answer
from holdoff.simulator.enforcement import Enforcement, Window
from holdoff.simulator.filters import BadFilterError
from holdoff.simulator.formats import Format, wants_json
from holdoff.simulator.limits import CALLS_PER_DAY, CALLS_PER_MINUTE, DAY_MS, MINUTE_MS
from holdoff.simulator.paths import DOWNLOAD, UPLOAD, Place, locate
from holdoff.simulator.queries import BadQueryError, page, read_query
from holdoff.simulator.resources import DIVISIONS, ME, Resource
from holdoff.simulator.store import Store, StoreFullError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdoff.simulator.filters import Row
    from holdoff.simulator.grants import AccessToken
    from holdoff.simulator.oauth import TokenEndpoint
    from holdoff.simulator.seeds import Seed

_MOST_SPELLINGS = 10_000
_KEY_START = re.compile(r"\(|%28")
_BAD = 400


@dataclass(frozen=True, slots=True)
class Request:
    """A call of the API; all but its path can be left out."""

    path: str
    """From its first slash, as it was sent."""
    bearer: str = field(default="", repr=False)
    """The access token; empty if none was sent."""
    agent: str = "unknown"
    """Who calls, by its User-Agent."""
    query: tuple[tuple[str, str], ...] = ()
    method: str = "GET"
    accept: str = ""
    content_type: str = ""
    body: bytes | None = b""
    """None if it could not be read."""
    origin: str = "https://start.exactonline.nl"
    """Scheme and host as the client spelled them, for the addresses in answers."""


class _Refusal(Exception):  # noqa: N818 -- nothing went wrong here
    """An answer instead of the one that was asked for."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


class Api:
    """Answers calls with an access token.

    Args:
        tokens: knows the access tokens.
        enforcement: counts errors and blocks keys.
    """

    def __init__(self, tokens: TokenEndpoint, enforcement: Enforcement) -> None:
        self._tokens = tokens
        self._enforcement = enforcement
        self._store = Store()
        self._minutes: dict[tuple[str, str], Window] = {}
        self._days: dict[tuple[str, str], Window] = {}
        self._spellings: dict[str, str] = {}

    def call(self, request: Request, now_ms: int) -> Answer:
        """Answer a call."""
        place = locate(request.path, dict(request.query))
        if place is None:
            return _NO_API
        access = self._tokens.access(request.bearer)
        if access is None:
            # The token belongs to no key, so no key's errors are counted.
            answer = _refused(request, place, _unauthorized(), now_ms)
        else:
            answer = self._answer_to(access, request, place, now_ms)
        self._enforcement.ledger.api_call(
            request.method, request.path, answer.status, request.agent
        )
        return answer

    def _answer_to(
        self, access: AccessToken, request: Request, place: Place, now_ms: int
    ) -> Answer:
        seed, agent = access.grant.seed, request.agent
        if place.endpoint in (UPLOAD, DOWNLOAD) and not place.division:
            place = replace(place, division=str(seed.divisions[0]))
        scope = Scope(seed.client_id, seed.user, place.division, self._spelled(place.endpoint))
        if self._enforcement.blocked(scope.key, agent, now_ms):
            return self._enforcement.block_answer()
        try:
            if not access.valid(now_ms):
                raise _unauthorized()
            self._tokens.used(access, now_ms)
            limits = self._take_call(seed, scope, agent, now_ms)
            answer = self._answer(seed, request, place, now_ms)
            return replace(answer, headers={**answer.headers, **limits})
        except _Refusal as refusal:
            self._enforcement.count_error(refusal.status, scope, agent, now_ms)
            return _refused(request, place, refusal, now_ms)

    def _spelled(self, endpoint: str) -> str:
        """An endpoint in one spelling: the one seen first."""
        lower = endpoint.lower()
        if len(self._spellings) >= _MOST_SPELLINGS:
            return self._spellings.get(lower, lower)
        return self._spellings.setdefault(lower, endpoint)

    def _take_call(self, seed: Seed, scope: Scope, agent: str, now_ms: int) -> dict[str, str]:
        """Count a call in the minute and the day, and return the limits' headers.

        A 429 carries the headers of the limit that tripped and no others (field).
        """
        known = scope.division in map(str, seed.divisions)
        company = (
            scope.key,
            scope.division if known else "",
        )  # a client can name any number of others
        day = self._days.setdefault(company, Window(DAY_MS, CALLS_PER_DAY))
        minute = self._minutes.setdefault(company, Window(MINUTE_MS, CALLS_PER_MINUTE))
        headers: dict[str, str] = {}
        for rule, window, name in (
            (Rule.CALLS_PER_MINUTE, minute, "X-RateLimit-Minutely"),
            (Rule.CALLS_PER_DAY, day, "X-RateLimit"),
        ):
            admitted = window.take(now_ms)
            own = window.headers(name, now_ms)
            if not admitted:
                detail = f"more than {window.limit} calls"
                self._enforcement.violate(rule, scope, agent, now_ms, detail)
                own["Retry-After"] = self._enforcement.retry_after(window, now_ms)
                raise _Refusal(429, "Too many requests", own)
            headers |= own
        return headers

    def _answer(self, seed: Seed, request: Request, place: Place, now_ms: int) -> Answer:
        """Answer an admitted call.

        Raises:
            _Refusal: it is refused.
        """
        if place.endpoint in (UPLOAD, DOWNLOAD):
            return self._xml(seed, request, place, now_ms)
        if place.endpoint not in _NO_COMPANY:
            _check_division(seed, place.division)
        resource = place.resource
        if place.metadata and (document := metadata.describe(place.endpoint)):
            return Answer(200, document, content_type="application/xml")
        if resource is None or place.metadata:
            raise _Refusal(404, f"Resource not found for the segment '{place.endpoint}'.")
        _check_scope(seed, resource.scope, request.method)
        if request.method not in _methods(resource, place):
            allowed = ", ".join(_methods(resource, place))
            raise _Refusal(405, "Method Not Allowed", {"Allow": allowed})
        try:
            if request.method == "GET":
                return self._read(seed, request, place, resource, now_ms)
            return self._change(request, place, resource, now_ms)
        except BadFilterError as error:
            raise _Refusal(_BAD, f"Invalid filter condition: {error}.") from error
        except (BadQueryError, bodies.BadBodyError) as error:
            raise _Refusal(_BAD, str(error)) from error
        except StoreFullError as error:
            raise _Refusal(507, "The simulator keeps no more of what clients write.") from error

    def _read(
        self, seed: Seed, request: Request, place: Place, resource: Resource, now_ms: int
    ) -> Answer:
        query = read_query(request.query)
        rows = self._rows(seed, resource, place.division, now_ms)
        form = _format(request)
        if place.key is not None:
            key = _key(place.key)
            for row in rows:
                if row[resource.key] == key:
                    return form.entity(row, resource, query)
            raise _missing(place)
        small = place.count or query.top == 1 or dict(query.options).get("$select")
        if resource.bulk and not small:
            raise _Refusal(_BAD, "Please add a $select or a $top=1 statement to the query string.")
        found = page(rows, query, resource.order, resource.page_size)
        if place.count:
            return Answer(200, str(found.total), content_type="text/plain")
        return form.list(found, resource, query)

    def _rows(self, seed: Seed, resource: Resource, division: str, now_ms: int) -> Sequence[Row]:
        user_id = uuid5(NAMESPACE_URL, f"simulator:{seed.user}")
        if resource is ME:
            return [
                {
                    "UserID": user_id,
                    "UserName": seed.user,
                    "FullName": seed.user,
                    "Email": seed.user,
                    "CurrentDivision": seed.divisions[0],
                    "AccountingDivision": seed.divisions[0],
                    "LanguageCode": "EN",
                    "ServerTime": literals.at(now_ms),
                }
            ]
        if resource.entities == DIVISIONS.path:
            return [
                {
                    "Code": code,
                    "HID": code,
                    "Description": f"Company {code}",
                    "CustomerName": f"Company {code}",
                    "Main": code == seed.divisions[0],
                    "Current": code == seed.divisions[0],
                    "Status": 0,
                }
                for code in sorted(seed.divisions)
            ]
        return self._store.rows(resource, division)

    def _change(self, request: Request, place: Place, resource: Resource, now_ms: int) -> Answer:
        if request.method == "DELETE":
            if not self._store.delete(resource, place.division, _key(place.key)):
                raise _missing(place)
            return _NO_CONTENT
        fields = bodies.read_fields(request.body, request.content_type)
        if request.method == "POST":
            row = self._store.create(resource, place.division, fields, now_ms)
            return _format(request).entity(row, resource, read_query(()), 201)
        if not self._store.update(resource, place.division, _key(place.key), fields, now_ms):
            raise _missing(place)
        return _NO_CONTENT

    def _xml(self, seed: Seed, request: Request, place: Place, now_ms: int) -> Answer:
        _check_division(seed, place.division)
        query = {name.lower(): value for name, value in request.query}
        topic = xmlapi.TOPICS.get(query.get("topic", "").lower())
        if topic is None:
            raise _Refusal(_BAD, f"Unknown topic; there are {', '.join(xmlapi.TOPICS)}.")
        allowed = "POST" if place.endpoint == UPLOAD else "GET"
        if request.method != allowed:
            raise _Refusal(405, "Method Not Allowed", {"Allow": allowed})
        _check_scope(seed, topic.resource.scope, request.method)
        try:
            if place.endpoint == UPLOAD:
                body = xmlapi.upload(topic, request.body, now_ms)
            else:
                rows = self._store.rows(topic.resource, place.division)
                body = xmlapi.download(topic, rows, query.get("tspaging", ""))
        except xmlapi.BadDocumentError as error:
            raise _Refusal(_BAD, str(error)) from error
        return Answer(200, body, content_type="text/xml")


_NO_API = Answer(404, "Not Found", content_type="text/plain")
_NO_API = Answer(404, "Not Found", content_type="text/plain")
_NO_CONTENT = Answer(204, "")
_NO_COMPANY = frozenset((ME.path, DIVISIONS.path, "hrm/Divisions"))
"""Any company in their paths is accepted (field)."""


def _unauthorized() -> _Refusal:
    text = "Unauthorized: unknown, expired or revoked access token"
    return _Refusal(401, text, {"WWW-Authenticate": "Bearer"})


def _missing(place: Place) -> _Refusal:
    return _Refusal(404, f"Resource not found for the segment '{place.endpoint}'.")


def _check_division(seed: Seed, division: str) -> None:
    if division not in map(str, seed.divisions):
        text = "Forbidden - User division is not within division scope."
        raise _Refusal(403, text, {"Reason": "NoDivisionAccess"})
    if int(division) in seed.expired_divisions:
        # The reason is the documented one; no report of its text was found.
        text = "Forbidden - License expired."
        raise _Refusal(403, text, {"Reason": "LicenseExpired"})


def _check_scope(seed: Seed, scope: str, method: str) -> None:
    if not scope or not seed.scopes or scope in seed.scopes:
        return
    verb = "read" if method == "GET" else "manage"
    if verb == "read" and f"{scope}:read" in seed.scopes:
        return
    raise _Refusal(403, f"Forbidden - Application Scope Violated. Cannot {verb} '{scope}' scope.")


def _methods(resource: Resource, place: Place) -> Sequence[str]:
    """The methods that a list, or an entity, has."""
    if place.count:
        return ("GET",)
    without = ("POST",) if place.key is not None else ("PUT", "DELETE")
    return [method for method in resource.methods if method not in without]


def _key(text: str | None) -> literals.Value:
    """Read the key of an entity, `guid'…'`, also as `ID=guid'…'`."""
    try:
        return literals.parse((text or "").rpartition("=")[2].strip())
    except ValueError as error:
        raise _Refusal(_BAD, "Bad Request - Error in query syntax.") from error


def _format(request: Request) -> Format:
    option = dict(request.query).get("$format", "")
    endpoint = _KEY_START.split(request.path, maxsplit=1)[0].rstrip("/")
    return Format(wants_json(request.accept, option), request.origin + endpoint)


def _refused(request: Request, place: Place, refusal: _Refusal, now_ms: int) -> Answer:
    if place.endpoint in (UPLOAD, DOWNLOAD):
        body = xmlapi.error(str(refusal), now_ms)
        return Answer(refusal.status, body, refusal.headers, content_type="text/xml")
    return _format(request).error(refusal.status, str(refusal), refusal.headers)
