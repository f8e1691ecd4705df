"""Policy files: what they say, how a call is placed, and errors that point at the line."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff._places import find_place, normal_endpoint
from holdoff.policies import (
    Block,
    PolicyError,
    Seconds,
    Throttle,
    presets,
    read_policy,
)

if TYPE_CHECKING:
    from pathlib import Path

EXACT = (files("holdoff.policies") / "exact-online.toml").read_text()


def test_exact_online() -> None:
    """The default preset says what the provider publishes."""
    policy = presets()["exact-online"]
    assert float(policy.refresh.interval) == 570
    assert float(policy.refresh.access_token_life) == 600
    limits = {limit.name: (limit.most, int(limit.window), limit.scope) for limit in policy.limit}
    expected: dict[str, object] = {
        "errors": (10, 3600, ("app", "token", "division", "endpoint")),
        "token-requests": (200, 86_400, ("app", "token")),
        "calls-a-minute": (60, 60, ("app", "division")),
        "calls-a-day": (5000, 86_400, ("app", "division")),
    }
    assert limits == expected
    assert policy.limit[0].statuses == (400, 401, 403, 404)
    assert float(policy.block.first) == 3600
    assert policy.block.factor == 2


def test_presets_of_other_providers() -> None:
    """Every file beside the loader is a policy of that name."""
    names = {entry.name for entry in files("holdoff.policies").iterdir()}
    assert {f"{name}.toml" for name in presets()} == {n for n in names if n.endswith(".toml")}
    assert {"xero", "quickbooks", "zoho", "salesforce", "eve-esi"} < set(presets())


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/api/v1/535193/crm/Accounts", ("535193", "crm/accounts")),
        (
            "https://start.exactonline.nl/api/v1/535193/crm/Accounts(guid'1-2')?$filter=a",
            ("535193", "crm/accounts()"),
        ),
        ("/api/v1/1/a/B(Id=1,Name='x(y''z)')/C/", ("1", "a/b()/c")),
        ("/api/v1/1/read/B?x=/api/v1/2/c", ("1", "read/b")),
        ("crm/Accounts", ("", "crm/accounts")),
        ("", ("", "")),
    ],
)
def test_a_call_is_placed(path: str, place: tuple[str, str]) -> None:
    """One endpoint has one name, however it was called."""
    assert presets()["exact-online"].place(path) == place


@given(st.text())
def test_a_normal_form_stays(text: str) -> None:
    """What has its normal form keeps it, and nothing is too long or breaks."""
    once = normal_endpoint(text)
    assert normal_endpoint(once) == once
    assert len(once) <= 200


@pytest.mark.parametrize(
    ("right", "wrong", "at", "says"),
    [
        ("most = 10 ", "most = 0 ", "most = 0 ", "limit[0].most: Expected `int` >= 1"),
        ('window = "1d"', 'window = "1x"', "1x", "limit[1].window: '1x' is not a duration"),
        ("statuses", "statusses", "statusses", "unknown field `statusses`"),
        ("[block]", "[blok]", "[blok]", "unknown field `blok`"),
        ("[[limit]]", "[[limits]]", "[[limits]]", "unknown field `limits`"),
        ('name = "exact-online"', 'name = "Exact"', '"Exact"', "name: "),
        ("margin = 2 ", "margin = 10 ", "margin = 10 ", "`margin` must be less than `most`"),
        ("factor = 2", "factor = ", "factor = ", "Invalid value"),
        ('at = "end"', 'at = "END"', 'at = "END"', "refresh.at: Invalid enum value 'END'"),
        ('interval = "570s"', "interval = 570", "interval = 570", "write a duration such as"),
        ('interval = "570s"', "", "[refresh]", "missing required field `interval`"),
        (
            'name = "token-requests"',
            'name = "errors"',
            'name = "errors"\nevent = "token_requests"',
            "limit[1].name: `limit[1].name`: this name is used twice",
        ),
        ("(?P<endpoint>.+)", "(?P<endpoint>.+", "(?P<endpoint>.+", "not a regular expression"),
        ("(?P<endpoint>.+)", ".+", "[^/]+)/.+", "needs a group"),
        ('["app", "token"]', '["token"]', '["token"]', 'must name "app"'),
        ('name = "exact-', 'when_quiet = "rest"\nname = "exact-', '"rest"', "when_quiet: Invalid"),
        # Throttles.
        ("statuses = [429] ", "", '[[throttle]]\nname = "too-many', "matches everything"),
        (
            "statuses = [429]",
            "statuses = [429, 42]",
            "429, 42",
            "throttle[0].statuses[1]: Expected",
        ),
        ("statuses = [403] ", "statuses = 403 ", "= 403 ", "throttle[1].statuses: Expected"),
        ("blocked\\b'", "blocked('", "blocked('", "`body` is not a regular expression"),
        ("body = ", "header = '.*'\nbody = ", "header = ", "`header` matches everything"),
        ('"Retry-After",', '"Retry After",', "Retry After", "throttle[0].until[0]: Expected `str`"),
        ('["app", "division"] #', '["division"] #', '["division"] #', 'must name "app"'),
        ('length = "1m" ', 'length = "0s" ', '"0s"', "`length` must be more than 0s"),
        ('name = "ip-blocked"', 'name = "key-blocked"', None, "throttle[2].name: "),
        # Output.
        ("errors = [\n", "failures = [\n", "failures = [", "unknown field `failures`"),
        ("(?P<status>[", "(?P<number>[", "(?P<number>[", "`errors[0]` has an unknown group"),
        ("(?P<code>itgen", "((?P<code>itgen", "((?P<code>", "`errors[2]` is not a regular"),
        (
            "  '(?i)[?&]_?",
            "  'a{9999}', '(?i)[?&]_?",
            "a{999",
            "`places[4]` is not a regular",
        ),
        (
            "  '(?i)[?&]_?",
            "  '%s', '(?i)[?&]_?" % ("(" * 5000),
            "((((",
            "`places[4]` is not a regular",
        ),
        (
            "  '(?i)[?&]_?",
            "  '(?<=q)(?P<url>u)', '(?i)[?&]_?",
            "(?<=q)",
            "invalid perl operator: (?<=; it has no lookahead or lookbehind: match the text around",
        ),
        ("blocked\\b'", "(a)\\1'", "(a)\\1", "it has no backreferences: write out"),
        ("blocked\\b'", "blocked\\Z'", "blocked\\Z", "write \\z for the end of the text"),
        ("blocked\\b'", "(?>a)'", "(?>a)", "so it has no atomic groups"),
        ("blocked\\b'", "a++b'", "a++b", "so it has no possessive repeats"),
        ("  '(?i)[?&]_?", "  '', '(?i)[?&]_?", "  '', ", "`places[4]` matches everything"),
        ("'(?i)(?P<url>", "'(?i)(?P<status>", "(?P<status>https", "`places[0]` needs groups"),
        ("  '(?i)[?&]_?", "  7, '(?i)[?&]_?", "  7, ", "output.places[4]: Expected `str`"),
        (
            'token_path = "/api/oauth2/token"',
            "",
            "[output]",
            "output.token_path: `token_path` is missing: the group",
        ),
        (
            'token_path = "/api',
            'token_path = "api',
            '"api/oauth2',
            "output.token_path: Expected `str`",
        ),
        ("itgenexl150 = 429", "itgenexl150 = 42", "150 = 42", "output.codes.itgenexl150: "),
        ("itgenexl150 = 429", "'itgenexl150' = '429'", "150' = ", "must be an HTTP status"),
        ("itgenexl150 = 429", "'a b' = 429", "[output.codes]", "letters, digits"),
    ],
)
def test_mistakes(tmp_path: Path, right: str, wrong: str, at: str | None, says: str) -> None:
    """A mistake is told with the line it stands in, and what to write.

    Fails when an element of a list is told with the list's line, or the second of two names with
    the file's first.
    """
    assert right in EXACT
    text = EXACT.replace(right, wrong, 1)
    where = text.index(at) if at else text.rindex(wrong)
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(PolicyError) as caught:
        read_policy(file)
    line = text.count("\n", 0, where) + 1
    assert str(caught.value).startswith(f"mine.toml:{line}: "), str(caught.value)
    assert says in str(caught.value)


def test_an_output_without_errors_is_a_mistake(tmp_path: Path) -> None:
    """It would recognise nothing."""
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[refresh]\ninterval = "0s"\n[output]\nerrors = []\n')
    with pytest.raises(PolicyError, match=r"mine\.toml:5: .*`errors` needs a regular"):
        read_policy(file)


def test_what_is_not_given(tmp_path: Path) -> None:
    """The shortest policy has a block, a pause while quiet, and nothing to recognise."""
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[refresh]\ninterval = "0s"\n[[throttle]]\nname="t"\nbody="x"\n')
    policy = read_policy(file)
    assert policy.block == Block(scope=("app",), first=Seconds(60), factor=2, most=Seconds(3600))
    assert (policy.when_quiet, policy.output) == ("pause", None)
    assert policy.throttle == (
        Throttle(name="t", body="x", scope=("app",), until=("Retry-After",)),
    )


@pytest.mark.parametrize("pattern", ["", "(", "(?P<division>a)", "a{9999}", "(?=a)"])
def test_a_pattern_of_another_release_finds_no_division(pattern: str) -> None:
    """Fails when one that does not compile, or lacks a group, raises."""
    assert find_place(pattern, "/B/A(1)?x")[0] in ("", "a")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "{a = " * 100_000, "nested too deeply"),
        ("x = " + "9" * 5_000, "a number is too long"),
        ("longest_ttl = 0x" + "f" * 5_000, "write a duration such as"),
        ("x = 0x" + "f" * 5_000, "unknown field `x`"),
    ],
)
def test_what_the_parser_chokes_on_is_a_mistake(tmp_path: Path, line: str, says: str) -> None:
    """Deep nesting and long numbers are reported with their line. Fails when one of them raises."""
    file = tmp_path / "mine.toml"
    file.write_text(f'name = "mine"\n\n{line}\n[refresh]\ninterval = "0s"\n')
    with pytest.raises(PolicyError) as caught:
        read_policy(file)
    assert str(caught.value).startswith("mine.toml:3: ")
    assert says in str(caught.value)


def test_a_policy_that_is_too_long_is_a_mistake(tmp_path: Path) -> None:
    """Fails when a file is parsed however long it is."""
    file = tmp_path / "mine.toml"
    file.write_text("# " + "x" * 1_000_000)
    with pytest.raises(PolicyError, match=r"mine\.toml:1: is longer than 1000000 characters"):
        read_policy(file)


def test_hostile_bytes(tmp_path: Path) -> None:
    """A file that is no text is told as such, with the line."""
    file = tmp_path / "mine.toml"
    file.write_bytes(EXACT.encode()[:100] + b"\n\n\xff\xfe")
    with pytest.raises(PolicyError, match=r"mine\.toml:\d+: is not UTF-8"):
        read_policy(file)
