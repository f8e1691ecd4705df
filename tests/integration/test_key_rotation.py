"""Master keys of custody: which one encrypts, how grants move to a new one, and what one lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis

from holdoff.v1 import admin_service_pb2, audit_pb2, custody_service_pb2, grant_pb2
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.custody import key_notices
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.custody.key_notices import KeyNotices
from holdoff_coordinator.custody.refreshing import Next
from holdoff_coordinator.custody.seals import Seals
from holdoff_coordinator.scripts import Scripts
from tests.custodian import Custodian, key_directory, refused
from tests.harness import wait_until
from tests.integration.test_refreshing import INTERVAL_SECONDS, world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartValkey


@pytest.fixture
def url(start_valkey: StartValkey, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a store of its own, whose replicas tell of their keys often."""
    monkeypatch.setattr(key_notices, "GIVEN_SECONDS", 0.1)
    return start_valkey().url


def folder(parent: Path, name: str, *keys: Path) -> Path:
    """Make a directory with copies of some keys."""
    made = parent / name
    made.mkdir(mode=0o700)
    for key in keys:
        copy(key, made)
    return made


def copy(key: Path, to: Path) -> None:
    """Copy a key to another replica."""
    draft = to / ".draft"
    draft.touch(0o600)
    draft.write_bytes(key.read_bytes())
    draft.rename(to / key.name)


def rotate(one: Custodian, **fields: object) -> Iterator[custody_service_pb2.RotateKeysResponse]:
    """Call it page by page."""
    request = custody_service_pb2.RotateKeysRequest(**fields)  # type: ignore[arg-type]
    while True:
        page = one.custody.RotateKeys(request)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def uses(pages: list[custody_service_pb2.RotateKeysResponse]) -> dict[str, int]:
    """Add up how many grants each key encrypts."""
    found: dict[str, int] = {}
    for page in pages:
        for use in page.key_uses:
            found[use.key_id] = found.get(use.key_id, 0) + use.grant_count
    return found


def notices(url: str) -> list[bytes]:
    """Read what replicas tell of their keys."""
    with redis.Redis.from_url(url) as store:
        kept: Any = store.hgetall(key_notices.NOTICES)
        return list(kept.values())


def test_rotation(url: str, tmp_path: Path) -> None:
    """A key encrypts as soon as every live replica has it; then no grant needs the old one.

    Fails when a replica without the new key does not prevent it, or a page is left out.
    """
    ours = key_directory(folder(tmp_path, "ours"), "first")
    theirs = folder(tmp_path, "theirs", ours / "first.key")
    with Custodian(url, ours) as one:
        tokens = [one.token(name=f"apps/{app}/tokens/{n}") for app in "ab" for n in "123"]
        before = {token: one.put(token) for token in tokens}
        with Custodian(url, theirs) as two:
            wait_until(lambda: len(notices(url)) == 2)
            key_directory(ours, "second")
            for replica, key_id in ((one, ""), (two, "second")):
                error = refused(lambda: list(rotate(replica, key_id=key_id)))  # noqa: B023
                assert error.reason == "CUSTODY_KEY_MISSING"
                assert "second" in str(error)
            assert uses(list(rotate(one, validate_only=True))) == {"first": 6}
            copy(ours / "second.key", theirs)
            wait_until(lambda: all(b"second" in notice for notice in notices(url)))
            first_page = next(rotate(two, page_size=2))
            assert (first_page.primary_key_id, first_page.resealed_count) == ("second", 2)
        assert len(notices(url)) == 1
        pages = list(rotate(one, page_size=2))
        assert [page.resealed_count for page in pages] == [0, 2, 2]
        assert uses(pages) == {"second": 6}
        # A call that was refused, one that changes nothing, and further pages are not in the trail.
        kinds = [audit_pb2.AUDIT_KIND_KEYS_ROTATED]
        trail = one.admin.ListAuditEvents(
            admin_service_pb2.ListAuditEventsRequest(page_size=1000, kinds=kinds)
        )
        events = [(entry.resource, entry.reason, entry.identity) for entry in trail.events]
        assert events == [
            ("keys/second", "again", "anonymous"),
            ("keys/second", "until now 'first'", "anonymous"),
        ]
        assert all(entry.peer for entry in trail.events)
        assert not any(page.skipped_grants for page in pages)
        (ours / "first.key").unlink()
        for token in tokens:
            grant = one.grant(token)
            assert grant.status.state == grant_pb2.GRANT_STATE_READY
            assert (grant.key_id, grant.etag) == ("second", before[token].etag)
        assert one.put(one.token()).key_id == "second"


