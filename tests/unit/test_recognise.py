"""What is taken for an error, in output and in answers."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff._patterns import compile_pattern
from holdoff._recognise import (
    MOST_FRAMES,
    MOST_REMEMBERED,
    SAME_ERROR_SECONDS,
    Duplicates,
    OutputRecogniser,
    SeenBlock,
    SeenError,
    recognise_answer,
)
from holdoff.policies import presets
from holdoff.v1 import policy_pb2
from holdoff_coordinator.policies import policy_message

EXACT = policy_message(presets()["exact-online"])
BAD_REQUEST = "The remote server returned an error: (400) Bad Request."
DUTCH = "De externe server heeft een fout geretourneerd: (401) Niet gemachtigd."
XML = "https://start.exactonline.nl/Docs/XMLDownload.aspx"
HOST = "https://start.exactonline.nl"
XML_PATH = "/Docs/XMLDownload.aspx"
PATH = "/api/v1/535193/crm/Accounts"
ACCOUNTS = f"{HOST}{PATH}"
CAPACITY = (
    "Er is geen capaciteit meer beschikbaar voor API-gebruik op partitie 'ACME (NL) (535193)'."
)
NOW = 1_800_000_000.0
KEY = "0123456789abcdef"


def seen(
    text: str | bytes, policy: policy_pb2.Policy = EXACT, *, trust_output: bool = False
) -> list[object]:
    """Return what is seen in an output as a whole."""
    recogniser = OutputRecogniser(policy, KEY, trust_output=trust_output)
    data = text.encode() if isinstance(text, str) else text
    return [*recogniser.feed(data), *recogniser.finish()]


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (f"{BAD_REQUEST}\n{ACCOUNTS}?$select=ID\n", [SeenError(400, "535193", PATH)]),
        (f"{BAD_REQUEST}\r\n\r\n{ACCOUNTS}\r\n", [SeenError(400, "535193", PATH)]),
        (f"{BAD_REQUEST} {ACCOUNTS}.", [SeenError(400, "535193", PATH)]),
        # Calls whose path has no division.
        (
            f"partitie 'ACME (77)'\n{BAD_REQUEST}\n{HOST}/api/v1/current/Me\n",
            [SeenError(400, "", "/api/v1/current/Me")],
        ),
        (
            f"{BAD_REQUEST}\n{HOST}/docs/XMLUpload.aspx?Topic=Items&_Division_=535193\n",
            [SeenError(400, "535193", "/docs/XMLUpload.aspx")],
        ),
        # One error each: a line with both; the code, then the message; the division in between.
        (f"partitie 'ACME (77)'\nitgenoda060: {BAD_REQUEST}\nno url\n", [SeenError(400, "77", "")]),
        (f"itgenclr083\n{BAD_REQUEST}\n{ACCOUNTS}\n", [SeenError(400, "535193", PATH)]),
        (f"itgenclr083 {ACCOUNTS}\n{BAD_REQUEST}\nx\n", [SeenError(400, "535193", PATH)]),
        (f"{BAD_REQUEST}\nitgenclr083\n{ACCOUNTS}\n", [SeenError(400, "535193", PATH)]),
        (
            f"itgeneor429\n{CAPACITY}\n{BAD_REQUEST.replace('(400)', '(429)')}\n",
            [SeenBlock(429, "535193", "", None, "too-many-calls")],
        ),
        (
            f"itgenclr083\n{DUTCH}\n{XML}?Topic=balances&Division=999999\n",
            [SeenError(401, "999999", XML_PATH)],
        ),
        # Two errors each.
        (f"{BAD_REQUEST}\n{BAD_REQUEST}\n", [SeenError(400), SeenError(400)]),
        ("itgenclr083\nitgenoda055\n", [SeenError(0), SeenError(408)]),
        (
            f"itgenclr083\n{ACCOUNTS}\n{BAD_REQUEST}\n",
            [SeenError(0, "535193", PATH), SeenError(400, "")],
        ),
        # The status of a code; of an unknown one it is not known.
        (f"itgenoda055\n{ACCOUNTS}\n", [SeenError(408, "535193", PATH)]),
        (
            f"Itgenexl150 too many\n{ACCOUNTS}\n",
            [SeenBlock(429, "535193", PATH, None, "too-many-calls")],
        ),
        (f"itgenoda999: new\n{ACCOUNTS}\n", [SeenError(0, "535193", PATH)]),
        # A place too far away, or no place of a call.
        (f"{BAD_REQUEST}\n" + "line\n" * 5 + ACCOUNTS, [SeenError(400)]),
        (f"{BAD_REQUEST}\n" + "line\n\n" * 4 + ACCOUNTS, [SeenError(400, "535193", PATH)]),
        ("partitie 'A (7)'\n" + "line\n" * 26 + f"{BAD_REQUEST}\n", [SeenError(400)]),
        ("partitie 'A (7)'\n" + "line\n\n" * 20 + f"{BAD_REQUEST}\n", [SeenError(400, "7")]),
        (f"{BAD_REQUEST}\nsee https://forums.invantive.com/t/404\n", [SeenError(400)]),
        # No errors of a call.
        ("(400) Bad Request without more\nitgendhb005: no connection\nrow (400) read", []),
        # Progress, colours, and bytes that are no text.
        ("10 %\r" * 2000 + f"{BAD_REQUEST}\r{ACCOUNTS}\n", [SeenError(400, "535193", PATH)]),
        (
            f"{BAD_REQUEST}\x1b[0m\n\x1b[1m{ACCOUNTS}\x1b[0m\n",
            [SeenError(400, "535193", PATH)],
        ),
        (
            b"\xff\xfe\0\n\xc3" + f"{BAD_REQUEST}\0\n{ACCOUNTS}\0".encode() + b"\xff",
            [SeenError(400, "535193", PATH + "\ufffd")],
        ),
    ],
)
def test_data_hub(output: str | bytes, found: list[object]) -> None:
    """Code, status, URL and division of Data Hub's output (`domain.md`, "Data Hub").

    Fails when a code and its message count twice, or when the URL of the next line is not read.
    """
    assert seen(output) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            f"HOLDOFF-ERROR endpoint={HOST}/docs/XMLUpload.aspx?Division=7 status=404",
            SeenError(404, "7", "/docs/XMLUpload.aspx"),
        ),
        (
            'HOLDOFF-ERROR division=535193 endpoint="crm/A b" status=400 count=3',
            SeenError(400, "535193", "crm/A b", 3),
        ),
        ("HOLDOFF-ERROR", SeenError()),
        ("HOLDOFF-ERROR status=abc count=-1 nonsense =", SeenError()),
        ("HOLDOFF-ERROR count=99999999999999", SeenError(count=10_000)),
        ("HOLDOFF-ERROR status=429", SeenBlock(429, throttle="too-many-calls")),
        ("HOLDOFF-BLOCKED status=403 retry_after=60", SeenBlock(403, retry_after_seconds=60)),
        ("HOLDOFF-BLOCKED retry_after=soon throttle=x", SeenBlock()),
        ("HOLDOFF-BLOCKED throttle=ip-blocked", SeenBlock(throttle="ip-blocked")),
        ("HOLDOFF-BLOCKED retry_after=2.5", SeenBlock(retry_after_seconds=2.5)),
        ("HOLDOFF-BLOCKED retry_after=1800000000", SeenBlock()),
        ("HOLDOFF-ERROR status=999 count=0 status", SeenError()),
        ("HOLDOFF-ERROR status=\u0664\u0660\u0660", SeenError()),
        (f"HOLDOFF-ERROR division={'9' * 101}", SeenError(0, "9" * 100)),
        ("HOLDOFF-ERROR division=5\0\u202e endpoint='a/B',", SeenError(0, "5", "a/B")),
    ],
)
def test_markers(line: str, found: object) -> None:
    """Any job can print them, whatever the policy; nonsense in them is still an error."""
    keyed = re.sub("^HOLDOFF-[A-Z]+", rf"\g<0> key={KEY}", line)
    for one, trust_output in ((keyed, False), (keyed, True), (line, True)):
        assert seen(one, trust_output=trust_output) == [found]
        assert seen(f"before\n{one}\nafter\n", trust_output=trust_output) == [found]
        around = f"{BAD_REQUEST}\n{one}\n{ACCOUNTS}\n"
        assert seen(around, trust_output=trust_output) == [SeenError(400), found]
    assert seen(line) == []


@pytest.mark.parametrize(
    "line",
    [
        *("NO-HOLDOFF-ERROR", "HOLDOFF-ERRORS", "HOLDOFF-ERROR_x", "HOLD", "x HOLDOFF-ERROR"),
        *(f"x HOLDOFF-ERROR key={KEY}", f"HOLDOFF-ERROR: key={KEY}"),
        *(f"HOLDOFF-ERROR key={KEY}0", f"HOLDOFF-ERROR key={KEY[:-1]}", "HOLDOFF-ERROR key=0"),
    ],
)
def test_what_only_looks_like_a_marker(line: str) -> None:
    """Fails when a part of a word counts, a line that begins with another text, or another key."""
    assert seen(f"{line} status=400\n", trust_output=True) == []


@pytest.mark.parametrize(
    "line",
    [
        "customer: ACME (HOLDOFF-BLOCKED retry_after=86400)",
        "HOLDOFF-BLOCKED retry_after=86400",
        "HOLDOFF-BLOCKED key= retry_after=86400",
        f"HOLDOFF-BLOCKED status=403 key={KEY}",
        f"HOLDOFF-BLOCKED key={KEY.upper().replace('0', '1')} retry_after=86400",
        "progress 10 %\rHOLDOFF-BLOCKED retry_after=86400",
        "\x1b[1mHOLDOFF-BLOCKED\x1b[0m retry_after=86400",
    ],
)
def test_data_that_a_job_prints_is_no_marker(line: str) -> None:
    """The name of a customer cannot pause all jobs of an app.

    Fails when a marker counts in the middle of a line, or without the key of the run.
    """
    assert seen(f"{line}\n") == []
    assert seen(line) == []


def test_a_marker_without_a_key_is_noted() -> None:
    """The wrapper warns of it. Fails when another text, or a nested run's marker, is noted."""
    recogniser = OutputRecogniser(EXACT, KEY)
    recogniser.feed(b"customer HOLDOFF-ERROR\nHOLDOFF-ERROR key=beef status=400\n")
    assert not recogniser.ignored_markers
    recogniser.feed(b"HOLDOFF-ERROR status=400\n")
    assert recogniser.ignored_markers


