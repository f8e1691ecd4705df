"""The cook-book of clients/grpcurl, run against a live coordinator by the real grpcurl.

It keeps three promises to its reader: each command works as it stands, its answer has these
fields and no others, and their values are these. What differs each time is compared by what it
is: a time, or a length of time with a fraction, has to be that of the story to a minute, and `…`
stands for any text. None of them can stand for a field.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdoff.v1 import budget_pb2, budget_service_pb2, lease_pb2
from tests.custodian import Custodian, key_directory
from tests.e2e.service import BIN
from tests.harness import Replica, Waiter, ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.v1 import lease_service_pb2
    from tests.conftest import StartValkey

BOOK = Path(__file__).parents[2] / "clients/grpcurl/README.md"
FINANCE, PAYROLL = "apps/exact-nl/tokens/finance", "apps/exact-nl/tokens/payroll"
TEN_PAST_THREE = datetime(2027, 3, 2, 3, 10, tzinfo=UTC)
"""When the story happens, by the clock of the book."""
ABOUT = timedelta(minutes=1)
"""The telling of the story by a test is quicker than the book's, or slower on a busy machine."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*\n)", re.MULTILINE)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")
_LENGTH = re.compile(r"(\d+\.\d+)s")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A command of the book, and the answer that it shows."""

    line: int
    command: str
    answer: str


def recipes(book: str) -> list[Recipe]:
    """Read all commands; whatever is shown in a block belongs to the command above it."""
    found = []
    blocks = list(_BLOCK.finditer(book))
    assert book.count("```") == 2 * len(blocks), "a block is not closed, or not at the margin"
    for block in blocks:
        line = book.count("\n", 0, block.start(2)) + 1
        language, shown = block.groups()
        before, *parts = _COMMAND.split(shown)
        assert language == "console", f"line {line}: not a `console` block"
        assert not before, f"line {line}: an answer that no command gave"
        for command, answer in zip(parts[::2], parts[1::2], strict=True):
            assert answer.strip(), f"line {line}: no answer below {command}"
            found.append(Recipe(line, command, answer))
            line += command.count("\n") + answer.count("\n")
    return found


def documents(text: str) -> list[Any]:
    """Read the JSON documents of an answer, and each line between them."""
    found: list[Any] = []
    while text := text.strip():
        if text.startswith("{"):
            document, end = json.JSONDecoder().raw_decode(text)
        else:
            end = len(text.split("\n", 1)[0])
            document = " ".join(text[:end].split())
        found.append(document)
        text = text[end:]
    return found


class Comparison:
    """Compares answers with what the book shows, and keeps what stands for each `…`."""

    def __init__(self, began: datetime) -> None:
        self._moved = began - TEN_PAST_THREE
        self._seen: dict[str, str] = {}

    def command(self, text: str, address: str) -> str:
        """Return a command as a reader would type it here and now."""
        text = text.replace("localhost:50051", address)
        for shown, actual in self._seen.items():
            text = text.replace(f'"{shown}"', f'"{actual}"')
        assert "…" not in text, f"no answer above has what is to be filled in: {text}"
        return _TIME.sub(lambda time: (_instant(time[0]) + self._moved).isoformat(), text)

    def differences(self, shown: Any, actual: Any, where: str = "") -> Iterator[str]:
        """Say what is not as the book shows it."""
        if isinstance(shown, dict) and isinstance(actual, dict):
            for field in shown.keys() | actual.keys():
                path = f"{where}.{field}"
                if field not in actual or field not in shown:
                    yield f"{path}: only in {'the book' if field in shown else 'the answer'}"
                else:
                    yield from self.differences(shown[field], actual[field], path)
        elif isinstance(shown, list) and isinstance(actual, list) and len(shown) == len(actual):
            for place, pair in enumerate(zip(shown, actual, strict=True)):
                yield from self.differences(*pair, f"{where}[{place}]")
        elif not (type(shown) is type(actual) and self._agree(shown, actual)):
            yield f"{where}: the book shows {shown!r}, the answer is {actual!r}"

    def _agree(self, shown: Any, actual: Any) -> bool:
        if not isinstance(shown, str):
            return bool(shown == actual)
        if _TIME.fullmatch(shown) and _TIME.fullmatch(actual):
            return abs(_instant(actual) - _instant(shown) - self._moved) < ABOUT
        if (about := _LENGTH.fullmatch(shown)) and (exactly := _LENGTH.fullmatch(actual)):
            return abs(float(about[1]) - float(exactly[1])) < ABOUT.total_seconds()
        if "…" in shown:
            self._seen[shown] = actual
        return bool(re.fullmatch(re.escape(shown).replace("…", "[^…]+"), actual))


def _instant(time: str) -> datetime:
    return datetime.fromisoformat(time)


def _holder(job: str, host: str, pid: int) -> lease_pb2.Holder:
    return lease_pb2.Holder(
        job=job, host=host, pid=pid, user="datahub", client_version="holdoff/0.1.0"
    )


def _ask(
    token: str, holder: lease_pb2.Holder, wait: float | None = None
) -> lease_service_pb2.AcquireLeaseRequest:
    request = ask(token, wait=wait, ttl=300.0)
    request.holder.CopyFrom(holder)
    return request


def _run(
    replica: Replica, token: str, holder: lease_pb2.Holder
) -> tuple[lease_service_pb2.LeaseOffer, datetime]:
    """Start a job; return its lease, and when it began by the store's clock."""
    offer = replica.leases.AcquireLease(_ask(token, holder, wait=0.0)).offer
    lease = replica.renew(offer, command_started=True)
    return offer, lease.accept_time.ToDatetime(UTC)


def _count(replica: Replica, event: budget_pb2.Event) -> None:
    replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))