def test_a_missing_key_stops_its_tokens_only(url: str, tmp_path: Path) -> None:
    """A replica leaves grants alone whose key it lacks, and seals all others again.

    Fails when one grant that cannot be opened ends the rotation, or is overwritten.
    """
    ours = key_directory(folder(tmp_path, "ours"), "first", "second", "third")
    with Custodian(url, ours) as one:
        tokens = [one.token(name=f"apps/a/tokens/{n}") for n in "123"]
        for token in tokens:
            one.put(token)
        assert {one.grant(token).key_id for token in tokens} == {"third"}
        # Two calls that did not go on to the next page.
        next(rotate(one, key_id="first", page_size=2))
        next(rotate(one, key_id="second", page_size=1))
        assert [one.grant(token).key_id for token in tokens] == ["second", "first", "third"]
    theirs = folder(tmp_path, "theirs", ours / "second.key", ours / "third.key")
    with Custodian(url, theirs) as two:
        (page,) = rotate(two, key_id="third")
        assert page.resealed_count == 1
        assert uses([page]) == {"first": 1, "third": 2}
        (skipped,) = page.skipped_grants
        assert (skipped.name, skipped.key_id) == ("apps/a/tokens/2/grant", "first")
        grant = two.grant(tokens[1])
        assert grant.status.state == grant_pb2.GRANT_STATE_KEY_MISSING
        assert "first.key" in grant.status.message
        copy(ours / "first.key", theirs)
        wait_until(lambda: two.grant(tokens[1]).status.state == grant_pb2.GRANT_STATE_READY)
        (page,) = rotate(two, key_id="third")
        assert (page.resealed_count, uses([page])) == (1, {"third": 3})


async def test_the_right_is_for_replicas_with_the_key(url: str, tmp_path: Path) -> None:
    """A replica without the key of a grant takes no right to refresh it, and another one does.

    Fails when it takes the right, which keeps the other one from refreshing.
    """
    ours = key_directory(folder(tmp_path, "ours"), "first")
    spools = folder(tmp_path, "spools")
    async with world(url, ours, spools) as w:
        key_directory(ours, "second")
        await w.seals.rotate("second")
        theirs = folder(tmp_path, "theirs", ours / "second.key")
        seals = w.seals
        w.seals = Seals(w.scripts, KeyDirectory(theirs).keys)
        assert await w.refresh("two") == Next(None, "KEY_MISSING")
        record = await w.record()
        assert (record.attempt, record.generation, record.public.key_id) == ("", 1, "first")
        w.seals = seals
        one = w.refresher()
        await one.refresh(w.name)
        record = await w.record()
        assert (record.generation, record.public.key_id) == (2, "second")
        assert await w.report() == (1, 0, 0)
        # What the replica keeps for the case of a loss needs no old key either.
        await w.seals.rotate("first")
        await one.reseal()
        (kept,) = one._copies.values()
        assert b'"key_id":"first"' in kept.request.facts.encode()


@pytest.mark.parametrize("has_another", [True, False])
async def test_a_missing_primary_key_stops_its_tokens_only(
    url: str, tmp_path: Path, *, has_another: bool
) -> None:
    """A grant that an older key sealed is refreshed with that key where the primary one is missing.

    Fails when nothing is refreshed then; or, where a replica has another key of the same id, when
    that one is used.
    """
    ours = key_directory(folder(tmp_path, "ours"), "first")
    async with world(url, ours, folder(tmp_path, "spools")) as w:
        key_directory(ours, "second")
        await w.seals.rotate("second")
        theirs = folder(tmp_path, "theirs", ours / "first.key")
        if has_another:
            key_directory(theirs, "second")
        whole, w.seals = w.seals, Seals(w.scripts, KeyDirectory(theirs).keys)
        before = await w.record()
        await w.refresh("two")
        record = await w.record()
        assert (record.generation, record.public.key_id) == (2, "first")
        assert record.fingerprint == before.fingerprint
        assert w.spooled("two") == []
        w.seals = whole
        await w.pass_seconds(INTERVAL_SECONDS)
        await w.refresh()
        assert (await w.record()).public.key_id == "second"
        await w.pass_seconds(INTERVAL_SECONDS)
        w.seals = Seals(w.scripts, KeyDirectory(theirs).keys)
        assert await w.refresh("two") == Next(None, "KEY_MISSING")
        assert await w.report() == (2, 0, 0)


async def test_a_notice_ends(url: str, tmp_path: Path) -> None:
    """A replica that was killed counts until its notice ends, by the store's clock."""
    ours = key_directory(folder(tmp_path, "ours"), "first")
    client = connect(url)
    try:
        one, two = (
            KeyNotices(Scripts(client, quarantine_us=0), KeyDirectory(ours).keys, name)
            for name in ("one", "two")
        )
        await one.exchange()
        (notice,) = await two.exchange()
        assert (notice.replica, set(notice.checks)) == ("one", {"first"})
        with redis.Redis.from_url(url) as store:
            kept: Any = store.hgetall(key_notices.NOTICES)
            for field, value in kept.items():
                store.hset(key_notices.NOTICES, field, b"1" + value[value.index(b" ") :])
        assert await two.exchange() == []
        assert len(notices(url)) == 1
    finally:
        await client.aclose()