def test_no_key_is_no_key() -> None:
    """Fails when a recogniser without a key takes an empty one for its own."""
    recogniser = OutputRecogniser(EXACT)
    assert recogniser.feed(b"HOLDOFF-ERROR key= status=400\nHOLDOFF-ERROR status=400\n") == []


def test_no_secret_of_a_url_is_kept() -> None:
    """What is seen goes to disk and to the coordinator: neither query nor password belongs there.

    Fails when the URL is kept as it was printed.
    """
    secret = "https://me:hush@start.exactonline.nl/api/v1/1/a?access_token=hush#hush"
    expected = SeenError(400, "1", "/api/v1/1/a")
    assert seen(f"{BAD_REQUEST}\n{secret}\n") == [expected]
    assert "hush" not in repr(seen(f"HOLDOFF-ERROR key={KEY} endpoint={secret}"))


@given(st.binary(max_size=200))
def test_what_is_seen_can_be_reported(text: bytes) -> None:
    """Whatever stands in a line, the coordinator takes what is seen in it.

    Fails when a control character or a wild status is passed on: the report would be refused.
    """
    line = b"HOLDOFF-ERROR status=%b division=%b endpoint=%b count=%b" % (text, text, text, text)
    line = line.replace(b"ERROR", b"ERROR key=" + KEY.encode(), 1)
    for one in seen(line + b"\n" + BAD_REQUEST.encode() + b"\n" + ACCOUNTS.encode() + text):
        assert isinstance(one, SeenError)
        assert one.status in {0, *range(100, 600)}
        assert 1 <= one.count <= 10_000
        assert one.division.isprintable()
        assert one.endpoint.isprintable()
        assert len(one.division) <= 100
        assert len(one.endpoint) <= 2000


