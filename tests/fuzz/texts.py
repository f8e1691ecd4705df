"""Short texts that everybody sends: names, durations, endpoints, positions, what is shown.

An input is one text.
"""

from __future__ import annotations

import contextlib
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from holdoff._endpoint import Endpoint
from holdoff._places import MOST_ENDPOINT_CHARACTERS, find_place, folded, normal_endpoint
from holdoff._text import described, printable, quoted, to_report, without_secrets
from holdoff.durations import format_duration, parse_duration
from holdoff.names import AppName, BackOffName, BudgetName, LeaseName, TokenName
from holdoff.policies import presets
from holdoff_coordinator import audit, validation
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.resuming import sealed_of
from tests.fuzz.engine import Target, edited, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fuzz.engine import Check

VALID = [
    *(b"apps/exact-nl", b"apps/exact-nl/tokens/finance", b"apps/a/tokens/b/leases/1f6"),
    *(b"apps/a/budgets/errors-x", b"apps/a/backOffs/block-x", b"exact-nl"),
    *(b"570s", b"9.5m", b"1h", b"30d", b"250ms", b"0.5", b"9m32s", b"1d2h", b"1000000000.5s"),
    *(b"coordinator:50051", b"[::1]:50051", b"10.0.0.1:50051,10.0.0.2:50051", b"dns:///a:1"),
    *(b"unix:/run/x", b"ipv6:[::1]:1,[::2]:2", b"dns://1.1.1.1/a:1"),
    *(
        b"https://start.exactonline.nl/api/v1/535193/crm/Accounts(guid'1')?$filter=x",
        b"crm/Accounts",
    ),
    *(b"exact-nl:00000000000000000000000000000000:5,b::1", b"1700000000000-0/holdoff:{a}:audit"),
    *(b"https://user:secret@host/path?token=x#y", "\u00df/\u0130(x)".encode() * 40),
]
WORDS = [
    *(b"/", b":", b",", b"(", b")", b"'", b"''", b"()", b"?", b"#", b"@", b"//", b"%", b".", b"-"),
    *(
        b"0",
        b"9" * 20,
        b"1e9",
        b"inf",
        b"nan",
        b" ",
        b"\n",
        b"\0",
        b"\x1b[2J",
        b"\xff",
        b"\xc3\x9f",
    ),
    *(
        b"apps/",
        b"/tokens/",
        b"A",
        b"x" * 64,
        b"/" * 200,
        b"\xef\xbc\xa1",
        b"\xe2\x80\xae",
        b"[",
        b"]",
    ),
    *(b"ms", b"s", b"d", b"h", b"unix:", b"ipv4:", b"dns:", b"65536", b"fe80::1%eth0"),
]


def _value(read: Callable[[str], Any], text: str) -> Any:
    """Read a text; None if it is refused, which takes a message that can be shown."""
    try:
        return read(text)
    except (ValueError, Failure) as refused:
        says = str(refused)
        assert says, "it does not say why"
        assert says.isprintable(), says
        assert len(says) < 1000, says
        assert getattr(refused, "reason", "INVALID_FIELD") == "INVALID_FIELD"  # noqa: PT017
        return None


def names(text: str) -> None:
    """Check that what is read as a name is written the same."""
    for kind in (AppName, TokenName, LeaseName, BudgetName, BackOffName):
        name = _value(kind.parse, text)
        assert name is None or str(name) == text


def durations(text: str) -> None:
    """Check that a duration is within bounds, and read again when it was written for people."""
    seconds = _value(parse_duration, text)
    if seconds is not None:
        assert 0 <= seconds <= 315_576_000_000
        rounded = abs(parse_duration(format_duration(seconds)) - seconds)
        assert rounded <= Decimal("0.5" if seconds >= 9 else "0.005")


def coordinators(text: str) -> None:
    """Check that the target of an endpoint is an endpoint, and the same one."""
    endpoint = _value(Endpoint.parse, text)
    if endpoint is not None:
        assert Endpoint.parse(endpoint.target()) == endpoint
        assert endpoint.stays_here in (True, False)
        assert endpoint.authority == "" or endpoint.authority in text


def places(text: str) -> None:
    """Check that the normal form of an endpoint is short, printable, and its own normal form."""
    normal = normal_endpoint(text)
    assert len(normal) <= MOST_ENDPOINT_CHARACTERS
    assert normal.isprintable()
    assert normal_endpoint(normal) == normal
    assert folded(normal_endpoint(folded(normal))) == folded(normal)
    for policy in presets().values():
        division, endpoint = policy.place(text)
        assert normal_endpoint(endpoint) == endpoint
        assert len(division) <= validation.MOST_DIVISION_CHARACTERS
    assert find_place("", text)[0] == ""


def positions(text: str) -> None:
    """Check that positions of listings and of watches are read or refused."""
    _value(validation.page_token, text)
    _value(audit._read_page_token, text)
    _value(sealed_of, text)


def shown(text: str) -> None:
    """Check that what is shown is short enough, safe for a terminal, and the same shown twice."""
    assert quoted(text).isascii()
    assert quoted(text).isprintable()
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert len(described(text, 100)) <= 100
    password = re.sub("[/?#]", "", text)
    url = f"https://user:{password}@host/path?{text}"
    assert without_secrets(url) == "https://host/path"
    assert re.fullmatch(r"(?i)https://host/path(\?_?division_?=[0-9]{1,20})?", to_report(url))


@contextlib.contextmanager
def opened() -> Iterator[Check]:
    """Check a text in every way."""
    presets()

    def check(data: bytes) -> None:
        text = data.decode(errors="replace")
        for one in (names, durations, coordinators, places, positions, shown):
            one(text)

    yield check


TARGETS = {"texts": Target(edited(files("texts", *VALID), WORDS), opened)}
