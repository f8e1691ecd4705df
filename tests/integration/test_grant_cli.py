"""`holdoff grant` against a real coordinator: what people type, read, and are asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click.testing
import pytest
from click.testing import CliRunner

from holdoff.cli import exits, main
from tests.custodian import CLIENT_SECRET, REFRESH_TOKEN, Custodian, key_directory
from tests.harness import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    from tests.conftest import StartValkey

    Holdoff = Callable[..., Result]


@pytest.fixture(scope="module")
def custodian(
    start_shared_valkey: StartValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Custodian]:
    """Give a coordinator with a key."""
    keys = key_directory(tmp_path_factory.mktemp("keys"), "first")
    with Custodian(start_shared_valkey().url, keys) as one:
        yield one


@pytest.fixture
def holdoff(custodian: Custodian) -> Holdoff:
    """Run commands against it; none prints a secret."""

    def run(*arguments: str, **options: Any) -> Result:
        done = CliRunner().invoke(main, ["--endpoint", custodian.address, *arguments], **options)
        assert "nobody-may-read" not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Give the options for files with both secrets, as an editor leaves them."""
    token, secret = tmp_path / "token", tmp_path / "secret"
    token.write_text(f"{REFRESH_TOKEN}\r\n")
    secret.write_text(f"{CLIENT_SECRET}\n")
    return ["--refresh-token-file", str(token), "--client-secret-file", str(secret)]


def put(token: str, *more: str) -> list[str]:
    """Return the words of a command."""
    return ["grant", "put", token, "--client-id", "ours", "--last-refreshed", "1h", *more]


def test_a_grant_from_files(custodian: Custodian, holdoff: Holdoff, files: list[str]) -> None:
    """It is put, shown, listed and deleted; people read why, programs read JSON."""
    token = custodian.token()
    done = holdoff(*put(token, *files))
    assert done.exit_code == 0, done.stderr
    for line in ("state", "ready", "client id", "ours", "https://identity.xero.com", "first"):
        assert line in done.stdout
    shown = json.loads(holdoff("grant", "show", token, "--output", "json").stdout)
    assert (shown["name"], shown["generation"]) == (f"{token}/grant", "1")
    assert shown["client_authentication"] == "CLIENT_AUTHENTICATION_BASIC"
    app = token.partition("/tokens/")[0]
    heading, row = holdoff("grant", "list", app).stdout.splitlines()
    assert heading.split() == ["TOKEN", "STATE", "UNTIL", "BECAUSE"]
    assert row.split()[:3] == [token, "ready", "-"]
    listed = json.loads(holdoff("grant", "list", app, "--output", "json").stdout)
    assert listed == {"grants": [shown]}
    assert holdoff("grant", "delete", token).exit_code == 0
    assert holdoff("grant", "show", token).exit_code == exits.REFUSED
    assert holdoff("grant", "list", app).stderr == f"no grants of {app} in custody\n"


def test_a_secret_from_the_standard_input(
    custodian: Custodian, holdoff: Holdoff, files: list[str]
) -> None:
    """Fails when its line end is taken for a part of it."""
    token = custodian.token()
    done = holdoff(*put(token, *files[2:]), input=f"{REFRESH_TOKEN}-from-stdin\n")
    assert done.exit_code == 0, done.stderr
    both = ["--client-secret-file", "-"]
    done = holdoff(*put(token, *both))
    assert (done.exit_code, "only one secret" in done.stderr) == (exits.USAGE, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read the refresh token"), (b"nobody-may-read-\xff", "printable ASCII")],
)
def test_a_file_without_a_secret(
    custodian: Custodian,
    holdoff: Holdoff,
    tmp_path: Path,
    content: bytes | None,
    words: str,
) -> None:
    """The error names the file and not what is in it."""
    path = tmp_path / "token"
    if content:
        path.write_bytes(content)
    done = holdoff(*put("apps/a/tokens/t", "--refresh-token-file", str(path)))
    assert done.exit_code == exits.USAGE
    assert words in done.stderr
    assert str(path) in done.stderr
    assert custodian.list("apps/a") == [[]]