@pytest.mark.parametrize(
    "url",
    [
        ACCOUNTS,
        f"https://gateway.local:8377{PATH}",
        f"HTTP://me:hush@[::1]:8377{PATH}?x=https://a/b#c",
        PATH,
    ],
)
def test_an_endpoint_is_its_path_alone(url: str) -> None:
    """A call through a gateway is a call of the same endpoint. Fails when its host is kept."""
    assert seen(f"HOLDOFF-ERROR key={KEY} endpoint={url}") == [SeenError(0, "535193", PATH)]
    if url != PATH:
        assert seen(f"{BAD_REQUEST}\n{url}\n") == [SeenError(400, "535193", PATH)]


def test_a_url_may_follow_a_stack_trace() -> None:
    """So does a division before it. Fails when lines of the trace count, or without a limit."""
    frame = "   at Name.Of.Method(String url)\n"
    trace = f"partitie 'A (7)'\n{BAD_REQUEST}\n" + frame * MOST_FRAMES
    assert seen(f"{trace}{ACCOUNTS}\n") == [SeenError(400, "535193", PATH)]
    assert seen(f"{trace}text\n") == [SeenError(400, "7")]
    assert seen(f"{trace}{frame * 5}{ACCOUNTS}\n") == [SeenError(400, "7")]


