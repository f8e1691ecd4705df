"""The grants that exist from the start: the default one, many, or those of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from holdoff import _toml
from holdoff.simulator.resources import SCOPES

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seed:
    """One user's grant to an app, known to the provider from the start.

    Seeds with the same `client_id` are users of one app.
    """

    client_id: str = "00000000-0000-4000-8000-000000000570"
    client_secret: str = "simulated-client-secret"  # noqa: S105 -- opens nothing
    user: str = "finance@example.com"
    refresh_token: str = "simulated-refresh-token-0"  # noqa: S105 -- opens nothing
    divisions: tuple[int, ...] = (535193, 535194)
    expired_divisions: tuple[int, ...] = ()
    """Companies whose licence expired: calls of them are answered with 403."""
    scopes: tuple[str, ...] = ()
    """What the app may do, such as `crm.accounts` or `crm.accounts:read`; all if it is empty."""


_MOST_DIVISION = 10**18
_FIELDS = tuple(field.name for field in fields(Seed))
_TEXTS = ("client_id", "client_secret", "user", "refresh_token")
_SCOPES = tuple(scope + rights for scope in SCOPES for rights in ("", ":read"))
# The addresses in what /_simulator/seed tells, so that its answer can be kept as a file.
_IGNORED = frozenset({"auth_url", "token_url", "api_url"})


def many(apps: int, users: int) -> tuple[Seed, ...]:
    """Make a number of apps with a number of users each; the first is the default seed.

    A user grants all apps, each with a refresh token of its own.
    """
    first = Seed()
    return tuple(
        Seed(
            client_id=f"{first.client_id[:-12]}{int(first.client_id[-12:]) + app:012d}",
            client_secret=f"{first.client_secret}-{app}" if app else first.client_secret,
            user=f"user-{user}@example.com" if user else first.user,
            refresh_token=f"simulated-refresh-token-{app * users + user}",
        )
        for app in range(apps)
        for user in range(users)
    )


def read(path: Path) -> tuple[Seed, ...]:
    """Read seeds from a TOML file with `[[seeds]]`, or a JSON file `{"seeds": [{…}]}`.

    Each has a client_id, a client_secret, a user and a refresh_token; divisions,
    expired_divisions and scopes may be left out. A file with the suffix `.toml` is TOML,
    any other JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is wrong; the message says where and how.
    """
    try:
        text = _toml.decode(path.read_bytes())
        document = _toml.read(text) if path.suffix == ".toml" else json.loads(text)
    except _toml.TomlError as error:
        raise ValueError(f"line {error.line}: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

    listed = document.get("seeds") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ValueError("expected a list 'seeds' with one entry at least")
    seeds = tuple(_seed(f"seeds[{n}]", entry) for n, entry in enumerate(listed))

    secrets: dict[str, str] = {}
    grants: dict[tuple[str, str], int] = {}
    tokens: dict[str, int] = {}
    for n, seed in enumerate(seeds):
        if secrets.setdefault(seed.client_id, seed.client_secret) != seed.client_secret:
            raise ValueError(f"seeds[{n}].client_secret: another one than before for this app")
        if (other := grants.setdefault((seed.client_id, seed.user), n)) != n:
            raise ValueError(f"seeds[{n}].user: seeds[{other}] is this user's grant to this app")
        if (other := tokens.setdefault(seed.refresh_token, n)) != n:
            raise ValueError(f"seeds[{n}].refresh_token: the same as that of seeds[{other}]")
    return seeds


def _seed(where: str, entry: object) -> Seed:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected fields, of {', '.join(_FIELDS)}")  # noqa: TRY004
    values = {name: value for name, value in entry.items() if name not in _IGNORED}
    if unknown := sorted(values.keys() - set(_FIELDS)):
        raise ValueError(f"{where}.{unknown[0]}: unknown; the fields are {', '.join(_FIELDS)}")
    divisions = values.pop("divisions", list(Seed().divisions))
    expired = values.pop("expired_divisions", [])
    scopes = values.pop("scopes", [])
    for name in _TEXTS:
        if not (isinstance(values.get(name), str) and values[name]):
            raise ValueError(f"{where}.{name}: expected a text")
    if not divisions or not _are_divisions(divisions):
        raise ValueError(f"{where}.divisions: expected a list of whole numbers")
    if not _are_divisions(expired) or not set(expired) <= set(divisions):
        raise ValueError(f"{where}.expired_divisions: expected a list of some of its divisions")
    if not isinstance(scopes, list) or any(one not in _SCOPES for one in scopes):
        raise ValueError(f"{where}.scopes: expected a list of {', '.join(_SCOPES)}")
    return Seed(
        **values,
        divisions=tuple(divisions),
        expired_divisions=tuple(expired),
        scopes=tuple(scopes),
    )


def _are_divisions(listed: object) -> bool:
    return isinstance(listed, list) and all(
        type(one) is int and 0 <= one < _MOST_DIVISION for one in listed
    )