def test_errors_say_what_to_do(
    custodian: Custodian, holdoff: Holdoff, files: list[str], start_valkey: StartValkey
) -> None:
    """Each refusal has an exit code that a script can tell, and a remedy."""
    token = custodian.token()
    assert holdoff(*put(token, *files)).exit_code == 0
    done = holdoff(*put(token, *files))
    assert (done.exit_code, "--replace" in done.stderr) == (exits.REFUSED, True)
    assert f"holdoff grant show {token}" in done.stderr
    assert holdoff(*put(token, *files, "--replace")).exit_code == 0
    both = holdoff(*put(token, *files, "--replace", "--etag", "x"))
    assert both.exit_code == exits.USAGE
    custodian.delete(token)
    leased = custodian.token()
    custodian.hold(leased)
    done = holdoff(*put(leased, *files))
    assert done.exit_code == exits.NOT_GRANTED
    assert f"holdoff watch {leased}" in done.stderr
    exact = custodian.token("exact-online")
    done = holdoff(*put(exact, *files))
    assert (done.exit_code, "start.exactonline.nl" in done.stderr) == (exits.USAGE, True)
    with Replica(start_valkey().url) as plain:
        name = plain.create_token()
        done = CliRunner().invoke(main, ["--endpoint", plain.address, *put(name, *files)])
    assert done.exit_code == exits.REFUSED, done.stderr


def test_secrets_are_not_sent_over_a_network_without_tls(files: list[str]) -> None:
    """Fails when a coordinator elsewhere is asked before that is checked."""
    words = put("apps/a/tokens/t", *files)
    done = CliRunner().invoke(main, ["--endpoint", "192.0.2.1:50051", *words])
    assert (done.exit_code, "HOLDOFF_CA_FILE" in done.stderr) == (exits.USAGE, True)


@pytest.mark.parametrize("deleted", [True, False])
def test_a_deletion_asks_on_a_terminal(
    custodian: Custodian,
    holdoff: Holdoff,
    monkeypatch: pytest.MonkeyPatch,
    *,
    deleted: bool,
) -> None:
    """It shows what is lost; a script is not asked."""
    token = custodian.token()
    custodian.put(token)
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    done = holdoff("grant", "delete", token, input="y\n" if deleted else "n\n")
    assert "a person must authorize again" in done.stderr
    assert done.exit_code == (0 if deleted else exits.DECLINED)
    assert bool(custodian.list(token.partition("/tokens/")[0])[0]) is not deleted


@pytest.mark.parametrize("trusted", [True, False])
def test_trust_asks_on_a_terminal(
    custodian: Custodian,
    holdoff: Holdoff,
    monkeypatch: pytest.MonkeyPatch,
    *,
    trusted: bool,
) -> None:
    """It says what may happen; another etag than that of the grant changes nothing."""
    token = custodian.token()
    custodian.put(token)
    wrong = holdoff("grant", "trust", token, "--etag", f"{'0' * 32}.1")
    assert (wrong.exit_code, "with this etag" in wrong.stderr) == (exits.REFUSED, True)
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    done = holdoff("grant", "trust", token, input="y\n" if trusted else "n\n")
    assert "may revoke" in done.stderr
    assert done.exit_code == (0 if trusted else exits.DECLINED)


def test_keys_are_rotated(custodian: Custodian, holdoff: Holdoff) -> None:
    """People read a table and what was left out, programs JSON; a key that none has is refused."""
    custodian.put(custodian.token())
    done = holdoff("grant", "rotate-keys", "--dry-run")
    heading, row = done.stdout.splitlines()
    assert heading.split() == ["KEY", "GRANTS", "ENCRYPTS"]
    key, count, encrypts = row.split()
    assert (key, encrypts, int(count) > 0) == ("first", "yes", True)
    done = holdoff("grant", "rotate-keys", "--key", "first", "--output", "json")
    found = json.loads(done.stdout)
    assert (found["primary_key_id"], found["resealed_count"]) == ("first", 0)
    assert found["key_uses"] == [{"key_id": "first", "grant_count": int(count)}]
    done = holdoff("grant", "rotate-keys", "--key", "second")
    assert (done.exit_code, "'second'" in done.stderr) == (exits.REFUSED, True)