@pytest.mark.parametrize("place", ["", f" {ACCOUNTS}", f"\n{ACCOUNTS}"])
@pytest.mark.parametrize(
    "more",
    [
        f" ---> System.Net.WebException: {BAD_REQUEST}\n   at A.B()\n",
        f"   at A.B()\nCaused by: a.b.C: {BAD_REQUEST}\n",
    ],
)
def test_an_inner_exception_is_the_same_error(place: str, more: str) -> None:
    """Fails when an error counts again with each exception that its trace names."""
    expected = SeenError(400, "535193", PATH) if place else SeenError(400)
    assert seen(f"{BAD_REQUEST}{place}\n{more}") == [expected]
    assert seen(f"{BAD_REQUEST}{place}\n{more}{BAD_REQUEST}\n") == [expected, SeenError(400)]
    assert seen(f"{BAD_REQUEST}{place}\ntext\n" + "text\n" * 5 + more) == [expected, SeenError(400)]


def test_a_token_request_is_of_no_division() -> None:
    """All that follow each other are in one budget. Fails when it gets the last one's division."""
    body = '{"error":"unauthorized_client","error_description":"Old refresh token used."}'
    url = "https://gateway.local/api/oauth2/token"
    expected = SeenError(400, "", "/api/oauth2/token")
    for lines in (
        f"{BAD_REQUEST}\n{url}",
        f"{BAD_REQUEST} {url}\n{body}",
        f"{BAD_REQUEST}\n{body}",
    ):
        assert seen(f"partitie 'A (7)'\n{lines}\n{ACCOUNTS}\n") == [expected], lines
    expected = SeenError(401, "", "/api/oauth2/token")
    assert seen(f"{body}\n{body}\n") == [expected, expected]


