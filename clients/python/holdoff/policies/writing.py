"""Write a policy as a file to start from: all fields, each with a comment."""

from __future__ import annotations

import textwrap
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration

from holdoff.durations import format_duration, parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message

    from holdoff.v1 import policy_pb2

FIELDS = {
    "name": ("Its name: a-z, 0-9 and -. It must differ from the names of the presets.", '"mine"'),
    "title": ("The provider, for people.", '"My provider"'),
    "when_quiet": (
        'What `holdoff run` does in a back-off: "pause", "finish" or "terminate".',
        '"pause"',
    ),
    "longest_ttl": ("The longest TTL of a lease.", '"1d"'),
    "most_runs": ("How many jobs may use a token in custody at the same time.", "100"),
    "refresh.interval": (
        'Least time between two refreshes; "0s" if there is no such rule.',
        '"0s"',
    ),
    "refresh.margin": ("Added to the interval, unless a token has an interval of its own.", '"0s"'),
    "refresh.at": ('A run counts as refreshed at its "end", or at its "start".', '"end"'),
    "refresh.access_token_life": ('Life of an access token; "0s" if it is not known.', '"1h"'),
    "refresh.early_margin": ("How long before its end it may be refreshed.", '"60s"'),
    "refresh.rotation": (
        (
            'A used refresh token: "none" (a refresh returns no other), "reusable", "until-used" '
            '(valid until its successor is used), "grace", "single-use", or "single-use-revokes" '
            "(using it again revokes the grant)."
        ),
        '"single-use"',
    ),
    "refresh.grace": (
        'How long a used one stays valid, with "grace"; with "until-used" the longest time.',
        '"10m"',
    ),
    "refresh.idle_life": ("How long an unused refresh token lives.", '"30d"'),
    "refresh.absolute_life": (
        "How long a grant lives; then a person must authorize again.",
        '"365d"',
    ),
    "oauth.token_urls": ("Token endpoints.", '["https://login.example.com/oauth/token"]'),
    "oauth.hosts": ("Hosts of the API.", '["api.example.com"]'),
    "oauth.client_authentication": (
        'Where client id and secret go, the preferred way first: "basic", "body" or "query".',
        '["basic"]',
    ),
    "oauth.authorization_urls": (
        "Where a person authorizes an app.",
        '["https://login.example.com/oauth/authorize"]',
    ),
    "oauth.scopes": ("What an app asks for by default.", '["offline_access"]'),
    "oauth.authorization_scheme": (
        "The word before the access token in the header Authorization.",
        '"Bearer"',
    ),
    "refusal.name": ("How the token endpoint refuses a request, beyond RFC 6749.", '"old-token"'),
    "refusal.means": (
        'What it means: "too-early" for the interval, or "dead" for the refresh token.',
        '"dead"',
    ),
    "refusal.error": (
        "The field `error` of the answer; case does not matter.",
        '"invalid_request"',
    ),
    "refusal.description": (
        "A text in its `error_description`; case does not matter.",
        '"token expired"',
    ),
    "endpoint.path": (
        "RE2: finds `endpoint`, and `division` if there is one, in the path of a call.",
        "'/api/(?P<division>[^/]+)/(?P<endpoint>.+)'",
    ),
    "endpoint.division_query": (
        "Query parameters that contain the division, if `path` does not match.",
        '["division"]',
    ),
    "limit.name": ("The most events in a window.", '"errors"'),
    "limit.event": ('What is counted: "errors", "token_requests" or "calls".', '"errors"'),
    "limit.most": ("How many.", "10"),
    "limit.window": ("Length of the sliding window.", '"1h"'),
    "limit.scope": (
        'Each combination has a limit of its own: "app", "token", "division", "endpoint".',
        '["app"]',
    ),
    "limit.statuses": (
        'HTTP statuses that count, only with event = "errors"; "4xx" is 400 to 499.',
        '[400, 401, 403, 404, "5xx"]',
    ),
    "limit.margin": ("The part of `most` that is kept free.", "0"),
    "concurrency.name": ("The most calls at a time. Not enforced yet.", '"calls-at-a-time"'),
    "concurrency.most": ("How many.", "5"),
    "concurrency.scope": ("Each combination has a limit of its own.", '["app"]'),
    "block.scope": ("What backs off when the provider blocks.", '["app"]'),
    "block.first": ("Length of the first block, if the provider does not say.", '"1m"'),
    "block.factor": ("How many times as long each next block is.", "2.0"),
    "block.most": ("The longest block, whatever an answer says.", '"1h"'),
    "block.forget_after": (
        "After this time without a block, the next one counts as the first.",
        '"1d"',
    ),
    "throttle.name": (
        "An answer that blocks or throttles, the first that matches: all conditions must match.",
        '"too-many-calls"',
    ),
    "throttle.statuses": ("HTTP statuses.", "[429]"),
    "throttle.body": (
        "RE2, found in the body. A group `retry_after` has the seconds to wait.",
        r"""'(?i)try again in (?P<retry_after>\d{1,6}) seconds'""",
    ),
    "throttle.header": (
        "RE2, found in a header line `Name: value`; case does not matter.",
        "'^X-Problem: minute'",
    ),
    "throttle.scope": ("What backs off.", '["app"]'),
    "throttle.until": ("Headers that say how long.", '["Retry-After"]'),
    "throttle.length": (
        "How long, if the answer does not say. Without it, as [block] says.",
        '"1m"',
    ),
    "output.errors": (
        "RE2: a line of a job's output with an error. Groups: `status`, or `code` for `codes`.",
        "['failed with status (?P<status>[45]\\d\\d)']",
    ),
    "output.places": (
        "RE2: a line near it that says where. Groups: `url`, `division`, `endpoint`, `token`.",
        "['(?P<url>https://api\\.example\\.com/\\S+)']",
    ),
    "output.codes": ("The HTTP status of each code.", "{ E42 = 429 }"),
}
"""What each field means, in short, and an example; docs/policies.md says it in full."""

