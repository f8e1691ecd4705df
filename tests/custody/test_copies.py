"""Which copies of a grant a replica keeps."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdoff.names import TokenName
from holdoff_coordinator.custody.copies import Copy, copy_of, open_copy, seal_copy
from holdoff_coordinator.custody.records import NEVER, Facts, Held, Record
from holdoff_coordinator.custody.rules import SECOND, Condition
from holdoff_coordinator.custody.sealing import MasterKey, SealError

NOW = 10_000 * SECOND


def held(reason: str = "", **fields: Any) -> Held:
    """Return a grant that was refreshed 100 s ago."""
    defaults: dict[str, Any] = {
        "chain": "c",
        "generation": 3,
        "sealed_grant": "sealed",
        "facts": "{}",
        "fingerprint": "f",
        "condition": Condition.READY,
        "created_us": 1,
        "since_us": 1,
        "refreshed_us": NOW - 100 * SECOND,
        "not_before_us": NOW + 472 * SECOND,
        "expires_us": NOW + 500 * SECOND,
        "idle_us": 0,
        "unproven": 0,
        "first_unproven_us": 0,
        "not_sent": 0,
    }
    return Held("t", Record(**{**defaults, **fields}), reason, 0, NOW)


def test_its_instants_are_relative() -> None:
    """So that they can be told to a store with another clock."""
    copy = copy_of(held(), 5)
    assert copy is not None
    later = copy.request.later(10 * SECOND)
    assert (later.from_generation, later.generation, later.restores) == (2, 3, True)
    assert later.refreshed_age_us == 110 * SECOND
    assert later.not_before_in_us == 462 * SECOND
    assert later.expires_in_us == 490 * SECOND
    assert later.idle_us == NEVER


@pytest.mark.parametrize(
    "one",
    [held("QUARANTINED"), held(condition=Condition.STALE), held(sealed_grant="")],
    ids=["quarantine", "stale", "unread"],
)
def test_what_may_be_out_of_date_is_not_kept(one: Held) -> None:
    """Else a replica would confirm as the newest generation what it read after a loss."""
    assert copy_of(one, 0) is None


def test_only_a_newer_one_replaces_another() -> None:
    """What is read after a loss does not replace what was known before it."""

    def kept(generation: int, chain: str = "c", *, is_ours: bool = False) -> Copy:
        copy = copy_of(held(generation=generation, chain=chain), 0)
        assert copy is not None
        return Copy(copy.request, 0, is_ours=is_ours)

    assert kept(1).replaces(None)
    assert kept(4).replaces(kept(3))
    assert not kept(3).replaces(kept(3, is_ours=True))
    assert not kept(2).replaces(kept(3))
    assert kept(1, "another").replaces(kept(3))


def test_a_copy_that_clients_keep() -> None:
    """It opens for its own token only, unchanged, and confirms nothing."""
    keys = {"k": MasterKey("k", bytes(32))}
    name = TokenName("a", "t")
    public = Facts(
        client_id="c",
        token_url="https://h/t",
        api_hosts=(),
        client_authentication="body",
        key_id="k",
    )
    facts = msgspec.json.encode(public).decode()
    sealed = seal_copy(name, held(facts=facts), keys)
    found = open_copy(name, sealed, keys)
    assert "sealed" not in repr(found)
    again = found.again(NOW + 5 * SECOND)
    assert (again.restores, again.confirms, again.refreshed_age_us) == (True, False, 105 * SECOND)
    assert found.again(NOW - 5 * SECOND).refreshed_age_us == 100 * SECOND
    for other, blob in ((TokenName("a", "u"), sealed), (name, sealed[:-1] + b"!"), (name, b"x")):
        with pytest.raises(SealError):
            open_copy(other, blob, keys)
    assert seal_copy(name, held(facts=facts, sealed_grant="x" * 100_000), keys) == b""
    assert seal_copy(name, held("QUARANTINED", facts=facts), keys) == b""
    assert seal_copy(name, held(facts=facts), {}) == b""