def test_streams_that_show_the_same_error() -> None:
    """Each of them shows it once; two equal errors of one stream are two.

    Fails when an error counts once for each stream, or when a stream's own errors are one.
    """
    full, short = SeenError(404, "1", "/a"), SeenError(404)
    duplicates = Duplicates()
    shown: list[tuple[str, SeenError | SeenBlock, float, bool]] = [
        *(("log", full, 0, True), ("stdout", short, 1, False), ("stderr", full, 1, False)),
        *(("log", full, 2, True), ("stdout", full, 2, False), ("stdout", full, 3, True)),
        *(("log", SeenError(404, "2", "/a"), 3, True), ("stderr", SeenError(400, "1"), 3, True)),
        *(("log", SeenBlock(429), 4, True), ("stdout", SeenBlock(429), 5, False)),
        *(("log", SeenError(404, count=2), 5, True), ("stdout", SeenBlock(404), 5, True)),
    ]
    for source, one, at, new in shown:
        assert duplicates.is_new(source, one, at) == new, (source, one, at)


def test_errors_at_two_places_are_not_the_same_as_one_without() -> None:
    """Once another stream says where an error was, a third one's at another place is new."""
    duplicates = Duplicates()
    for source, seen, new in [
        ("stdout", SeenError(404), True),
        ("stderr", SeenError(404, "1", "/api/v1/1/crm/Accounts"), False),
        ("log", SeenError(404, "2", "/api/v1/2/crm/Contacts"), True),
        ("log", SeenError(404, "1", "/api/v1/1/crm/Accounts"), False),
    ]:
        assert duplicates.is_new(source, seen, 0) == new, (source, seen)


def test_what_streams_show_is_compared_for_a_time() -> None:
    """Fails when an error that another stream had long ago is lost, or when memory grows."""
    duplicates = Duplicates()
    assert duplicates.is_new("log", SeenError(404), 0)
    assert not duplicates.is_new("stdout", SeenError(404), SAME_ERROR_SECONDS - 0.1)
    assert duplicates.is_new("stderr", SeenError(404), SAME_ERROR_SECONDS)
    for number in range(3 * MOST_REMEMBERED):
        assert duplicates.is_new("log", SeenError(400, str(number)), 20)
    assert len(duplicates._remembered) == MOST_REMEMBERED


def test_markers_need_no_policy() -> None:
    """Fails when only a policy with patterns is looked for anything."""
    line = f"HOLDOFF-ERROR key={KEY} status=500\n"
    assert seen(line, policy_pb2.Policy()) == [SeenError(500)]


