"""docs/policies.md and the comments of printed files have every field of a policy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdoff import policies
from holdoff.durations import format_duration
from holdoff.policies import Policy, PolicyError, Seconds, presets, read_policy
from holdoff.policies.writing import FIELDS, write_policy
from holdoff.v1 import policy_pb2
from holdoff_coordinator.policies import policy_message

DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
TABLES: dict[str, type[msgspec.Struct]] = {
    "The policy": Policy,
    "`[refresh]`": policies.Refresh,
    "`[oauth]`": policies.OAuth,
    "`[[refusal]]`": policies.Refusal,
    "`[endpoint]`": policies.Endpoint,
    "`[[limit]]`": policies.Limit,
    "`[[concurrency]]`": policies.Concurrency,
    "`[block]`": policies.Block,
    "`[[throttle]]`": policies.Throttle,
    "`[output]`": policies.Output,
}


def section(heading: str) -> str:
    """Return the text under a heading."""
    return re.split(r"^#+ ", DOCUMENT.split(f"### {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[
        0
    ]


def default(field: msgspec.structs.FieldInfo) -> str:
    """Write the default of a field as the document does."""
    if field.default_factory is not msgspec.NODEFAULT:
        made = field.default_factory()
        return "its defaults" if isinstance(made, msgspec.Struct) else f"`{made}`"
    if field.default is msgspec.NODEFAULT:
        return "required"
    if isinstance(field.default, Seconds):
        return f'`"{format_duration(field.default)}"`'
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`".replace("'", '"')
    return "none" if field.default is None else f"`{field.default!r}`".replace("'", '"')


def words(kind: Any) -> set[str]:
    """Return the words that a field may have, those of literals."""
    inner = get_args(kind)
    return {one for one in inner if isinstance(one, str)}.union(*map(words, inner))


@pytest.mark.parametrize("heading", TABLES)
def test_the_document_has_every_field(heading: str) -> None:
    """In the order of the code, with its default, and all words that it may be.

    Fails when a field is new, renamed or removed, or has another default.
    """
    text, table = section(heading), TABLES[heading]
    rows = {
        name: (kind, shown)
        for name, kind, shown in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    }
    fields = {field.name: field for field in msgspec.structs.fields(table)}
    assert [*rows] == [*fields]
    hints = get_type_hints(table)
    for name, (kind, shown) in rows.items():
        several = {"tables": "none"}.get(kind)
        assert shown == (several or default(fields[name])), name
        if kind not in {"scope", "HTTP statuses"}:
            assert {word for word in words(hints[name]) if f'"{word}"' not in text} == set(), name


def test_a_printed_file_has_a_comment_for_every_field() -> None:
    """Fails when a field is new and `holdoff policy show -o toml` says nothing about it."""
    known = set()
    for heading, table in TABLES.items():
        prefix = heading.strip("`[]")
        within = "" if table is Policy else f"{prefix}."
        known |= {f"{within}{field.name}" for field in msgspec.structs.fields(table)}
    tables = {heading.strip("`[]") for heading in TABLES}
    assert set(FIELDS) == known - tables


def test_the_document_lists_every_preset() -> None:
    """Fails when a preset is missing, or its word for refresh tokens differs."""
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| `([a-z-]+)`", DOCUMENT, re.MULTILINE))
    assert rows == {name: policy.refresh.rotation for name, policy in presets().items()}


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("it's '''three''' \\d '")
@example("'a\\'")
@example('\\s"\x7f\u2028')
def test_any_text_is_read_back(text: str) -> None:
    """A printed file keeps titles and patterns unchanged, and has no control characters.

    Fails when a quote ends it, or a character is not escaped.
    """
    policy = policy_pb2.Policy(title=text, throttles=[policy_pb2.Throttle(body=text)])
    written = write_policy(policy)
    assert all(line.isprintable() for line in written.split("\n"))
    read = tomllib.loads(written)
    assert (read.get("title", ""), read["throttle"][0].get("body", "")) == (text, text)


def test_the_error_in_the_document(tmp_path: Path) -> None:
    """The error that the document shows is that of a printed file with its mistake."""
    file = tmp_path / "my-provider.toml"
    written = write_policy(policy_message(presets()["xero"]))
    file.write_text(written.replace('rotation = "single-use"', 'rotation = "grace"'))
    with pytest.raises(PolicyError) as error:
        read_policy(file)
    assert f"$ holdoff policy check {file.name}\nholdoff: {error.value}\n" in DOCUMENT


def test_the_examples_are_read(tmp_path: Path) -> None:
    """Each example of the document is a policy, or a table of one."""
    examples = re.findall(r"^```toml\n(.+?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    for one in examples:
        file = tmp_path / "mine.toml"
        head = "" if "like" in one else 'name = "mine"\n[refresh]\ninterval = "0s"\n'
        file.write_text(head + one)
        assert read_policy(file)
