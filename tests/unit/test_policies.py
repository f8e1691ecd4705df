"""Policy files: what they say, and errors that point at the line."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec
import pytest

from holdoff._places import find_place
from holdoff.policies import (
    Block,
    PolicyError,
    Seconds,
    Throttle,
    presets,
    read_policy,
)
from holdoff.policies.writing import status_words
from holdoff.v1 import policy_pb2
from holdoff_coordinator.policies import policy_message, read_policies

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
        ("(?P<endpoint>.*)", "(?P<endpoint>.*", "(?P<endpoint>.*", "not a regular expression"),
        ("(?P<endpoint>.*)", ".*", "|$))?.*", "needs a group"),
        ('"_Division_", ', '"", ', '"", "Division', "endpoint.division_query[0]: Expected `str`"),
        ('["app", "token"]', '["token"]', '["token"]', 'must name "app"'),
        ('name = "exact-', 'when_quiet = "rest"\nname = "exact-', '"rest"', "when_quiet: Invalid"),
        # Refreshes, and where they are made.
        ('rotation = "until-used"', 'rotation = "never"', '"never"', "refresh.rotation: Invalid"),
        (
            'rotation = "until-used"',
            'rotation = "grace"',
            "[refresh]",
            'refresh.grace: `grace` is missing: rotation = "grace" needs it',
        ),
        (
            'rotation = "until-used"',
            'rotation = "grace"\ngrace = "0s"',
            'grace = "0s"',
            "`grace` is missing",
        ),
        (
            'rotation = "until-used"',
            'rotation = "reusable"\ngrace = "1d"',
            'grace = "1d"',
            '`grace` belongs to rotation = "grace" or "until-used"',
        ),
        ('early_margin = "28s"', 'early_margin = "29s"', "early_margin", "must not exceed"),
        ('access_token_life = "600s"', "", "early_margin", "must not exceed"),
        ('idle_life = "30d"', 'idle_life = "0s"', "idle_life", "must be more than 0s: omit it"),
        (
            'idle_life = "30d"',
            'idle_life = "30d"\nabsolute_life = "29d"',
            'idle_life = "30d"',
            "must not be longer than `absolute_life`",
        ),
        (
            '["body", "basic"]',
            '["body", "header"]',
            '["body", "header"]',
            "client_authentication[1]: ",
        ),
        ('["body", "basic"]', "[]", "client_authentication = []", 'needs "basic", "body"'),
        (
            '["body", "basic"]',
            '["body", "body"]',
            '["body", "body"]',
            "must not contain a value twice",
        ),
        (
            "https://start.exactonline.be/",
            "http://start.exactonline.be/",
            "http://start.exactonline.be/",
            "`token_urls[1]` must begin with https://, or with http:// on this machine",
        ),
        ("nl/api/oauth2/token", "nl", "exactonline.nl", "`token_urls[0]` must begin with"),
        ("nl/api/oauth2/token", "nl/a?b=c", "nl/a?b=c", "`token_urls[0]` must begin with"),
        ("//start.exactonline.nl/", "//u:p@a/", "//u:p@a/", "`token_urls[0]` must begin with"),
        ("//start.exactonline.nl/", "//a:0/", "//a:0/", "`token_urls[0]` must begin with"),
        ("//start.exactonline.nl/", "//a:x/", "//a:x/", "`token_urls[0]` must begin with"),
        ("//start.exactonline.nl/", "//[a/", "//[a/", "`token_urls[0]` must begin with"),
        ("//start.exactonline.nl/", "//a b/", "//a b/", "`token_urls[0]` must begin with"),
        ("nl/api/oauth2/token", "nl/" + "a" * 2_000, "nl/aaa", "oauth.token_urls[0]: Expected"),
        (
            '  "start.exactonline.nl",',
            '  "Start/x",',
            '"Start/x"',
            "oauth.hosts[0]: `hosts[0]` must be a host",
        ),
        (
            "[oauth]",
            '[oauth]\nauthorization_scheme = "a b"',
            "authorization_scheme",
            "oauth.authorization_scheme: Expected",
        ),
        (
            "[block]",
            '[[concurrency]]\nname = "c"\nmost = 0\nscope = ["app"]\n[block]',
            "most = 0",
            "concurrency[0].most: Expected `int` >= 1",
        ),
        (
            "[block]",
            '[[concurrency]]\nname = "c"\nmost = 1\nscope = ["token"]\n[block]',
            'scope = ["token"]\n[block]',
            'must name "app"',
        ),
        ("statuses = [400, 401, 403, 404]", "", "[[limit]]", "required with event"),
        ("400, 401, 403", '"4xx", "6xx"', '"4xx", "6xx"', "limit[0].statuses[1]: Invalid"),
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
        ("blocked\\b'", "(?P<seconds>a)'", "(?P<seconds>a)", "`body` has an unknown group"),
        (
            "statuses = [429] ",
            "statuses = [429]\nheader = '(?P<retry_after>a)' ",
            "header = ",
            "`header` has an unknown group: 'retry_after'",
        ),
        ("body = ", "header = '.*'\nbody = ", "header = ", "`header` matches everything"),
        ('"Retry-After",', '"Retry After",', "Retry After", "throttle[0].until[0]: Expected `str`"),
        ('["app", "division"] #', '["division"] #', '["division"] #', 'must name "app"'),
        ('length = "1m" ', 'length = "0s" ', '"0s"', "`length` must be more than 0s"),
        ('name = "ip-blocked"', 'name = "key-blocked"', None, "throttle[2].name: "),
        # Output.
        ("errors = [\n", "failures = [\n", "failures = [", "unknown field `failures`"),
        ("(?P<status>[", "(?P<number>[", "(?P<number>[", "`errors[0]` has an unknown group"),
        ("(?P<code>itgen", "((?P<code>itgen", "((?P<code>", "`errors[3]` is not a regular"),
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


@pytest.mark.parametrize(
    ("rotation", "grace"),
    [
        *((word, "") for word in ("none", "reusable", "until-used", "single-use")),
        ("single-use-revokes", ""),
        ("grace", "10m"),
        ("until-used", "30d"),
    ],
)
def test_rotations(tmp_path: Path, rotation: str, grace: str) -> None:
    """All words of the design are read, and shown by the coordinator as the same words."""
    file = tmp_path / "mine.toml"
    line = f'grace = "{grace}"' if grace else ""
    file.write_text(f'name = "mine"\n[refresh]\ninterval = "0s"\nrotation = "{rotation}"\n{line}\n')
    policy = read_policy(file)
    assert policy.refresh.rotation == rotation
    shown = policy_message(policy).refresh
    word = policy_pb2.Rotation.Name(shown.rotation).removeprefix("ROTATION_")
    assert word.lower().replace("_", "-") == rotation
    assert shown.HasField("grace") == bool(grace)


def test_a_class_of_statuses_is_expanded(tmp_path: Path) -> None:
    """A class of statuses is read as all of its numbers."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\n[refresh]\ninterval = "0s"\n[[limit]]\nname = "e"\nevent = "errors"\n'
        'most = 1\nwindow = "1m"\nscope = ["app"]\nstatuses = [599, "4xx", 404, 302]\n'
    )
    policy = read_policy(file)
    assert policy.limit[0].statuses == (302, *range(400, 500), 599)
    assert status_words(policy.limit[0].statuses) == [302, "4xx", 599]