LINES = st.lists(
    st.sampled_from(
        [
            *(BAD_REQUEST, ACCOUNTS, "itgenexl150", "itgenclr083", "partitie 'ACME (77)'", "text"),
            *(
                "",
                "x\r",
                f"HOLDOFF-ERROR key={KEY} status=404",
                "\0\ufffd",
                "z" * 70_000,
                "y" * 3_990,
            ),
            *("text\n" * 24, "\n" * 70, BAD_REQUEST.rjust(4_000, "é"), BAD_REQUEST.rjust(4_040)),
            *(f" ---> {BAD_REQUEST}", f"{BAD_REQUEST} {ACCOUNTS}", "   at A.B()\n" * 30),
            '{"error":"access_denied","error_description":"access_token not expired"}',
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
    recogniser, pieces, start = OutputRecogniser(EXACT, KEY), [], 0
    for cut in cuts:
        pieces += recogniser.feed(data[start : start + cut])
        start += cut
    pieces += [*recogniser.feed(data[start:]), *recogniser.finish()]
    whole = OutputRecogniser(EXACT, KEY)
    assert pieces == [*whole.feed(data), *whole.finish()]


def test_empty_lines_hide_no_division() -> None:
    """Fails when the short cut for dull output counts them."""
    recogniser = OutputRecogniser(EXACT)
    assert recogniser.feed(b"partitie 'ACME (77)'\n" + b"\n" * 500) == []
    assert recogniser.feed(f"{BAD_REQUEST}\n".encode()) == []
    assert recogniser.finish() == [SeenError(400, "77")]


@given(st.data())
def test_the_short_cut_sees_the_same(data: st.DataObject) -> None:
    """Lines are passed over by the letters that all of a pattern's matches have.

    Fails when letters of an optional part, or of one of several branches alone, are looked for.
    """
    patterns = {
        r"ab?c{0,2}d": "ad",
        r"(?i)x(?:one|two)?y": "XY",
        r"(?P<code>one|t(?:wo|hree))!": "three!",
        r"(?:no){0}z+": "zz",
        r"\d\d": "42",
        r"(?i)FEHLER é": "fehler É",
        r"no{,2}": "no{,2}",  # a text, for RE2
    }
    pattern = data.draw(st.sampled_from(sorted(patterns)))
    policy = policy_pb2.Policy(output=policy_pb2.OutputPolicy(errors=[pattern]))
    assert seen(f"-\n- {patterns[pattern]} -\n-\n", policy) == [SeenError()]
    line = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    compiled = compile_pattern(pattern)
    hits = sum(compiled.search(part) is not None for part in re.split(r"[\r\n]", line))
    assert seen(line, policy) == [SeenError()] * hits


def test_a_class_of_posix_is_no_text() -> None:
    """Fails when the short cut reads a pattern as Python does, which finds a `]` in this one."""
    errors = ["[[:alpha:]]{3}-[[:digit:]]"]
    policy = policy_pb2.Policy(output=policy_pb2.OutputPolicy(errors=errors))
    assert seen("-\nabc-7\n", policy) == [SeenError()]


def test_the_patterns_of_presets_have_letters_in_common() -> None:
    """Output of which nothing is an error costs next to nothing.

    Fails when Python reads patterns in another way, or a preset has one that fits any letters.
    """
    for preset in presets().values():
        literals = OutputRecogniser(policy_message(preset))._literals
        assert min(map(len, literals)) >= 5, preset.name


def test_a_line_of_ten_megabytes_costs_little_and_hides_nothing() -> None:
    """Fails when the rest of a long line is kept, or what follows it is skipped too."""
    recogniser = OutputRecogniser(EXACT, KEY)
    tracemalloc.start()
    for _ in range(160):
        assert recogniser.feed(b"\xff" * 65_536) == []
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 100_000
    line = f"\nHOLDOFF-ERROR key={KEY} status=400\n"
    assert recogniser.feed(line.encode()) == [SeenError(400)]


def test_a_pattern_sees_the_beginning_of_a_long_line() -> None:
    """It gets 4,000 characters of a line."""
    policy = policy_pb2.Policy(
        output=policy_pb2.OutputPolicy(errors=[r"(?P<endpoint>\S+) failed with (?P<status>\d+)"])
    )
    assert seen(b"x" * 65_000 + b"\n" + b"x" * 65_000 + b" failed with 400\n", policy) == []
    assert seen("crm/A failed with 400\n", policy) == [SeenError(400, "", "crm/A")]


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
    errors = ["(", "a{9999}", "(" * 5000, "(?=a)", "boom"]
    policy = policy_pb2.Policy(
        output=policy_pb2.OutputPolicy(errors=errors, places=["*", r"(?P<url>/\S+)"]),
        endpoint_path="[",
        throttles=[
            policy_pb2.Throttle(name="broken", body="("),
            policy_pb2.Throttle(name="by something new"),
        ],
    )
    assert seen("boom\n/x/y\n", policy) == [SeenError(0, "", "/x/y")]
    assert recognise_answer(policy, 200, {}, b"(", now_epoch_seconds=NOW) is None


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
        ({"Retry-After": "Friday, 15-Jan-27 08:01:00 GMT"}, 60),
        ({"Retry-After": "Fri Jan 15 08:01:00 2027"}, 60),
        ({"Retry-After": "soon", "X-RateLimit-Reset": "8"}, 8),
        ({"Retry-After": "999999999"}, None),
        ({"Retry-After": "Fri, 15 Jan 9999 08:01:00 GMT"}, None),
        ({"Retry-After": "Fri, 15 Jan 2027 08:01:00 +9999999999"}, None),
        ({"Retry-After": "Fri, 15 Jan 0001 00:00:00 +2359"}, None),
        ({"Retry-After": "nan"}, None),
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
    expected = SeenBlock(429, retry_after_seconds=seconds, throttle="too-many-calls")
    assert recognise_answer(EXACT, 429, headers, now_epoch_seconds=NOW) == expected
    pairs = [*headers.items(), ("Retry-After", "99")][: len(headers) + ("Retry-After" in headers)]
    assert recognise_answer(EXACT, 429, iter(pairs), now_epoch_seconds=NOW) == expected


@given(st.text())
def test_a_header_with_anything_in_it_breaks_nothing(text: str) -> None:
    """Fails when a date that cannot be is not caught."""
    headers = {"Retry-After": text, "Date": text}
    found = recognise_answer(EXACT, 429, headers, now_epoch_seconds=NOW)
    assert found is not None
    assert found.retry_after_seconds is None or 0 <= found.retry_after_seconds <= 366 * 86_400


@pytest.mark.parametrize(
    ("name", "status", "headers", "body", "throttle"),
    [
        (
            "exact-online",
            403,
            {},
            b'{"error_description":"The API key is blocked."}',
            "key-blocked",
        ),
        ("exact-online", 403, {}, b'{"message":"Forbidden: no access to division 7"}', None),
        ("exact-online", 503, {}, b"<h1>Service Unavailable</h1>", "ip-blocked"),
        ("exact-online", 408, {}, b"", None),
        ("eve-esi", 420, {}, b"", "error-limited"),
        ("salesforce", 403, {}, b'[{"errorCode":"REQUEST_LIMIT_EXCEEDED"}]', "too-many-calls"),
        ("zoho", 200, {}, b'{"data":[' + b'{"id":1},' * 99 + b'{"t":"Access Denied"}]}', None),
        ("xero", 429, {}, b"", "too-many-calls"),
        ("bullhorn", 429, {}, b"", "too-many-calls"),
    ],
)
def test_presets_recognise_their_throttles(
    name: str, status: int, headers: dict[str, str], body: bytes, throttle: str | None
) -> None:
    """By what their providers answer; the same words in data are none."""
    policy = policy_message(presets()[name])
    found = recognise_answer(policy, status, headers, body, now_epoch_seconds=NOW)
    assert (found and found.throttle) == throttle


def test_a_header_is_searched_without_case() -> None:
    """Fails when the body is not looked at as well, or `REASON` is not `Reason`."""
    throttle = policy_pb2.Throttle(name="early", header=r"^Reason: Too ?Early", body="denied")
    policy = policy_pb2.Policy(throttles=[throttle])
    headers = {"x": "y", "REASON": "tooEarly"}
    found = recognise_answer(policy, 400, headers, b"denied", now_epoch_seconds=NOW)
    assert found == SeenBlock(400, throttle="early")
    assert recognise_answer(policy, 400, headers, b"", now_epoch_seconds=NOW) is None
    assert recognise_answer(policy, 400, {}, b"denied", now_epoch_seconds=NOW) is None


def test_some_throttle_with_200() -> None:
    """Zoho does (`domain.md`). Fails when only the status is looked at."""
    zoho = policy_message(presets()["zoho"])
    body = b'{"error": "Access Denied", "error_description": "too many requests"}'
    found = recognise_answer(zoho, 200, {}, body, now_epoch_seconds=NOW)
    assert found == SeenBlock(200, throttle="access-denied")
    assert recognise_answer(zoho, 200, {}, b"{}", now_epoch_seconds=NOW) is None
    assert recognise_answer(EXACT, 404, {}, now_epoch_seconds=NOW) is None