_NAMES = {
    "limits": "limit",
    "refusals": "refusal",
    "concurrency_limits": "concurrency",
    "throttles": "throttle",
    "kind": "event",
    "refresh_at": "at",
}
"""Fields that a file names otherwise than the API does."""
_NOT_IN_FILES = {"preset"}
_SEVERAL = {"limit", "concurrency", "throttle", "refusal"}
_WIDTH = 100


def write_policy(policy: policy_pb2.Policy) -> str:
    """Return the text of a file with this policy; `read_policy` reads the same from it."""
    values = dict(_values(policy))
    path, query = values.pop("endpoint_path", ""), values.pop("division_query", [])
    if path:
        values["endpoint"] = {"path": path} | ({"division_query": query} if query else {})
    tables = dict.fromkeys(name.partition(".")[0] for name in FIELDS if "." in name)
    tables |= {name: None for name, value in values.items() if _is_table(value)}
    lines = [*_lines("", {name: value for name, value in values.items() if name not in tables})]
    for table in tables:
        content = values.get(table)
        if isinstance(content, list):
            for number, one in enumerate(content):
                lines += ["", f"[[{table}]]", *_lines(table, one, comments=not number)]
        elif content:
            lines += ["", f"[{table}]", *_lines(table, content)]
        if not content:
            head = f"# [[{table}]]" if table in _SEVERAL else f"# [{table}]"
            lines += ["", head, *_lines(table, {})]
    return "\n".join(lines) + "\n"


def status_words(statuses: Sequence[int]) -> list[int | str]:
    """Write HTTP statuses, all of a class as one word such as "4xx"."""
    words: dict[int | str, None] = {}
    whole = {n for n in range(1, 6) if {*range(n * 100, n * 100 + 100)} <= {*statuses}}
    for status in statuses:
        words[f"{status // 100}xx" if status // 100 in whole else status] = None
    return list(words)


def _is_table(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def _values(message: Message) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a message, with the names and values that a file has."""
    for field in message.DESCRIPTOR.fields:
        name, value = _NAMES.get(field.name, field.name), getattr(message, field.name)
        if field.name in _NOT_IN_FILES:
            continue
        if field.is_repeated:
            yield name, _repeated(field.name, field.message_type, value)
        elif not field.message_type:
            yield name, _word(field.enum_type, value) if field.enum_type else value
        elif message.HasField(field.name):
            yield name, _duration(value) if isinstance(value, Duration) else dict(_values(value))


def _repeated(name: str, kind: Any, value: Any) -> Any:
    if not kind:
        return status_words(value) if name == "statuses" else list(value)
    return dict(value) if kind.GetOptions().map_entry else [dict(_values(one)) for one in value]


def _word(kind: Any, value: int) -> str:
    """Return how a file names a value of an enum; a newer coordinator may send any number."""
    found = kind.values_by_number.get(value)
    prefix = kind.values[0].name.removesuffix("UNSPECIFIED")
    word = found.name.removeprefix(prefix).lower() if found else f"unknown-{value}"
    return f"{word}s" if kind.name == "EventKind" else word.replace("_", "-")


def _duration(value: Duration) -> str:
    exact = Decimal(value.ToNanoseconds()) / 10**9
    text = format_duration(exact)
    return text if text[0] != "-" and parse_duration(text) == exact else f"{exact:f}s"


def _lines(table: str, content: dict[str, Any], *, comments: bool = True) -> Iterator[str]:
    """Yield the lines of a table; fields without a value are examples in comments."""
    known = [name.rpartition(".")[2] for name in FIELDS if name.rpartition(".")[0] == table]
    within = []
    for field in dict.fromkeys([*known, *content]):
        comment, example = FIELDS.get(f"{table}.{field}".removeprefix("."), ("", ""))
        value = content.get(field)
        if comments and comment:
            yield from textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        if isinstance(value, dict) and value:
            within.append((field, value))
        elif value == []:
            yield f"{field} = []" + (f"  # such as {example}" if comments and example else "")
        elif value:
            yield f"{field} = {_toml(value)}"
        elif comments and example:
            yield f"# {field} = {example}"
    for field, value in within:
        yield from ("", f"[{table}.{field}]")
        yield from (f"{_toml(key)} = {_toml(one)}" for key, one in sorted(value.items()))


def _toml(value: Any) -> str:
    if isinstance(value, list):
        words = [_toml(one) for one in value]
        if sum(map(len, words)) < _WIDTH // 2:
            return f"[{', '.join(words)}]"
        return "".join(["[\n", *(f"  {one},\n" for one in words), "]"])
    return _string(value) if isinstance(value, str) else repr(value)


def _string(text: str) -> str:
    """Write a text; as it is where that is possible, as the many backslashes of patterns ask."""
    if text.isprintable():
        if "'" not in text:
            return f"'{text}'" if "\\" in text or '"' in text else f'"{text}"'
        if "\\" in text and "'''" not in text and not text.endswith("'"):
            return f"'''{text}'''"
    return '"' + "".join(map(_character, text)) + '"'


def _character(one: str) -> str:
    if one in {'"', "\\"}:
        return f"\\{one}"
    return one if one.isprintable() else f"\\U{ord(one):08x}"
