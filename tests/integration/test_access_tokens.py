"""Both clients and the commands keep an access token current, against a real coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import redis
from click.testing import CliRunner, _NamedTextIOWrapper

import holdoff
from holdoff import errors
from holdoff.cli import exits, main
from holdoff.cli._waiting import WaitDisplay
from holdoff.custody.files import AccessTokenFile
from holdoff.v1.grant_pb2 import GRANT_STATE_HELD as HELD
from holdoff.v1.grant_pb2 import GRANT_STATE_STALE
from tests.custodian import Custodian, key_directory
from tests.harness import wait_until
from tests.integration.test_hand_out import ACCESS, Refreshed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdoff.custody.access import Usable
    from tests.conftest import StartValkey


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def custodian(url: str, keys: Path) -> Iterator[Custodian]:
    """Give a coordinator with keys, which tests share, each with apps of its own."""
    with Custodian(url, keys) as one:
        yield one


@pytest.fixture
def client(custodian: Custodian) -> Iterator[holdoff.Client]:
    """Give a client of it."""
    with holdoff.Client(custodian.address) as client:
        yield client


def test_a_token_is_kept_current(client: holdoff.Client, custodian: Custodian, url: str) -> None:
    """It waits for the first one; each renewal comes by itself."""
    one = Refreshed(custodian, url)
    heard: queue.SimpleQueue[Usable] = queue.SimpleQueue()
    with client.access_token(one.token, on_renewed=heard.put) as access:
        with pytest.raises(errors.NoAccessToken):
            access.current(wait_seconds=0)
        first = one.refresh()
        assert access.current(wait_seconds=30) == first
        usable = access.usable(wait_seconds=0)
        assert (usable.generation, usable.api_hosts) == (2, ("api.xero.com",))
        second = one.refresh()
        assert heard.get(timeout=30).access_token == first
        assert heard.get(timeout=30).access_token == second
        assert access.current() == second
        assert access.status
    with pytest.raises(errors.HoldoffError, match="was closed"):
        access.current()


def test_it_says_why_there_is_none(client: holdoff.Client, custodian: Custodian, url: str) -> None:
    """A foreign lock is told; a grant that is deleted ends it."""
    one = Refreshed(custodian, url)
    lock = f"lock:{custodian.show_token(one.token).lock_name}"
    with redis.Redis.from_url(url) as store, client.access_token(one.token) as access:
        store.set(lock, "foreign", px=60_000)
        wait_until(lambda: access.status and access.status.state == HELD)
        with pytest.raises(errors.NoAccessToken, match="a python-redis-lock user") as caught:
            access.current(wait_seconds=0.1)
        assert caught.value.metadata == {"state": "HELD"}
        store.delete(lock)
        custodian.delete(one.token)
        with pytest.raises(errors.GrantNotFound):
            access.current(wait_seconds=30)


def streams(custodian: Custodian, token: str) -> int:
    """Return how many streams of a token a coordinator has."""
    _, app, _, name = token.split("/")
    served = custodian.coordinator._hand_outs._served.get(app, {}).get(name)
    return served.streams if served else 0


def fail(_: Usable) -> None:
    """Be a bad callback."""
    raise ValueError("no such")


def test_all_of_one_token_share_one_stream(
    client: holdoff.Client, custodian: Custodian, url: str
) -> None:
    """The last one ends it; who raises in a callback ends alone; one that comes later hears too.

    Fails when each opens its own stream, or one that is closed ends the others.
    """
    one = Refreshed(custodian, url)
    first = one.refresh()
    heard: queue.SimpleQueue[Usable] = queue.SimpleQueue()
    with client.access_token(one.token) as lasting:
        assert lasting.current(30) == first
        failing = client.access_token(one.token, on_renewed=fail)
        with client.access_token(one.token, on_renewed=heard.put) as passing:
            assert heard.get(timeout=0).access_token == first
            assert streams(custodian, one.token) == 1
            with pytest.raises(errors.HoldoffError, match="no such"):
                failing.current(30)
            second = one.refresh()
            assert heard.get(timeout=30).access_token == second
            assert passing.current(0) == second
        failing.close()
        third = one.refresh()
        wait_until(lambda: lasting.current(30) == third)
        assert streams(custodian, one.token) == 1
    wait_until(lambda: streams(custodian, one.token) == 0)


async def test_all_of_one_token_share_one_stream_in_an_event_loop(
    custodian: Custodian, url: str
) -> None:
    """The same for the client of asyncio."""
    one = await asyncio.to_thread(Refreshed, custodian, url)
    first = await asyncio.to_thread(one.refresh)
    heard: list[Usable] = []
    async with holdoff.aio.Client(custodian.address) as client:
        async with client.access_token(one.token) as lasting:
            assert await lasting.current(30) == first
            async with client.access_token(one.token, on_renewed=heard.append) as passing:
                assert [usable.access_token for usable in heard] == [first]
                assert streams(custodian, one.token) == 1
                second = await asyncio.to_thread(one.refresh)
                await passing.usable(30, newer_than=2)
                assert heard[-1].access_token == second
            third = await asyncio.to_thread(one.refresh)
            assert (await lasting.usable(30, newer_than=3)).access_token == third
        await asyncio.to_thread(wait_until, lambda: streams(custodian, one.token) == 0)


def test_it_moves_to_another_replica(url: str, keys: Path) -> None:
    """The current token stays usable meanwhile, and the next comes from the other one."""
    with Custodian(url, keys) as first, Custodian(url, keys) as second:
        one = Refreshed(first, url)
        access_token = one.refresh()
        with (
            holdoff.Client(f"{first.address},{second.address}") as client,
            client.access_token(one.token) as access,
        ):
            assert access.current(30) == access_token
            served = [replica.coordinator._hand_outs._served for replica in (first, second)]
            (first if served[0] else second).stop()
            assert access.current(0) == access_token
            renewed = one.refresh()
            wait_until(lambda: access.current(0) == renewed)


async def test_the_asyncio_client_does_the_same(custodian: Custodian, url: str) -> None:
    """Fails when its token is not renewed, or it does not end with its client."""
    # In threads: the scripts run in event loops of their own.
    one = await asyncio.to_thread(Refreshed, custodian, url)
    heard: asyncio.Queue[Usable] = asyncio.Queue()
    async with (
        holdoff.aio.Client(custodian.address) as client,
        client.access_token(one.token, on_renewed=heard.put_nowait) as access,
    ):
        with pytest.raises(errors.NoAccessToken):
            await access.current(wait_seconds=0)
        for _ in range(2):
            renewed = await asyncio.to_thread(one.refresh)
            async with asyncio.timeout(30):
                assert (await heard.get()).access_token == renewed
            assert await access.current() == renewed
        async with contextlib.aclosing(client.grants.watch(one.token)) as watched:
            assert (await anext(watched)).grant.generation == 3
    with pytest.raises(errors.HoldoffError, match="was closed"):
        await access.current()


def test_a_grant_is_watched_without_its_token(
    client: holdoff.Client, custodian: Custodian, url: str
) -> None:
    """Fails when a watch opens the access token, or misses a step of a refresh or a restore."""
    one = Refreshed(custodian, url)
    one.refresh()
    with contextlib.closing(client.grants.watch(one.token)) as watched:
        first = next(watched)
        assert (first.grant.generation, ACCESS in str(first)) == (2, False)
        app, token = one.scripts.name.app, one.scripts.name.token
        served = custodian.coordinator._hand_outs._served[app][token]
        assert served.stand
        assert served.stand.secrets is None
        with client.access_token(one.token) as access:
            assert access.current(30).startswith(ACCESS)
        one.begin()
        wait_until(lambda: next(watched).grant.status.state == 2)
        one.end()
        wait_until(lambda: next(watched).grant.generation == 3)
        # After a restore it may be that of a backup.
        shard = f"holdoff:{{{app}}}"
        with redis.Redis.from_url(url) as store:
            store.hset(shard, "restored_us", store.time()[0] * 1_000_000 + 5_000_000)
            store.execute_command("SPUBLISH", f"{shard}:custody", token)
        wait_until(lambda: next(watched).grant.status.state == GRANT_STATE_STALE)
    assert client.grants.get(one.token).status.state == GRANT_STATE_STALE


def run(custodian: Custodian, *arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit code and both outputs."""
    done = CliRunner().invoke(main, ["--endpoint", custodian.address, "grant", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_script_gets_the_current_token(
    custodian: Custodian, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal with --force only; without a token it says why, with exit code 75."""
    one = Refreshed(custodian, url)
    code, out, err = run(custodian, "access-token", one.token, "--wait", "0s")
    assert (code, out) == (exits.NOT_GRANTED, "")
    assert "access token" in err
    access = one.refresh()
    # The coordinator of the test logs to the same standard error.
    assert run(custodian, "access-token", one.token)[:2] == (0, f"{access}\n")
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    code, out, err = run(custodian, "access-token", one.token)
    assert (code, out, "--force" in err) == (exits.USAGE, "", True)
    assert run(custodian, "access-token", one.token, "--force")[:2] == (0, f"{access}\n")


def test_a_terminal_shows_what_a_wait_is_for(
    custodian: Custodian, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State, reason and when it ends, on the standard error; the output has the token alone."""
    one = Refreshed(custodian, url)
    one.begin()
    shown, renewed = threading.Event(), queue.SimpleQueue[str]()
    show = WaitDisplay.no_access_token

    def noted(*arguments: Any) -> None:
        show(*arguments)
        shown.set()

    def refresh() -> None:
        if shown.wait(60):
            renewed.put(one.end())

    monkeypatch.setattr(WaitDisplay, "no_access_token", noted)
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    thread = threading.Thread(target=refresh)
    thread.start()
    code, out, err = run(custodian, "access-token", one.token, "--force", "--wait", "60s")
    thread.join()
    assert (code, out) == (0, f"{renewed.get(timeout=0)}\n")
    assert re.search("waited [0-9]+s, [0-9ms]+ left; no access token: refreshing: replica", err)


def test_the_command_that_watches_never_shows_the_token(custodian: Custodian, url: str) -> None:
    """Each line is the grant; the end of the grant ends the command."""
    one = Refreshed(custodian, url)
    one.refresh()
    done: list[tuple[int, str, str]] = []
    thread = threading.Thread(target=lambda: done.append(run(custodian, "watch", one.token)))
    thread.start()
    served = custodian.coordinator._hand_outs._served
    app, token = one.scripts.name.app, one.scripts.name.token
    wait_until(lambda: served.get(app, {}).get(token))
    one.refresh()
    custodian.delete(one.token)
    thread.join(30)
    [(code, out, err)] = done
    assert (code, "no grant of" in err) == (exits.REFUSED, True)
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["name"] for line in lines} == {f"{one.token}/grant"}
    assert ACCESS not in out + err


def holds(path: Path, access_token: str) -> bool:
    """Tell whether a file has an access token."""
    return path.exists() and path.read_text() == f"{access_token}\n"


def test_a_file_is_kept_current(
    client: holdoff.Client, custodian: Custodian, url: str, tmp_path: Path
) -> None:
    """Only its owner can read it; without a usable token, and at the end, there is none."""
    one = Refreshed(custodian, url)
    path, said, stop = tmp_path / "access.token", list[str](), threading.Event()
    with client.access_token(one.token) as access, AccessTokenFile(path, said.append) as file:
        thread = threading.Thread(target=file.keep, args=(access, stop))
        thread.start()
        wait_until(lambda: any("access token of" in reason for reason in said))
        assert not path.exists()
        for _ in range(2):
            wait_until(partial(holds, path, one.refresh()))
            assert path.stat().st_mode & 0o777 == 0o600
        custodian.put(one.token, replace=True)
        wait_until(lambda: not path.exists())
        path.write_text("planted")
        stop.set()
        thread.join(30)
    assert not path.exists()
    assert not list(tmp_path.iterdir())
