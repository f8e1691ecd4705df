"""The synchronous and the asyncio client offer the same: names, arguments, words."""

from __future__ import annotations

import inspect
import re

import pytest

import holdoff
from holdoff._client import BudgetGuard
from holdoff.auth import _aio_calls, _calls
from holdoff.custody import aio_access_tokens, aio_grants
from holdoff.custody.access_tokens import AccessToken
from holdoff.custody.grants import Grants

PAIRS = [
    (holdoff.Client, holdoff.aio.Client),
    (holdoff.HeldLease, holdoff.aio.HeldLease),
    (BudgetGuard, holdoff.aio.BudgetGuard),
    (Grants, aio_grants.Grants),
    (AccessToken, aio_access_tokens.AccessToken),
    (_calls.Calls, _aio_calls.Calls),
]
CONTEXT = {"__enter__": "__aenter__", "__exit__": "__aexit__"}
PLAIN = {
    "HeldLease.check",
    "HeldLease.command_paused",
    "HeldLease.command_started",
    "Client.access_token",
    "Client.budget_guard",
    "BudgetGuard.cancel",
}
"""What does not wait is a plain method in both."""


def methods(cls: type) -> set[str]:
    """Return the public names, and those that make a context manager in the synchronous way."""
    synchronous = {awaited: plain for plain, awaited in CONTEXT.items()}
    names = {synchronous.get(name, name) for name in dir(cls)}
    return {name for name in names if not name.startswith("_")} | (names & CONTEXT.keys())


def pairs() -> list[object]:
    """Give each public method of both."""
    return [
        pytest.param(plain, awaited, name, id=f"{plain.__name__}.{name}")
        for plain, awaited in PAIRS
        for name in sorted(methods(plain))
    ]


def returned(function: object) -> str:
    """Return the annotation of the result, with what makes it asynchronous taken out."""
    text = str(inspect.signature(function).return_annotation)  # type: ignore[arg-type]
    return re.sub(r"Async(Iterator|Generator)", r"\1", text).replace(", None, None]", ", None]")


@pytest.mark.parametrize(("plain", "awaited"), PAIRS)
def test_both_have_the_same_names(plain: type, awaited: type) -> None:
    """Fails when one client gets a method that the other has not."""
    assert methods(plain) == methods(awaited)
    assert inspect.signature(holdoff.Client) == inspect.signature(holdoff.aio.Client)


@pytest.mark.parametrize(("plain", "awaited", "name"), pairs())
def test_both_take_and_return_the_same(plain: type, awaited: type, name: str) -> None:
    """Parameters with names, kinds, defaults and types; the result's type; the first line.

    Fails when a parameter of one is renamed, reordered or given another default.
    """
    one = inspect.getattr_static(plain, name)
    other = inspect.getattr_static(awaited, CONTEXT.get(name, name))
    if isinstance(one, property):
        one, other = one.fget, other.fget
    signatures = inspect.signature(one), inspect.signature(other)
    assert signatures[0].parameters == signatures[1].parameters
    assert returned(one) == returned(other)
    lines = [(function.__doc__ or "").partition("\n")[0] for function in (one, other)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("plain", "awaited", "name"), pairs())
def test_only_what_waits_is_awaited(plain: type, awaited: type, name: str) -> None:
    """A method is a coroutine, or gives an async iterator; `check` and its like stay plain."""
    one = inspect.getattr_static(plain, name)
    other = inspect.getattr_static(awaited, CONTEXT.get(name, name))
    if isinstance(one, property):
        assert isinstance(other, property)
        return
    iterates = re.match("(Iterator|Generator)", str(inspect.signature(one).return_annotation))
    waits = not iterates and f"{plain.__name__}.{name}" not in PLAIN
    assert inspect.iscoroutinefunction(other) == waits
    assert not inspect.iscoroutinefunction(one)
