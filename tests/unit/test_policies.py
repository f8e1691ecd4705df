"""Policy files: what they say, how a call is placed, and errors that point at the line."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff.policies import PolicyError, normal_endpoint, presets, read_policy

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
    ("right", "wrong", "line", "says"),
    [
        ("most = 10 ", "most = 0 ", 21, "limit[0].most: Expected `int` >= 1"),
        ('window = "1d"', 'window = "1x"', 31, "limit[1].window: '1x' is not a duration"),
        ("statuses", "statusses", 24, "unknown field `statusses`"),
        ("[block]", "[blok]", 48, "unknown field `blok`"),
        ('name = "exact-online"', 'name = "Exact"', 3, "name: "),
        ("margin = 2 ", "margin = 10 ", 25, "`margin` must be less than `most`"),
        ("factor = 2", "factor = ", 51, "Invalid value"),
        ('at = "end"', 'at = "END"', 9, "refresh.at: Invalid enum value 'END'"),
        ('interval = "570s"', "interval = 570", 7, "write a duration such as"),
        ('interval = "570s"', "", 6, "missing required field `interval`"),
        ('name = "token-requests"', 'name = "errors"', 1, "same name"),
        ("(?P<endpoint>.+)", "(?P<endpoint>.+", 16, "not a regular expression"),
        ("(?P<endpoint>.+)", ".+", 16, "needs a group"),
        ('["app", "token"]', '["token"]', 32, 'must name "app"'),
        ("statuses = [429] ", "", 55, "fits everything"),
        ('name = "ip-blocked"', 'name = "too-many-calls"', 1, "two throttles have the same name"),
        ("(?P<url>", "(?P<where>", 73, "`places` needs groups"),
        ("(?P<status>", "(?P<number>", 69, "unknown group: 'number'"),
        (r"\((?P<status>", r"((?P<status>", 69, "`errors` is not a regular expression"),
        ("errors = [", "failures = [", 69, "unknown field `failures`"),
        ("itgenexl150 = 429", "itgenexl150 = 1", 78, "Expected `int` >= 100"),
        ("[output]", 'when_quiet = "sleep"\n[output]', 68, "unknown field `when_quiet`"),
    ],
)
def test_mistakes(tmp_path: Path, right: str, wrong: str, line: int, says: str) -> None:
    """A mistake is told with the line it stands in, and what to write."""
    assert right in EXACT
    file = tmp_path / "mine.toml"
    file.write_text(EXACT.replace(right, wrong, 1))
    with pytest.raises(PolicyError) as caught:
        read_policy(file)
    assert str(caught.value).startswith(f"mine.toml:{line}: ")
    assert says in str(caught.value)


def test_hostile_bytes(tmp_path: Path) -> None:
    """A file that is no text is told as such, with the line."""
    file = tmp_path / "mine.toml"
    file.write_bytes(EXACT.encode()[:100] + b"\n\n\xff\xfe")
    with pytest.raises(PolicyError, match=r"mine\.toml:\d+: is not UTF-8"):
        read_policy(file)
