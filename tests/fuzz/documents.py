"""Files that the code reads: policies, access files, keys, seeds of the simulator, spool files.

An input is the content of a file.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from holdoff._spool import MOST_COUNT, Moment, Spool, Waiting
from holdoff.policies import PolicyError, read_policy
from holdoff.simulator import seeds
from holdoff.v1 import budget_pb2
from holdoff_coordinator.access import AccessError, read_access
from holdoff_coordinator.custody.key_files import KeyFileError, read_key
from tests.fuzz.engine import Target, edited, files, spliced
from tests.fuzz.requests import ACCESS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from hypothesis.strategies import SearchStrategy

    from tests.fuzz.engine import Check

PRESETS = [
    one.read_bytes()
    for one in resources("holdoff.policies").iterdir()
    if one.name.endswith(".toml")
]
SEEDS = """
[[seeds]]
client_id = "c"
client_secret = "s"
user = "u"
refresh_token = "r"
divisions = [1, 2]
expired_divisions = [2]
scopes = ["crm.accounts", "sales.orders:read"]
"""
KEY = b"# created: 2026-11-30T12:00:00Z\na2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=\n"
TOML = [
    *(b"'", b'"', b"'''", b'"""', b"[", b"]", b"[[", b"]]", b"{", b"}", b"=", b"#", b"\n", b"\r"),
    *(b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\\", b"\\u0000", b"\\ud800", b"\\q", b".", b","),
    *(b"1e999", b"-1", b"0x7f", b"nan", b"inf", b"1979-05-27T07:32:00Z", b"9" * 30, b"true"),
    *(b"[[[[", b"{a={a={a=", b"'1s'", b"(?P<endpoint>", b"(?P<division>.)", b"(", b")", b"{9999}"),
    *(b"name", b"statuses", b"[output.codes]\n", b"[[limit]]\n", b"[a.b.c]\n", b"a.b.c = 1\n"),
    *(b'like = "zoho"\n', b'like = "exact-online"\n', b'"4xx"', b"[[concurrency]]\n", b"[oauth]\n"),
    *(b"seeds = 5\n", b"[seeds]\n", b"grants = 5\n", b"[grants]\n", b"5", b'"x"', b"[]", b"{}"),
]


def _read_key(path: Path) -> None:
    path.chmod(0o600)
    key = read_key(path)
    assert (key.id, len(key.secret)) == ("file", 32)
    assert key.created.isprintable()


def reader(
    read: Callable[[Path], object], error: type[Exception], says: str
) -> Callable[[], AbstractContextManager[Check]]:
    """Give a check: a file is read, or refused with an error that says where it is wrong."""

    @contextlib.contextmanager
    def opened() -> Iterator[Check]:
        with tempfile.TemporaryDirectory(prefix="holdoff-fuzz-") as name:
            path = Path(name, "file.toml")

            def check(data: bytes) -> None:
                path.write_bytes(data)
                try:
                    read(path)
                except error as refused:
                    text = str(refused)
                    assert re.search(says, text), f"it does not say where: {text[:500]}"
                    assert len(text) < 1000 + 2 * len(data), f"it says too much: {text[:500]}"

            yield check

    return opened


# Spool files -----------------------------------------------------------------------------------

GOOD_ID = "00000000-0000-4000-8000-000000000001"
LAST_ID = "00000000-0000-4000-8000-000000000002"


def _lines(*ids: str) -> bytes:
    """Return the lines of a spool with these events."""
    scope = budget_pb2.Scope(token="apps/a/tokens/t", endpoint="crm/Accounts")
    events = [
        budget_pb2.Event(id=one, kind=budget_pb2.EVENT_KIND_ERROR, scope=scope, status=400)
        for one in ids
    ]
    return b"".join(Waiting(one, Moment("boot", 10**12, 17 * 10**17)).line() for one in events)


