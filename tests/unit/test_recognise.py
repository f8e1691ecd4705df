"""What is taken for an error, in output and in answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff._recognise import OutputRecogniser, SeenBlock, SeenError, recognise_answer
from holdoff.policies import presets
from holdoff.v1 import policy_pb2
from holdoff_coordinator.policies import policy_message

EXACT = policy_message(presets()["exact-online"])
BAD_REQUEST = "The remote server returned an error: (400) Bad Request."
ACCOUNTS = "https://start.exactonline.nl/api/v1/535193/crm/Accounts?$select=ID"
NOW = 1_800_000_000.0


def seen(text: str | bytes, policy: policy_pb2.Policy = EXACT) -> list[object]:
    """Return what is seen in an output as a whole."""
    recogniser = OutputRecogniser(policy)
    data = text.encode() if isinstance(text, str) else text
    return [*recogniser.feed(data), *recogniser.finish()]


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (f"{BAD_REQUEST}\n{ACCOUNTS}\n", [SeenError(400, "535193", ACCOUNTS)]),
        (f"{BAD_REQUEST}\r\n\r\n{ACCOUNTS}\r\n", [SeenError(400, "535193", ACCOUNTS)]),
        (
            f"partitie 'ACME (77)'\nitgenoda494: {BAD_REQUEST}\nno url\n",
            [SeenError(400, "77", "")],
        ),
        (
            f"itgenoda055 in partitie 'ACME (535193)'\n{BAD_REQUEST}\n{ACCOUNTS}\n",
            [SeenError(400, "535193", ACCOUNTS)],
        ),
        (f"itgenoda055\n{ACCOUNTS}\n", [SeenError(408, "535193", ACCOUNTS)]),
        (
            f"itgenexl150 too many\n{ACCOUNTS}\n",
            [SeenBlock(429, "535193", ACCOUNTS, None, "too-many-calls")],
        ),
        (f"{BAD_REQUEST}\n{BAD_REQUEST}\n", [SeenError(400), SeenError(400)]),
        (f"{BAD_REQUEST}\n" + "line\n" * 9 + ACCOUNTS, [SeenError(400)]),
        ("(400) Bad Request without more\n", []),
    ],
)
def test_data_hub(output: str, found: list[object]) -> None:
    """Code, status, URL and division of Data Hub's output (`domain.md`, "Data Hub").

    Fails when a code and its message count twice, or when the URL of the next line is not read.
    """
    assert seen(output) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            'x HOLDOFF-ERROR division=535193 endpoint="crm/A b" status=400 count=3',
            SeenError(400, "535193", "crm/A b", 3),
        ),
        ("HOLDOFF-ERROR", SeenError()),
        ("HOLDOFF-ERROR status=abc count=-1 nonsense =", SeenError()),
        ("HOLDOFF-ERROR count=99999999999999", SeenError(count=10_000)),
        ("HOLDOFF-ERROR status=429", SeenBlock(429, throttle="too-many-calls")),
        ("HOLDOFF-BLOCKED status=403 retry_after=60", SeenBlock(403, retry_after_seconds=60)),
        ("HOLDOFF-BLOCKED retry_after=soon throttle=x", SeenBlock(throttle="x")),
    ],
)
def test_neutral_lines(line: str, found: object) -> None:
    """Any job can print them, whatever the policy; nonsense in them is still an error."""
    assert seen(line) == [found]
    assert seen(f"before\n{line}\nafter\n") == [found]


def test_neutral_lines_need_no_policy() -> None:
    """Fails when only a policy with patterns is looked for anything."""
    assert seen("HOLDOFF-ERROR status=500\n", policy_pb2.Policy()) == [SeenError(500)]


LINES = st.lists(
    st.sampled_from(
        [
            *(BAD_REQUEST, ACCOUNTS, "itgenexl150", "partitie 'ACME (77)'", "text", "", "x\r"),
            *("HOLDOFF-ERROR status=404", "\0\ufffd", "z" * 70_000),
        ]
    ),
    max_size=12,
)


@given(LINES, st.lists(st.integers(0, 400), max_size=6), st.booleans())
def test_it_does_not_matter_how_output_is_cut(lines: list[str], cuts: list[int], end: bool) -> None:
    """In one piece or in many, the same is seen.

    Fails when a rest is forgotten, or the short cut for dull output forgets a division.
    """
    data = "\n".join(lines).encode() + b"\n" * end
    recogniser, pieces, start = OutputRecogniser(EXACT), [], 0
    for cut in cuts:
        pieces += recogniser.feed(data[start : start + cut])
        start += cut
    pieces += [*recogniser.feed(data[start:]), *recogniser.finish()]
    whole = OutputRecogniser(EXACT)
    assert pieces == [*whole.feed(data), *whole.finish()]


def test_a_line_of_ten_megabytes_costs_little_and_hides_nothing() -> None:
    """Fails when the rest of a long line is kept, or what follows it is skipped too."""
    recogniser = OutputRecogniser(EXACT)
    for _ in range(160):
        assert recogniser.feed(b"\xff" * 65_536) == []
        assert len(recogniser._rest) <= 65_536
    assert recogniser.feed(b"\nHOLDOFF-ERROR status=400\n") == [SeenError(400)]


def test_an_error_that_waits_for_its_place_can_be_flushed() -> None:
    """A caller that hears nothing for a while gets it; its place then comes too late."""
    recogniser = OutputRecogniser(EXACT)
    assert recogniser.feed(f"{BAD_REQUEST}\n".encode()) == []
    assert recogniser.pending
    assert recogniser.flush() == [SeenError(400)]
    assert not recogniser.pending
    assert recogniser.feed(f"{ACCOUNTS}\n".encode()) == []


def test_expressions_of_another_release_are_skipped() -> None:
    """Fails when one that does not compile costs those that do."""
    policy = policy_pb2.Policy(output=policy_pb2.OutputPolicy(errors=["(", "boom"]))
    assert seen("boom\n", policy) == [SeenError()]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "30"}, 30),
        ({"X-RateLimit-Minutely-Reset": f"{NOW * 1000 + 5000:.0f}"}, 5),
        ({"X-RateLimit-Reset": f"{NOW + 7:.0f}"}, 7),
        ({"Retry-After": "Fri, 15 Jan 2027 08:01:00 GMT"}, 60),
        (
            {
                "Retry-After": "Fri, 15 Jan 2027 09:01:00 GMT",
                "Date": "Fri, 15 Jan 2027 09:00:00 GMT",
            },
            60,
        ),
        ({}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"X-RateLimit-Reset": f"{NOW - 7:.0f}"}, None),
    ],
)
def test_the_end_of_a_block_is_read_from_headers(
    headers: dict[str, str], seconds: float | None
) -> None:
    """Exact Online's resets are milliseconds since 1970 (`domain.md`); others differ.

    Fails when a number is always taken for seconds from now.
    """
    found = recognise_answer(EXACT, 429, headers, now_epoch_seconds=NOW)
    assert found == SeenBlock(429, retry_after_seconds=seconds, throttle="too-many-calls")


def test_some_throttle_with_200() -> None:
    """Zoho does (`domain.md`). Fails when only the status is looked at."""
    zoho = policy_message(presets()["zoho"])
    body = b'{"error": "Access Denied", "error_description": "too many requests"}'
    found = recognise_answer(zoho, 200, {}, body, now_epoch_seconds=NOW)
    assert found == SeenBlock(200, throttle="access-denied")
    assert recognise_answer(zoho, 200, {}, b"{}", now_epoch_seconds=NOW) is None
    assert recognise_answer(EXACT, 404, {}, now_epoch_seconds=NOW) is None
