"""What jobs print and what providers answer: `OutputRecogniser`, and `recognise_answer`.

An input of `output` is the output of a job. One of `answers` is an HTTP answer: a status, headers,
an empty line and a body.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from holdoff._places import MOST_PATH_CHARACTERS
from holdoff._recognise import (
    MOST_COUNT,
    MOST_DIVISION_CHARACTERS,
    MOST_RETRY_SECONDS,
    OutputRecogniser,
    SeenBlock,
    SeenError,
    recognise_answer,
)
from holdoff.policies import presets
from holdoff_coordinator.policies import policy_message
from tests.fuzz.engine import Target, edited, files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis.strategies import SearchStrategy

    from holdoff._recognise import Seen
    from holdoff.v1 import policy_pb2
    from tests.fuzz.engine import Check

WORDS = [
    *(b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"\xc3", b"\x1b[31m", b"\x1b[", b'"', b"'", b"="),
    *(b"HOLDOFF-ERROR", b"HOLDOFF-BLOCKED", b"holdoff-", b" division=", b" endpoint=", b" status="),
    *(b" count=", b" retry_after=", b" throttle=", b"itgenoda219", b"returned an error: (400)"),
    *(
        b"https://start.exactonline.nl/api/v1/535193/crm/Accounts?$filter=x",
        b"(guid'1')",
        b"partition ",
    ),
    *(b"('9')", b"x" * 5000, "\u202e\U0001f600".encode(), b"99999999999999999999", b"-1", b"1e9"),
    *(b"Thu, 01 Jan 1970 00:00:00 GMT", b"user:secret@", b"?token=secret", b"429", b"400", b"503"),
    *(b"status=999", b"status=099", b"count=0", b"retry_after=99999999", b"999", b"0", b"1e400"),
]
LINES = [
    b"HOLDOFF-ERROR division=535193 endpoint=crm/Accounts status=400 count=2",
    b'2026-01-01 INFO HOLDOFF-BLOCKED status=429 retry_after=60 endpoint="a b"',
    b"The remote server returned an error: (404) Not Found.",
    b"itgenoda219: the request failed in partition Example (535193)'",
    b"https://start.exactonline.nl/api/v1/535193/crm/Accounts?$select=ID",
    b"\x1b[32mprogress 10%\x1b[0m\rprogress 20%\r",
    *(
        b"   at System.Net.HttpWebRequest.GetResponse()",
        b" ---> The remote server returned an error: (401)",
    ),
    b'Error 400: {"error":"access_denied","error_description":"access_token not expired"}',
    b"Client error: `GET https://start.exactonline.nl/api/v1/1/a` resulted in a `404 Not Found`",
    *(b"", b"some other line", b"x" * 17_000),
]
ANSWERS = [
    b"429\nRetry-After: 60\nX-RateLimit-Reset: 1700000060000\n\n{}",
    b"403\nDate: Thu, 01 Jan 2026 00:00:00 GMT\n\nThe API key is blocked.",
    b"503\nRetry-After: Thu, 01 Jan 2026 00:01:00 GMT\n\n<html>",
    b"200\nContent-Type: application/json\n\n{}",
]


FIELDS = {
    b"division": [b"535193", b"x" * 200, b'"a b"', b"\xff", b"\x1b[2J"],
    b"endpoint": [b"crm/Accounts", b"https://u:p@h/api/v1/1/x?y", b"/" * 3000, b'"a', b"((("],
    b"status": [b"400", b"429", b"999", b"099", b"-1", b"4000", "\u0664\u0660\u0660".encode()],
    b"count": [b"2", b"0", b"-1", b"99999", b"9" * 30, b"1e3"],
    b"retry_after": [b"60", b"0", b"1e9", b"9" * 15, b"9" * 16, b"-1", b"nan", b"999999999"],
    b"throttle": [b"too-many-calls", b"none", b'""'],
}


def _markers() -> SearchStrategy[bytes]:
    """Draw lines that jobs print for us, with any values."""
    pairs = [name + b"=" + value for name, values in FIELDS.items() for value in values]
    words = st.lists(st.sampled_from(pairs), max_size=6).map(b" ".join)
    kinds = st.sampled_from((b"HOLDOFF-ERROR ", b"x: HOLDOFF-BLOCKED ", b"HOLDOFF-ERROR\t"))
    return st.tuples(kinds, words).map(b"".join)


def _printed() -> SearchStrategy[bytes]:
    ends = st.sampled_from((b"\n", b"\n", b"\n", b"\r\n", b"\r", b""))
    lines = st.lists(st.tuples(st.sampled_from(LINES) | _markers(), ends), max_size=40)
    return lines.map(lambda pairs: b"".join(line + end for line, end in pairs))


def _policies() -> list[policy_pb2.Policy]:
    return [policy_message(one) for one in presets().values()]


def check_seen(seen: Seen | None) -> None:
    """Fail unless a finding is of a known type and within its limits."""
    if seen is None:
        return
    assert isinstance(seen, SeenError | SeenBlock)
    assert seen.status == 0 or 100 <= seen.status <= 599
    assert len(seen.division) <= MOST_DIVISION_CHARACTERS
    assert len(seen.endpoint) <= MOST_PATH_CHARACTERS
    assert (seen.division + seen.endpoint).isprintable()
    assert not set("?#") & set(seen.endpoint), "a query may be secret"
    if isinstance(seen, SeenError):
        assert 1 <= seen.count <= MOST_COUNT
    elif seen.retry_after_seconds is not None:
        assert 0 <= seen.retry_after_seconds <= MOST_RETRY_SECONDS


@contextlib.contextmanager
def output() -> Iterator[Check]:
    """Check that what is found is within its limits, and the same wherever the output is cut."""
    policies = [one for one in _policies() if one.output.errors][:2]

    def found(policy: policy_pb2.Policy, pieces: list[bytes]) -> list[Seen]:
        one = OutputRecogniser(policy)
        return [seen for piece in pieces for seen in one.feed(piece)] + one.finish()

    def check(data: bytes) -> None:
        chance = random.Random(data)  # noqa: S311 - the same for the same input
        for policy in policies:
            whole = found(policy, [data])
            for seen in whole:
                check_seen(seen)
            assert len(whole) <= 1 + len(data.splitlines())
            for count in (1, 2, 20):
                cuts = sorted(chance.randint(0, len(data)) for _ in range(count))
                ends = zip([0, *cuts], [*cuts, len(data)], strict=True)
                assert found(policy, [data[start:end] for start, end in ends]) == whole, cuts

    yield check


@contextlib.contextmanager
def answers() -> Iterator[Check]:
    """Check that answers are recognised within limits, whatever their headers and bodies are."""
    policies = _policies()

    def check(data: bytes) -> None:
        head, _, body = data.partition(b"\n\n")
        first, *lines = head.decode("latin-1").split("\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
        status = int(first) if first.isascii() and first.isdecimal() and len(first) < 10 else 0
        for policy in policies:
            for now in (0.0, 1_700_000_000.0):
                check_seen(recognise_answer(policy, status, headers, body, now_epoch_seconds=now))

    yield check


TARGETS = {
    "output": Target(edited(_printed() | files("output", LINES[0]), WORDS), output),
    "answers": Target(edited(files("answers", *ANSWERS), WORDS), answers),
}