JSON = [
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\0", b"\xff", b"\\ud800", b"\\u0000"),
    *(b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"NaN", b"null", b"true", b"{}", b"[" * 50, b'"x"'),
    *(b'"age":"-5s"', b'"age":"999999999999s"', b'"count":-1', b'"status":"x"', b'"kind":99'),
    *(b'{"done":["x"]}\n', b'"boot_ns":-1', b'"event":{}', b'"id":""', b'"id":"x"'),
]


@contextlib.contextmanager
def spools() -> Iterator[Check]:
    """Check files beside a good one: they are read or set aside, and no good line is lost."""
    good, last = _lines(GOOD_ID), _lines(LAST_ID)

    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="holdoff-fuzz-") as name:
            folder = Path(name)
            (folder / "b.jsonl").write_bytes(data + last)
            (folder / "c.jsonl").write_bytes(good)
            said: list[str] = []
            seen = {one.event.id for one, _ in Spool(folder).survey(said.append)}
            left = {}
            for spool in Spool(folder).leftovers(said.append):
                for one in spool.waiting():
                    left[one.event.id] = one
                    assert one.due(Moment.now()).ByteSize() < len(data) + 1000
                    assert one.with_another(one) is None or one.event.count <= MOST_COUNT
                    assert isinstance(one.likeness(), bytes)
                    assert one.line()
                if GOOD_ID in left:
                    spool.done(list(left))
            assert set(left) == seen
            assert {GOOD_ID, LAST_ID} <= seen, f"a good line is lost: {said}"
            assert all(text.isprintable() for text in said), said

    yield check


INTS = [0, 1, 10**12, -1, -(10**30), 2**63, 10**30, 1.5, "1", None]
EVENT: dict[str, list[Any]] = {
    "id": ["a", "b", LAST_ID, "", 5],
    "kind": ["EVENT_KIND_ERROR", "EVENT_KIND_BLOCK", 99, -1, "x"],
    "count": [1, 10_000, 0, -1, 2**32],
    "status": [400, -1, 2**31 - 1, 2**31],
    "age": ["5s", "-1s", "999999999.999999999s", "315576000000s", "1e3s", 5],
    "sent_age": ["5s", "-1s", "1000000001s"],
    "scope": [{"token": "apps/a/tokens/t"}, {"endpoint": "\ud800"}, {}, "x"],
}


def _documents() -> SearchStrategy[bytes]:
    """Draw lines of a spool with any values in their fields."""
    event = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in EVENT.items()})
    written = st.fixed_dictionaries(
        {
            "event": event | st.sampled_from([None, [], "x"]),
            "boot": st.sampled_from(["boot", "", None]),
            "boot_ns": st.sampled_from(INTS),
            "wall_ns": st.sampled_from(INTS),
        }
    )
    done = st.fixed_dictionaries({"done": st.lists(st.sampled_from(EVENT["id"]), max_size=3)})
    return st.lists(written | done, max_size=6).map(
        lambda lines: b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    )


TARGETS = {
    "policies": Target(
        edited(files("policies", *PRESETS) | spliced(*PRESETS, *TOML), TOML),
        reader(read_policy, PolicyError, r"\Afile\.toml:[1-9]\d*: ."),
    ),
    "access": Target(
        edited(files("access", ACCESS.encode()) | spliced(ACCESS.encode(), *TOML), TOML),
        reader(read_access, AccessError, r"/file\.toml:[\s\S]+[:;] write "),
    ),
    "keys": Target(
        edited(
            files("keys", KEY) | spliced(KEY, *TOML), [b"a2tr", b"=", b"# ", b"\n", b"\r", b"\0"]
        ),
        reader(_read_key, KeyFileError, r"\Acannot read /|/file\.toml is not a key, "),
    ),
    "seeds": Target(
        edited(files("seeds", SEEDS.encode()) | spliced(SEEDS.encode(), *TOML), TOML),
        reader(seeds.read, ValueError, "."),
    ),
    "spool": Target(edited(files("spool", _lines("a", "b")) | _documents(), JSON), spools),
}