@pytest.fixture
def story(start_valkey: StartValkey, tmp_path: Path) -> Iterator[tuple[Replica, datetime]]:
    """Give the coordinator of the book, shortly after ten past three, and when that was."""
    nightly = _holder("nightly", "web1", 4711)
    keys = key_directory(tmp_path, "20261130-120000")
    with Custodian(start_valkey().url, keys) as replica:
        replica.create_token(0.0, name=FINANCE)  # so that `nightly` may follow `export` at once
        replica.create_token(None, name=PAYROLL)
        host = "start.exactonline.nl"
        url = f"https://{host}/api/oauth2/token"
        put = {"client_id": "7e3f", "token_url": url, "api_hosts": [host]}
        replica.put(PAYROLL, grant=put, last_refresh_age=None)
        export, began = _run(replica, FINANCE, _holder("export", "web3", 77))
        replica.release(export)
        payslips, _ = _run(replica, PAYROLL, _holder("payslips", "web3", 311))
        _count(
            replica,
            budget_pb2.Event(
                id="b2a1f0c9-5d3e-4f68-8a70-2c9b1e4d6f35",
                kind=budget_pb2.EVENT_KIND_TOKEN_REQUEST,
                scope=budget_pb2.Scope(token=PAYROLL),
            ),
        )
        replica.release(payslips)

        held, _ = _run(replica, FINANCE, nightly)
        _count(
            replica,
            budget_pb2.Event(
                id="7c6d5e4f-1a2b-4c3d-9e8f-0a1b2c3d4e5f",
                kind=budget_pb2.EVENT_KIND_ERROR,
                scope=budget_pb2.Scope(token=FINANCE, division="535193", endpoint="crm/Accounts"),
                status=400,
                count=8,
                holder=nightly,
                lease=held.lease.name,
            ),
        )
        sales = Waiter(replica, _ask(FINANCE, _holder("sales", "web2", 952)))
        sales.waiting()
        yield replica, began
        sales.vanish()


def test_the_book_is_right(story: tuple[Replica, datetime]) -> None:
    """Promise 10: what an operator wants to know is one grpcurl call away, as the book says.

    Fails when an answer gets, loses or renames a field, when a command loses its filter or its
    flag, when a command has no answer, and when an answer has no command.
    """
    replica, began = story
    comparison, wrong = Comparison(began), []
    for recipe in recipes(BOOK.read_text()):
        asked = subprocess.run(
            ["bash", "-o", "pipefail", "-c", comparison.command(recipe.command, replica.address)],
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=40,
        )
        where = f"README.md:{recipe.line}: "
        assert (asked.returncode != 0) == ("ERROR:" in recipe.answer), where + asked.stdout
        wrong += [
            where + one
            for one in comparison.differences(documents(recipe.answer), documents(asked.stdout))
        ]
    assert not wrong, "\n".join(wrong)


def test_every_question_is_in_the_contents() -> None:
    """The questions at the top are the headings below, in their order, and each has an answer.

    Fails when a section is added, moved or renamed without its link.
    """
    contents, *sections = re.split(r"^## ", BOOK.read_text(), flags=re.MULTILINE)
    links = re.findall(r"\[([^\]]+\?)\]\(#([^)]+)\)", contents)
    headings = [section.split("\n", 1)[0] for section in sections]
    assert [text for text, _ in links] == headings
    for text, anchor in links:
        assert anchor == re.sub(r"[^\w -]", "", text).lower().replace(" ", "-")
    assert [text for text, body in zip(headings, sections, strict=True) if "\n$ " not in body] == []


def test_budgets_show_the_providers_spelling(story: tuple[Replica, datetime]) -> None:
    """An endpoint is shown as it was spelled first, whatever the case of later calls and filters.

    Fails when another spelling opens a budget of its own, is shown, or finds nothing.
    """
    replica, _ = story

    def ask_for(method: str, request: dict[str, Any]) -> dict[str, Any]:
        command = [str(BIN / "grpcurl"), "-plaintext", "-d", json.dumps(request), replica.address]
        asked = subprocess.run(
            [*command, f"holdoff.v1.{method}"], capture_output=True, check=True, timeout=40
        )
        found: dict[str, Any] = json.loads(asked.stdout)
        return found

    url = "https://start.exactonline.nl/api/v1/535193/CRM/accounts(guid'7-8')?$select=ID"
    event = {
        "id": "5e1d7a90-3c4b-4b8f-9d2e-6a7f8c9b0d1e",
        "kind": "EVENT_KIND_ERROR",
        "scope": {"token": FINANCE, "endpoint": url},
        "status": 404,
    }
    ask_for("BudgetService/RecordEvents", {"events": [event]})
    for spelled in ("crm/Accounts", "CRM/accounts", "crm%2FACCOUNTS/"):
        where = {"token": FINANCE, "division": "535193", "endpoint": spelled}
        [budget] = ask_for("BudgetService/ListBudgets", {"scope": where})["budgets"]
        assert (budget["scope"]["endpoint"], budget["used"]) == ("crm/Accounts", "9")
        explained = ask_for("BudgetService/Explain", {"scope": where})
        assert "division 535193 crm/Accounts must wait" in explained["message"]
        shown = {one["scope"]["endpoint"] for one in explained["errors"]}
        assert (shown, len(explained["errors"])) == ({"crm/Accounts"}, 2)
    [back_off] = ask_for("BudgetService/ListBackOffs", {})["back_offs"]
    assert back_off["scope"]["endpoint"] == "crm/Accounts"
    [began] = ask_for("AdminService/ListAuditEvents", {"kinds": ["AUDIT_KIND_BACK_OFF_BEGAN"]})[
        "events"
    ]
    assert "crm/Accounts is spent" in began["reason"]
