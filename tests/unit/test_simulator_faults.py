"""Faults on request: which ones may be asked for, and which request gets one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from holdoff.simulator import Fault, FaultKind, Provider
from holdoff.simulator.faults import TOKEN_PATH, Faults

ACCOUNTS_PATH = "/api/v1/535193/crm/Accounts"


def test_a_fault_has_defaults() -> None:
    """Only the kind is required; a fault of an answer is one of the token endpoint."""
    assert Fault.parse({"fault": "reset"}) == Fault(FaultKind.RESET, "/api/", 1)
    assert Fault.parse({"fault": "error"}) == Fault(FaultKind.ERROR, "/api/", 1, None, 500)
    assert Fault.parse({"fault": "hang"}).seconds
    for kind in ("lost", "hung", "error", "html", "late", "partial"):
        assert Fault.parse({"fault": f"{kind}-answer"}).path == TOKEN_PATH
    assert Fault.parse({"fault": "error-answer"}).status == 500
    assert Fault.parse({"fault": "partial-answer"}).without == ("access_token",)
    assert Fault.parse({"fault": "html"}).path == "/"


def test_which_faults_are_acted_on() -> None:
    """Only four kinds prevent the request's effect."""
    prevented = {kind for kind in FaultKind if not Fault(kind).acted_on}
    assert prevented == {"error", "hang", "reset", "html"}


@pytest.mark.parametrize("kind", FaultKind)
def test_what_is_listed_can_be_asked_for_again(kind: FaultKind) -> None:
    """The list of pending faults speaks the language of a request."""
    fault = Fault.parse({"fault": str(kind), "count": 3, "path": "/api/v1"})
    assert Fault.parse(fault.document()) == fault


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "expected a JSON object"),
        ({}, "fault: expected one of error, hang, reset, html, slow-body, late-answer"),
        ({"fault": "rest"}, "fault: expected one of"),
        ({"fault": ["reset"]}, "fault: expected one of"),
        ({"fault": "reset", "times": 3}, "times: unknown; the fields are fault, path, count"),
        ({"fault": "reset", "count": 0}, "count: expected"),
        ({"fault": "reset", "count": True}, "count: expected"),
        ({"fault": "reset", "path": "/_simulator/report"}, "path: expected"),
        ({"fault": "reset", "path": 1}, "path: expected"),
        ({"fault": "reset", "seconds": 1}, "seconds: reset has none; hang, slow-body"),
        ({"fault": "hang", "seconds": -1}, "seconds: expected"),
        ({"fault": "hang", "seconds": float("inf")}, "seconds: expected"),
        ({"fault": "hang", "seconds": "1"}, "seconds: expected"),
        ({"fault": "hang", "status": 500}, "status: hang has none; error, error-answer do"),
        ({"fault": "error-answer", "status": 200}, "status: expected 300 to 399, or 500 to 599"),
        ({"fault": "lost-answer", "without": ["a"]}, "without: lost-answer has none"),
        ({"fault": "partial-answer", "without": "a"}, "without: expected a list of 1 to 10"),
        ({"fault": "partial-answer", "without": []}, "without: expected a list of 1 to 10"),
        ({"fault": "partial-answer", "without": [1]}, "without: expected a list of 1 to 10"),
        ({"fault": "error", "status": 404}, "status: expected 300 to 399, or 500 to 599"),
    ],
)
def test_wrong_requests_are_refused(document: object, says: str) -> None:
    """The refusal names the field and says what it may be."""
    with pytest.raises(ValueError, match=re.escape(says)):
        Fault.parse(document)


def test_faults_go_to_requests_in_order() -> None:
    """The first fault asked for that fits a path is met, as often as was asked for.

    Fails when a fault hits another path, is met once too often, or out of its order.
    """
    faults = Faults()
    for document in (
        {"fault": "reset", "path": TOKEN_PATH, "count": 2},
        {"fault": "error"},
        {"fault": "hang", "path": "/api/v1/"},
    ):
        faults.add(Fault.parse(document))

    def taken(path: str) -> str | None:
        fault = faults.take(path)
        return None if fault is None else str(fault.kind)

    assert taken(TOKEN_PATH) == "reset"
    assert [fault.get("count") for fault in faults.pending()] == [1, 1, 1]
    assert [taken(ACCOUNTS_PATH) for _ in range(3)] == ["error", "hang", None]
    assert [taken(TOKEN_PATH) for _ in range(2)] == ["reset", None]
    faults.add(Fault.parse({"fault": "html"}))
    assert taken("/_simulator/report") is None
    assert taken("/docs/XMLUpload.aspx") == "html"
    faults.add(Fault.parse({"fault": "reset"}))
    faults.clear()
    assert (taken(TOKEN_PATH), faults.pending()) == (None, [])


def test_faults_are_in_an_account_of_their_own() -> None:
    """Who met which fault is reported, and no violation, error or call comes of it."""
    provider = Provider()
    provider.faults.add(Fault.parse({"fault": "error"}))
    assert provider.fault(ACCOUNTS_PATH, "job/a", 0)
    assert provider.fault(ACCOUNTS_PATH, "job/a", 0) is None
    report: Any = provider.report(0)
    assert report["faults"] == {
        "injected": {"error": 1},
        "requests": [
            {
                "time": "1970-01-01T00:00:00.000+00:00",
                "agent": "job/a",
                "path": ACCOUNTS_PATH,
                "fault": "error",
            }
        ],
    }
    counts = report["agents"]["job/a"]
    assert counts.pop("faults_injected") == 1
    assert not any(counts.values())
    assert report["totals"]["violations"] == 0
