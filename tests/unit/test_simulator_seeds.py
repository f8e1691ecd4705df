"""Apps and users of the simulated provider, by number and from a file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from holdoff.simulator import Provider, Seed, seeds
from holdoff.simulator.oauth import TokenForm

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "client_id": "app",
    "client_secret": "s",
    "user": "ann@example.com",
    "refresh_token": "r",
}

TOML = """
[[seeds]]
client_id = "app"
client_secret = "s"
user = "ann@example.com"
refresh_token = "r1"
divisions = [1, 2]
expired_divisions = [2]
scopes = ["crm.accounts", "sales.orders:read"]

[[seeds]]
client_id = "app"
client_secret = "s"
user = "bob@example.com"
refresh_token = "r2"
"""


def test_one_app_with_one_user_is_the_default() -> None:
    """The numbers one and one are what was there without them."""
    assert seeds.many(1, 1) == (Seed(),)


def test_many_apps_and_users_all_work_apart() -> None:
    """Every user of every app gets a token at the same instant, each app with one secret."""
    made = seeds.many(3, 2)
    assert len({(seed.client_id, seed.user) for seed in made}) == 6
    assert len({(seed.client_id, seed.client_secret) for seed in made}) == 3
    provider = Provider(made)
    for seed in made:
        fields = TokenForm("refresh_token", seed.client_id, seed.client_secret, seed.refresh_token)
        assert provider.token(fields, "job/a", 0).status == 200


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    """A file lists seeds in either language, also with the addresses that the simulator adds."""
    toml, as_json = tmp_path / "seeds.toml", tmp_path / "seeds.json"
    toml.write_text(TOML)
    read = seeds.read(toml)
    assert [(seed.user, seed.divisions) for seed in read] == [
        ("ann@example.com", (1, 2)),
        ("bob@example.com", Seed().divisions),
    ]
    listed = [{**asdict(seed), "token_url": "http://h/t", "api_url": "http://h/a"} for seed in read]
    assert (read[0].expired_divisions, read[0].scopes) == (
        (2,),
        ("crm.accounts", "sales.orders:read"),
    )
    as_json.write_text(json.dumps({"seeds": listed}))
    assert seeds.read(as_json) == read


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ([], "expected a list 'seeds' with one entry at least"),
        ("app", "expected a list 'seeds'"),
        (["app"], "seeds[0]: expected fields, of client_id"),
        ([GOOD, {**GOOD, "user": 7}], "seeds[1].user: expected a text"),
        ([{**GOOD, "client_id": ""}], "seeds[0].client_id: expected a text"),
        ([{**GOOD, "divisons": [1]}], "seeds[0].divisons: unknown; the fields are client_id"),
        ([{**GOOD, "divisions": ["1"]}], "seeds[0].divisions: expected a list of whole numbers"),
        ([{**GOOD, "divisions": [10**18]}], "seeds[0].divisions: expected a list of whole numbers"),
        ([{**GOOD, "expired_divisions": [7]}], "expected a list of some of its divisions"),
        ([{**GOOD, "expired_divisions": 7}], "seeds[0].expired_divisions: expected a list"),
        ([{**GOOD, "scopes": ["crm"]}], "seeds[0].scopes: expected a list of crm.accounts, crm."),
        ([{**GOOD, "scopes": "crm.accounts"}], "seeds[0].scopes: expected a list"),
        ([{**GOOD, "divisions": []}], "seeds[0].divisions: expected a list of whole numbers"),
        ([GOOD, GOOD], "seeds[1].user: seeds[0] is this user's grant to this app"),
        ([GOOD, {**GOOD, "user": "b"}], "seeds[1].refresh_token: the same as that of seeds[0]"),
        (
            [GOOD, {**GOOD, "user": "b", "client_secret": "t"}],
            "seeds[1].client_secret: another one than before for this app",
        ),
    ],
)
def test_mistakes_are_pointed_at(tmp_path: Path, listed: object, says: str) -> None:
    """The error names the entry and the field."""
    file = tmp_path / "seeds.json"
    file.write_text(json.dumps({"seeds": listed}))
    with pytest.raises(ValueError, match=re.escape(says)):
        seeds.read(file)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", b'{"seeds": [\n}', "line 2 column 1"),
        ("a.toml", b"[[seeds]]\nuser = \n", "line 2"),
        ("a.toml", b"a = 1\nb = " + b"[" * 100_000, "line 2: nested too deeply"),
        ("a.toml", b"\n\na = " + b"9" * 5000, "line 3: a number is too long"),
        ("a.json", b"\xff", "line 1: is not UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[]", "expected a list 'seeds'"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, name: str, text: bytes, says: str) -> None:
    """The error tells the line, or what was expected."""
    file = tmp_path / name
    file.write_bytes(text)
    with pytest.raises(ValueError, match=says):
        seeds.read(file)
