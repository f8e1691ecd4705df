"""What the patterns of an access file cover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from holdoff_coordinator.access import AccessError, Grant, Place, Role, read_access, rights_of

if TYPE_CHECKING:
    from pathlib import Path

APP, TOKEN, OTHER = Place("x"), Place("x", "t"), Place("y", "t")


@pytest.mark.parametrize(
    ("resource", "covered"),
    [
        ("*", {APP, TOKEN, OTHER, Place()}),
        ("apps/x", {APP, TOKEN}),
        ("apps/x/tokens/*", {APP, TOKEN}),
        ("apps/x/tokens/?*", {TOKEN}),
        ("apps/x/tokens/t", {TOKEN}),
        ("apps/*/tokens/t", {TOKEN, OTHER}),
    ],
)
def test_what_a_resource_covers(resource: str, covered: set[Place]) -> None:
    """All tokens of an app are the app; fewer of them are not.

    Fails when a pattern covers what the documentation does not say.
    """
    grant = Grant(("credential:a",), Role.ADMIN, (resource,))
    places = {APP, TOKEN, OTHER, Place()}
    assert {place for place in places if grant.covers(place)} == covered


@pytest.mark.parametrize(
    ("pattern", "identity", "granted"),
    [
        ("credential:a", "credential:a", True),
        ("credential:a", "dns:a", False),
        ("credential:a", "email:a", False),
        ("dns:web?.corp", "dns:web1.corp", True),
        ("dns:web?.corp", "uri:web1.corp", False),
        ("uri:spiffe://corp/*", "uri:spiffe://corp/payroll/jobs", True),
        ("uri:urn:team[ab]:*", "uri:urn:team[ab]:x", True),
        ("uri:urn:team[ab]:*", "uri:urn:teama:x", False),
    ],
)
def test_an_identity_has_a_type(pattern: str, identity: str, *, granted: bool) -> None:
    """Fails when a name of one type gains what was granted to the same name of another.

    Only `*` and `?` stand for other characters; brackets do not.
    """
    grant = Grant((pattern,), Role.VIEWER, ("*",))
    assert bool(rights_of(identity, [grant]).grants) is granted


@pytest.mark.parametrize("name", ["a", "*", "anonymous", "cn:a", "*:a", "Credential:a", ":a"])
def test_an_identity_without_a_type_is_refused(tmp_path: Path, name: str) -> None:
    """With its line, and what to write. Fails when it matches nothing without a word."""
    path = tmp_path / "access.toml"
    path.write_text(
        f'# "{name}"\n[[grants]]\nidentities = ["{name}"]\nrole = "viewer"\nresources = ["*"]\n'
    )
    with pytest.raises(AccessError, match=r"access\.toml:3: .* has no type: write \"credential:"):
        read_access(path)


def test_many_asterisks_take_no_time() -> None:
    """Against a long name that nearly fits: an engine that goes back over each never ends.

    Fails with a translation of patterns that is not linear in each asterisk.
    """
    grant = Grant(("credential:" + "*a" * 400 + "b",), Role.VIEWER, ("*",))
    assert not rights_of("credential:" + "a" * 900, [grant]).grants
