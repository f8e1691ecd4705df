"""Streams of access tokens, over gRPC: hand-outs, renewals, states, rights and the audit trail."""

from __future__ import annotations

import base64
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis

from holdoff._status import from_rpc_error
from holdoff.v1 import admin_service_pb2, audit_pb2, custody_service_pb2, grant_pb2
from holdoff_coordinator import gate
from holdoff_coordinator.custody import handout
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.custody.rules import SECOND
from holdoff_coordinator.custody.sealing import AccessSecrets, Binding, Keyring
from holdoff_coordinator.gate import AccessFile
from tests.custodian import Custodian, key_directory
from tests.harness import wait_until
from tests.integration.test_grant_records import Grant
from tests.integration.test_isolation import credential_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartValkey

State = grant_pb2.GrantState
ACCESS = "an-access-token-that-nobody-may-read"


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


class Refreshed:
    """A grant whose access tokens are stored as a refresh does."""

    def __init__(self, custodian: Custodian, url: str, token: str = "") -> None:
        self.token = token or custodian.token()
        self.put = custodian.put(self.token)
        self.generation = self.put.generation
        self.scripts = Grant(url, self.token)
        self.scripts.chain = self.put.chain_id
        self._ring = Keyring(KeyDirectory(custodian.folder).keys(), "first")

    def begin(self) -> str:
        """Take the right to a request."""
        return self.scripts.begin("one", self.generation).status

    def end(self, life_seconds: float = 1800) -> str:
        """Store the next access token; return it."""
        access = f"{ACCESS}-{self.generation + 1}"
        put = self.put
        facts = (put.token_url, put.client_id, tuple(put.api_hosts))
        belongs_to = Binding(self.token, put.chain_id, self.generation + 1, *facts)
        sealed = self._ring.seal(AccessSecrets(access), belongs_to)
        record = self.scripts.record()
        answer = self.scripts.end(
            "one",
            self.generation,
            facts=record.facts,
            fingerprint=record.fingerprint,
            sealed_grant=record.sealed_grant,
            sealed_access=base64.b64encode(sealed).decode(),
            expires_in_us=round(life_seconds * SECOND),
            not_before_in_us=0,
        )
        assert answer.status == "OK"
        self.generation += 1
        return access

    def refresh(self, life_seconds: float = 1800) -> str:
        """Store another access token; return it."""
        self.begin()
        return self.end(life_seconds)


class Stream:
    """A stream of access tokens, read in a thread."""

    def __init__(
        self,
        custodian: Custodian,
        token: str,
        *metadata: tuple[str, str],
        sealed_copy: bytes = b"",
    ) -> None:
        request = custody_service_pb2.GetAccessTokenRequest(
            name=f"{token}/grant", sealed_copy=sealed_copy
        )
        self._call = custodian.custody.GetAccessToken(request, metadata=metadata)
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._heard.put(response)
        except grpc.RpcError as error:
            self._heard.put(from_rpc_error(error, "test"))

    def next(self, seconds: float = 30) -> Any:
        """Return the next response, or the error at the end."""
        return self._heard.get(timeout=seconds)

    def token(self) -> str:
        """Return the next access token."""
        while not (heard := self.next()).HasField("access_token"):
            pass
        return str(heard.access_token.access_token)

    def until(self, state: State.ValueType) -> Any:
        """Return the first response with a state."""
        while (heard := self.next()).status.state != state:
            pass
        return heard

    def close(self) -> None:
        """End it."""
        self._call.cancel()


@contextlib.contextmanager
def stream(
    custodian: Custodian, token: str, *metadata: tuple[str, str], sealed_copy: bytes = b""
) -> Iterator[Stream]:
    """Open a stream for the block."""
    one = Stream(custodian, token, *metadata, sealed_copy=sealed_copy)
    try:
        yield one
    finally:
        one.close()