# Policies like another ---------------------------------------------------------------------------


def test_a_policy_like_a_preset(tmp_path: Path) -> None:
    """It changes single fields, also of one limit, and adds others; the rest is the preset's."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'like = "exact-online"\nname = "mine"\n[refresh]\nmargin = "5s"\nearly_margin = "20s"\n'
        '[[limit]]\nname = "calls-a-minute"\nmost = 300\n'
        '[[throttle]]\nname = "new"\nstatuses = [418]\n'
    )
    exact, mine = presets()["exact-online"], read_policy(file)
    assert (mine.name, mine.title, mine.output) == ("mine", exact.title, exact.output)
    assert [float(mine.refresh.margin), float(mine.refresh.interval)] == [5, 570]
    assert {limit.name: limit.most for limit in mine.limit} == {
        "errors": 10,
        "token-requests": 200,
        "calls-a-minute": 300,
        "calls-a-day": 5000,
    }
    assert [one.name for one in mine.throttle] == ["new", *(one.name for one in exact.throttle)]
    assert presets()["exact-online"] == exact


def test_a_policy_like_a_preset_adds_codes(tmp_path: Path) -> None:
    """It changes single codes and adds others; the rest is the preset's."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'like = "exact-online"\nname = "mine"\n[output.codes]\nnew = 403\nitgenoda494 = 400\n'
    )
    exact = presets()["exact-online"].output
    mine = read_policy(file).output
    assert exact is not None
    assert mine is not None
    assert mine.codes == exact.codes | {"new": 403, "itgenoda494": 400}
    assert mine.errors == exact.errors


def test_a_policy_like_one_that_is_like_another(tmp_path: Path) -> None:
    """A preset may itself be like another."""
    file = tmp_path / "mine.toml"
    file.write_text('like = "exact-online-exempt"\nname = "mine"\n')
    assert read_policy(file) == msgspec.structs.replace(
        presets()["exact-online-exempt"], name="mine"
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('like = "exactonline"', "mine.toml:2: like: `like` must be the name of a preset"),
        ('like = "../policies/zoho"', "mine.toml:2: like: `like` must be the name of a preset"),
        ('like = ["zoho"]', "mine.toml:2: like: `like` must be the name of a preset"),
        ('like = "zoho"\nlimit = 5', "mine.toml:3: limit: Expected `array`"),
        ('like = "zoho"\nlimit = [5]', "mine.toml:3: limit[0]: Expected `object`"),
        ('like = "zoho"\nrefresh = 5', "mine.toml:3: refresh: Expected `object`"),
        (
            'like = "zoho"\n[[limit]]\nname = "token-requests"\nmost = 0',
            "mine.toml:5: limit[0].most: Expected `int` >= 1",
        ),
        (
            'like = "zoho"\n[[limit]]\nname = "other"\nmost = 1',
            "mine.toml:3: limit[0]: Object missing required field `event`",
        ),
        (
            'like = "zoho"\n[[limit]]\nname = ["x"]\nmost = 1',
            "mine.toml:4: limit[0].name: Expected `str`",
        ),
        (
            'like = "zoho"\n[[limit]]\nname = "token-requests"\n[[limit]]\nname = "token-requests"',
            "mine.toml:6: limit[1].name: `limit[1].name`: this name is used twice",
        ),
    ],
)
def test_mistakes_in_a_policy_like_another(tmp_path: Path, line: str, says: str) -> None:
    """Numbers and lines are those of the file itself, not of the preset."""
    file = tmp_path / "mine.toml"
    file.write_text(f'name = "mine"\n{line}\n')
    with pytest.raises(PolicyError) as caught:
        read_policy(file)
    assert str(caught.value).startswith(says), str(caught.value)


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


def test_a_pipe_in_the_directory_is_refused(tmp_path: Path) -> None:
    """Fails when the coordinator opens it: it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "x.toml")
    with pytest.raises(PolicyError, match=r"x\.toml:1: this is not a file"):
        read_policies(tmp_path)
