"""Budgets and policies as operators and jobs use them: commands, and a coordinator process."""

from __future__ import annotations

import subprocess
import sys
import uuid
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import holdoff
from tests.e2e.service import Service
from tests.harness import coordinator_command, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNTS = "https://start.exactonline.nl/api/v1/535193/crm/Accounts(guid'1-2')?$top=1"
MINE = (
    (files("holdoff.policies") / "exact-online.toml")
    .read_text()
    .replace('name = "exact-online"', 'name = "mine"', 1)
    .replace("most = 10 ", "most = 4 ", 1)
)


@pytest.fixture(scope="module")
def budgets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Give a coordinator that knows the policy `mine`, which allows 4 errors, 2 in hand."""
    service = Service(tmp_path_factory.mktemp("budgets"), policies={"mine": MINE})
    Path(service.environment["HOLDOFF_POLICY_DIR"], "README").write_text("no policy")
    with service:
        yield service


@pytest.fixture
def token(budgets: Service) -> str:
    """Give a token of an app of its own with the policy."""
    name = f"apps/{uuid.uuid4()}/tokens/t"
    made = budgets.invoke("token", "create", name, "--policy", "mine")
    assert made.exit_code == 0, made.stderr
    return name


def test_a_budget_from_its_first_error_to_its_reset(budgets: Service, token: str) -> None:
    """Errors are recorded by a command; a budget is spent, refuses, is listed, shown and reset."""
    app = token.partition("/tokens/")[0]
    record = ("budget", "record", token, "--endpoint", ACCOUNTS, "--status", "400")
    event_id = str(uuid.uuid4())
    for expected in ("counted\n", "counted before\n"):
        told = budgets.invoke(*record, "--id", event_id)
        assert (told.exit_code, told.stdout) == (0, expected), told.stderr
    assert budgets.json("budget", "list", app, "--state", "spent") == {"budgets": []}
    assert budgets.invoke(*record, "--count", "2", "--job", "nightly").stdout == "counted\n"
    [spent] = budgets.json("budget", "list", token, "--state", "spent")["budgets"]
    assert (spent["used"], spent["most"], spent["room"]) == ("3", "4", "0")
    table = budgets.invoke("budget", "list", app).stdout
    for words in ("errors", "spent", "3/4", "535193", "crm/Accounts", spent["name"]):
        assert words in table.splitlines()[1]
    with holdoff.Client(budgets.address) as client:
        with pytest.raises(holdoff.errors.BudgetSpent) as caught:
            client.reserve(token, endpoint=ACCOUNTS)
        assert 3500 < (caught.value.retry_after_seconds or 0) <= 3600
        client.cancel(token, client.reserve(token, endpoint="/api/v1/535193/healthy").id)
    shown = budgets.invoke("budget", "show", spent["name"]).stdout
    assert "3 of 4 errors" in shown
    reset = budgets.invoke("budget", "reset", spent["name"], "--reason", "mended")
    assert reset.exit_code == 0, reset.stderr
    assert "mended" in reset.stdout
    assert budgets.invoke(*record, "--id", event_id).stdout == "counted before\n"
    assert budgets.json("budget", "show", spent["name"])["used"] == "0"


def test_errors_of_budgets_say_what_to_do(budgets: Service, token: str) -> None:
    """What is not there ends with 77 and names the list of what is; the list is not empty."""
    app = token.partition("/tokens/")[0]
    gone = budgets.invoke("budget", "show", f"{app}/budgets/none")
    assert gone.exit_code == 77
    assert f"holdoff budget list {app}" in gone.stderr.splitlines()[1]
    nobody = budgets.invoke("budget", "record", f"{token}-2", "--endpoint", "x")
    assert nobody.exit_code == 77
    assert "holdoff token" in nobody.stderr


def test_a_guarded_job_that_is_killed_counts(budgets: Service, token: str) -> None:
    """A process that dies in a call leaves an error behind when its reservation expires.

    Fails when a reservation that nobody settles gives its room back.
    """
    job = (
        "import holdoff, signal\n"
        f"with holdoff.Client().budget_guard({token!r}, endpoint='crm/x', ttl_seconds=1):\n"
        "    print('calling', flush=True)\n"
        "    signal.pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", job],
        env=budgets.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "calling\n"
    finally:
        process.kill()
        process.communicate(timeout=30)
    with holdoff.Client(budgets.address) as client:
        app = token.partition("/tokens/")[0]
        wait_until(lambda: [one.used for one in client.list_budgets(app, endpoint="crm/x")] == [1])


def test_policies_of_the_operator(budgets: Service) -> None:
    """What stands in --policy-dir is listed beside the presets, shown, and passes the check."""
    listed = budgets.json("policy", "list")["policies"]
    assert {one["name"]: one["preset"] for one in listed}.items() >= {
        ("mine", False),
        ("exact-online", True),
    }
    shown = budgets.invoke("policy", "show", "mine").stdout
    assert "4 errors (400, 401, 403, 404) in 1h" in shown
    assert "a file of the operator" in shown
    checked = budgets.invoke(
        "policy", "check", f"{budgets.environment['HOLDOFF_POLICY_DIR']}/mine.toml"
    )
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert budgets.invoke("policy", "show", "none").exit_code == 77


def test_a_wrong_policy_keeps_a_coordinator_from_starting(tmp_path: Path) -> None:
    """It says, as the check does, which file is wrong in which line.

    Fails when a coordinator starts without a policy that its operator wrote.
    """
    wrong = tmp_path / "mine.toml"
    wrong.write_text(MINE.replace("margin = 2 ", "margin = 9 ", 1))
    told = [
        Service(tmp_path).invoke("policy", "check", str(wrong)),
        coordinator_command(
            *("serve", "--listen", "127.0.0.1:0"),
            *("--data-dir", str(tmp_path / "data"), "--policy-dir", str(tmp_path)),
        ),
    ]
    line = next(n for n, text in enumerate(MINE.splitlines(), 1) if "margin = 2 " in text)
    for one in told:
        assert one.exit_code == 64, one.stderr
        assert f"mine.toml:{line}: limit[0]" in one.stderr