def test_the_current_token_comes_first_then_each_renewal(
    custodian: Custodian, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a renewal, or the request for it, is told to one stream only, or not announced."""
    monkeypatch.setattr(handout, "REPAIR_US", 3600 * SECOND)
    monkeypatch.setattr(handout, "LOOK_US", 3600 * SECOND)
    one = Refreshed(custodian, url)
    first = one.refresh()
    with stream(custodian, one.token) as some, stream(custodian, one.token) as other:
        heard = some.next()
        assert heard.access_token.access_token == first
        assert 1700 < heard.access_token.remaining.ToSeconds() <= 1800
        assert heard.access_token.early_margin.ToSeconds() == 60
        assert heard.status.state == State.GRANT_STATE_READY
        assert other.token() == first
        one.begin()
        refreshing = some.until(State.GRANT_STATE_REFRESHING)
        assert refreshing.has_access_token
        assert not refreshing.HasField("access_token")
        second = one.end()
        assert (some.token(), other.token()) == (second, second)


def test_a_stream_waits_for_the_first_token_and_says_why(custodian: Custodian, url: str) -> None:
    """A foreign lock prevents a request; its end is told too."""
    one = Refreshed(custodian, url)
    lock = f"lock:{custodian.show_token(one.token).lock_name}"
    with redis.Redis.from_url(url) as store, stream(custodian, one.token) as some:
        heard = some.next()
        assert (heard.status.state, heard.has_access_token) == (State.GRANT_STATE_READY, False)
        store.set(lock, "foreign", px=60_000)
        assert "python-redis-lock" in some.until(State.GRANT_STATE_HELD).status.message
        store.delete(lock)
        some.until(State.GRANT_STATE_READY)
        assert one.refresh() == some.token()


def test_a_token_that_ends_is_withdrawn(custodian: Custodian, url: str) -> None:
    """Once within its margin of 60 s, a stream is told that it has none."""
    one = Refreshed(custodian, url)
    access = one.refresh(life_seconds=62)
    with stream(custodian, one.token) as some:
        assert some.token() == access
        assert not some.next().has_access_token
    with stream(custodian, one.token) as late:
        heard = late.next()
        assert (heard.HasField("access_token"), heard.has_access_token) == (False, False)


def test_a_grant_that_is_replaced_withdraws_its_token(custodian: Custodian, url: str) -> None:
    """It may belong to another user of the provider."""
    one = Refreshed(custodian, url)
    one.refresh()
    with stream(custodian, one.token) as some:
        some.token()
        custodian.put(one.token, replace=True)
        assert not some.next().has_access_token


def test_the_stream_of_a_grant_that_is_deleted_ends(custodian: Custodian, url: str) -> None:
    """So does that of one that never was; a new grant is served again."""
    one = Refreshed(custodian, url)
    with stream(custodian, one.token) as some:
        some.next()
        custodian.delete(one.token)
        assert some.next().reason == "GRANT_NOT_FOUND"
    with stream(custodian, one.token) as none:
        assert none.next().reason == "GRANT_NOT_FOUND"
    access = Refreshed(custodian, url, one.token).refresh()
    with stream(custodian, one.token) as again:
        assert again.token() == access


def test_a_sealed_token_that_is_damaged_ends_its_streams(custodian: Custodian, url: str) -> None:
    """Promise 8: the error has nothing of it, and other tokens are served."""
    one = Refreshed(custodian, url)
    one.begin()
    one.scripts.end("one", one.generation, sealed_access="c2VhbGVk")
    with stream(custodian, one.token) as some:
        assert some.next().reason == "STORE_DAMAGED"
    other = Refreshed(custodian, url)
    access = other.refresh()
    with stream(custodian, other.token) as some:
        assert some.token() == access


def test_draining_ends_the_streams(url: str, keys: Path) -> None:
    """Clients move to another replica."""
    with Custodian(url, keys) as one:
        token = Refreshed(one, url).token
        some = Stream(one, token)
        some.next()
        one.stop()
        assert some.next().reason in {"DRAINING", ""}


def test_one_copy_serves_all_streams(custodian: Custodian, url: str) -> None:
    """Fails when something of a token stays after its last stream, or each stream has its own."""
    one = Refreshed(custodian, url)
    one.refresh()
    served = custodian.coordinator._hand_outs._served
    app, token = one.scripts.name.app, one.scripts.name.token
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(stream(custodian, one.token)).token()
        assert served[app][token].streams == 20
    wait_until(lambda: app not in served)


ROLES = ("viewer", "reporter", "holder", "custodian", "gateway", "admin")


def test_only_a_gateway_gets_tokens_until_its_role_ends(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """Revocation of the role ends the stream within 5 s; a holder, or a custodian, gets none."""
    with Custodian(url, keys) as operator:
        one = Refreshed(operator, url)
        access = one.refresh()
    file = tmp_path / "access.toml"

    def grant(*roles: str) -> None:
        text = "".join(
            f'[[grants]]\nidentities = ["credential:{role}"]\nrole = "{role}"\n'
            f'resources = ["{one.token}"]\n'
            for role in roles
        )
        file.write_text(text)

    grant(*ROLES)
    headers = {role: ("authorization", f"Bearer {credential_of(url, role)}") for role in ROLES}
    with Custodian(url, keys, access=AccessFile(file)) as guarded:
        for role in ROLES:
            with stream(guarded, one.token, headers[role]) as some:
                if role in {"gateway", "admin"}:
                    assert some.token() == access
                else:
                    assert some.next().reason == "NOT_ALLOWED"
        with stream(guarded, one.token, headers["gateway"]) as some:
            assert some.token() == access
            grant("viewer")
            # Nothing but the next recheck ends it: the access token lives on.
            assert some.next(300).reason == "NOT_ALLOWED"
    assert gate.RECHECK_SECONDS < 5


def test_without_an_access_file_it_works_on_loopback_only(url: str, keys: Path) -> None:
    """Else everybody on the network could use the tokens."""
    with Custodian(url, keys) as operator:
        one = Refreshed(operator, url)
        one.refresh()
    with (
        Custodian(url, keys, terms={"is_closed": False}) as open_one,
        stream(open_one, one.token) as some,
    ):
        assert some.next().reason == "CUSTODY_OFF"


def test_a_key_that_is_missing_stops_its_tokens_only(url: str, keys: Path, tmp_path: Path) -> None:
    """The stream says so, and continues when the key is there."""
    with Custodian(url, keys) as operator:
        one = Refreshed(operator, url)
        access = one.refresh()
    other = key_directory(tmp_path, "other")
    with Custodian(url, other) as lacking, stream(lacking, one.token) as some:
        heard = some.until(State.GRANT_STATE_KEY_MISSING)
        assert not heard.HasField("access_token")
        (other / "first.key").write_bytes((keys / "first.key").read_bytes())
        (other / "first.key").chmod(0o600)
        assert some.token() == access


def test_hand_outs_are_audited_in_aggregate(url: str, keys: Path) -> None:
    """The first of an hour has its own entry, all others one together; none has the token."""
    with Custodian(url, keys) as operator:
        one = Refreshed(operator, url)
        one.refresh()
        for _ in range(4):
            with stream(operator, one.token) as some:
                some.token()
    with Custodian(url, keys) as operator:
        request = admin_service_pb2.ListAuditEventsRequest(
            parent=one.token, kinds=[audit_pb2.AUDIT_KIND_ACCESS_TOKEN_HANDED_OUT]
        )
        events = operator.admin.ListAuditEvents(request).events
        assert [event.count for event in events] == [3, 0]
        assert {event.identity for event in events} == {"anonymous"}
        assert {event.resource for event in events} == {one.token}
        assert ACCESS not in str(operator.admin.ListAuditEvents(request))
