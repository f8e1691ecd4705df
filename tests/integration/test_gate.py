"""Who calls, and until when: credentials, certificates, the access file, open streams."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import structlog
import trustme

from holdoff._status import from_rpc_error
from holdoff.v1 import audit_pb2, lease_service_pb2, lease_service_pb2_grpc, token_service_pb2
from holdoff_coordinator import commands, gate
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.settings import Settings
from holdoff_coordinator.tls import Certificates, TlsFiles
from tests.harness import NO_PROXY, Replica, ask, wait_until
from tests.integration.test_audit import trail
from tests.integration.test_metrics import samples, value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.conftest import Server


class Guarded:
    """A coordinator with an access file, on a store that others use too."""

    def __init__(self, folder: Path, store_url: str) -> None:
        self.store_url = store_url
        self.who = f"jobs-{uuid.uuid4().hex[:12]}"
        self.app = f"gate-{uuid.uuid4().hex[:12]}"
        self.token = f"apps/{self.app}/tokens/t"
        self.path = folder / "access.toml"
        self.grant(f"credential:{self.who}")
        self.access = AccessFile(self.path)
        self.replica = Replica(store_url, access=self.access, metrics_listen="127.0.0.1:0")

    def grant(self, *identities: str) -> None:
        """Write the access file, at once."""
        draft = self.path.with_suffix(".draft")
        names = ", ".join(f'"{one}"' for one in identities)
        resources = f'["apps/{self.app}"]'
        draft.write_text(
            f'[[grants]]\nidentities = [{names}]\nrole = "admin"\nresources = {resources}\n'
            f'[[grants]]\nidentities = ["credential:auditor"]\nrole = "admin"\nresources = ["*"]\n'
        )
        draft.replace(self.path)

    def issue(self, identity: str = "") -> tuple[str, Any]:
        """Issue a credential; return its id and the metadata with which it is sent."""
        return asyncio.run(self._issue(identity or self.who))

    async def _issue(self, identity: str) -> tuple[str, Any]:
        client = connect(self.store_url)
        try:
            one, text, _ = await Credentials(client).issue(identity, 3600, "operator:test")
        finally:
            await client.aclose()
        return one, (("authorization", f"Bearer {text}"),)

    def revoke(self, credential_id: str) -> None:
        """Revoke a credential."""

        async def work() -> None:
            client = connect(self.store_url)
            try:
                await Credentials(client).revoke(credential_id, "operator:test")
            finally:
                await client.aclose()

        asyncio.run(work())

    def look(self, metadata: Any) -> str:
        """Ask for the tokens; return the reason of the refusal, or ''."""
        request = token_service_pb2.ListTokensRequest(parent=f"apps/{self.app}")
        return reason_of(lambda: self.replica.tokens.ListTokens(request, metadata=metadata))


def reason_of(call: Any) -> str:
    """Return why a call is refused; '' if it is not."""
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error, "test").reason
    return ""


@pytest.fixture
def guarded(tmp_path: Path, valkey: Server) -> Iterator[Guarded]:
    """Give a coordinator that asks who calls, with a token."""
    one = Guarded(tmp_path, valkey.url)
    with one.replica:
        _, metadata = one.issue()
        request = token_service_pb2.CreateTokenRequest()
        request.token.name = one.token
        one.replica.tokens.CreateToken(request, metadata=metadata)
        yield one


def silent_streams(guarded: Guarded, metadata: Any) -> dict[str, Any]:
    """Open streams that have nothing more to say: a watch, a holder's and a waiter's."""
    leases = guarded.replica.leases
    offer = leases.AcquireLease(ask(guarded.token, ttl=3600.0), metadata=metadata).offer
    renewal = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
    leases.RenewLease(renewal, metadata=metadata)
    follow = lease_service_pb2.FollowLeaseRequest(name=offer.lease.name, secret=offer.secret)
    acquire = lease_service_pb2.StreamAcquireLeaseRequest(acquire=ask(guarded.token, wait=600.0))
    watch = lease_service_pb2.WatchLeasesRequest(parent=guarded.token)
    streams: dict[str, Any] = {
        "watch": leases.WatchLeases(watch, metadata=metadata, timeout=60),
        "follow": leases.FollowLease(follow, metadata=metadata, timeout=60),
        "acquire": leases.StreamAcquireLease(iter([acquire]), metadata=metadata, timeout=60),
    }
    for stream in streams.values():
        next(stream)
    return streams


def ends(streams: dict[str, Any]) -> dict[str, str]:
    """Read streams to their ends; return the reasons."""

    def drain(stream: Any) -> None:
        for _ in stream:
            pass

    return {name: reason_of(lambda one=one: drain(one)) for name, one in streams.items()}


def test_streams_end_with_their_credential(guarded: Guarded) -> None:
    """A watcher, a holder and a waiter are ended soon after the credential is revoked.

    Fails when a stream is only admitted again when it has something to say.
    """
    credential_id, metadata = guarded.issue()
    _, others = guarded.issue()
    streams = silent_streams(guarded, metadata)
    other: Any = guarded.replica.leases.WatchLeases(
        lease_service_pb2.WatchLeasesRequest(parent=guarded.token), metadata=others
    )
    next(other)
    guarded.revoke(credential_id)
    assert set(ends(streams).values()) == {"CREDENTIAL_REFUSED"}
    assert guarded.look(metadata) == "CREDENTIAL_REFUSED"
    assert other.cancel()  # it was open


def test_a_stream_ends_with_its_grant(guarded: Guarded) -> None:
    """The same after the grant is taken out of the access file; a stream that may stay does.

    Fails when only credentials are looked at, and when each change of the file ends all streams.
    """
    _, metadata = guarded.issue()
    _, others = guarded.issue("auditor")
    # Nothing else goes on in this app, so that there is nothing to say.
    watch = lease_service_pb2.WatchLeasesRequest(parent=guarded.token)
    ours, other = (
        guarded.replica.leases.WatchLeases(watch, metadata=one, timeout=60)
        for one in (metadata, others)
    )
    next(ours)
    next(other)
    guarded.grant("credential:somebody-else")
    assert ends({"watch": ours}) == {"watch": "NOT_ALLOWED"}
    assert other.cancel()  # it was open


def test_a_stream_is_asked_once_where_it_comes_from(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers, and changes of the access file, are judged by what was read at its start.

    Fails when the context of gRPC is asked again: of a stream that has ended that is a crash.
    """
    asked: list[str] = []
    read = gate.Origin.of

    def counted(context: Any) -> gate.Origin:
        asked.append("")
        return read(context)

    _, metadata = guarded.issue()
    monkeypatch.setattr(gate.Origin, "of", counted)
    watch = lease_service_pb2.WatchLeasesRequest(parent=guarded.token)
    stream = guarded.replica.leases.WatchLeases(watch, metadata=metadata, timeout=60)
    next(stream)
    judged = threading.Event()
    judge = gate.Gate._recheck

    async def judging(self: gate.Gate, stay: gate.Stay) -> None:
        await judge(self, stay)
        judged.set()

    monkeypatch.setattr(gate.Gate, "_recheck", judging)
    guarded.grant(f"credential:{guarded.who}", "credential:another")
    assert judged.wait(30)
    assert len(asked) == 1
    assert stream.cancel()


async def test_an_access_file_that_is_gone_admits_nobody(guarded: Guarded) -> None:
    """All calls are refused until it is back; metric, log and audit trail say so.

    Fails when the grants of a deleted file count.
    """
    _, metadata = await guarded._issue(guarded.who)
    _, auditor = await guarded._issue("auditor")
    labels = {"problem": "missing"}
    assert value(await samples(guarded.replica), "access_file_problem", **labels) == 0
    text = guarded.path.read_text()
    with structlog.testing.capture_logs() as lines:
        guarded.path.unlink()
        for _ in range(3):
            assert guarded.look(metadata) == "ACCESS_FILE_MISSING"
        assert value(await samples(guarded.replica), "access_file_problem", **labels) == 1
        guarded.path.write_text("[[grants")  # that it is there does not make it right
        assert guarded.look(metadata) == "ACCESS_FILE_MISSING"
        guarded.path.write_text(text)
        assert guarded.look(metadata) == ""
    assert value(await samples(guarded.replica), "access_file_problem", **labels) == 0
    told = [line for line in lines if "access file" in line["event"]]
    assert [line.get("problem", "") for line in told] == ["missing", "missing", ""]
    wait_until(lambda: len(access_changes(guarded, auditor)) == 3)


def access_changes(guarded: Guarded, metadata: Any) -> list[str]:
    """Return what the audit trail says about this access file."""
    changed = [audit_pb2.AUDIT_KIND_ACCESS_CHANGED]
    with_credential = Calling(guarded.replica, metadata)
    found = [one.reason for one in trail(with_credential, "", kinds=changed)]  # type: ignore[arg-type]
    return [reason for reason in found if str(guarded.path) in reason]


class Calling:
    """A replica's administration, called with a credential."""

    def __init__(self, replica: Replica, metadata: Any) -> None:
        self.admin = self
        self._replica, self._metadata = replica, metadata

    def ListAuditEvents(self, request: Any) -> Any:  # noqa: N802
        """List the trail."""
        return self._replica.admin.ListAuditEvents(request, metadata=self._metadata)


def test_a_reload_without_an_access_file(guarded: Guarded) -> None:
    """SIGHUP reads the other files all the same.

    Fails when the missing file ends the reload.
    """
    guarded.path.unlink()
    with structlog.testing.capture_logs() as lines:
        files = commands._Files(access=guarded.access)
        commands._reload(Settings(), guarded.replica.coordinator, files)
    assert lines[-1]["event"] == "reloaded"


async def test_an_access_file_that_is_wrong_changes_nothing(guarded: Guarded) -> None:
    """The grants before count, and a metric says that they are not what the file says.

    Fails when a typing error ends every job.
    """
    _, metadata = await guarded._issue(guarded.who)
    guarded.path.write_text("[[grants")
    assert guarded.look(metadata) == ""
    found = await samples(guarded.replica)
    assert value(found, "access_file_problem", problem="invalid") == 1
    assert value(found, "access_file_problem", problem="missing") == 0
    guarded.grant("credential:somebody-else")
    assert guarded.look(metadata) == "NOT_ALLOWED"
    found = await samples(guarded.replica)
    assert value(found, "access_file_problem", problem="invalid") == 0


def test_two_credentials_in_one_call(guarded: Guarded) -> None:
    """Neither counts, in whatever order they come.

    Fails when one of them is taken.
    """
    _, good = guarded.issue()
    _, other = guarded.issue("somebody-else")
    assert guarded.look(good) == ""
    for metadata in ((*good, *other), (*other, *good), (*good, *good)):
        assert guarded.look(metadata) == "CREDENTIAL_REFUSED"
    assert guarded.look((*good, ("authorization", "Basic eDp5"))) == "CREDENTIAL_REFUSED"


def test_damaged_requests_are_refused_after_authentication(guarded: Guarded) -> None:
    """Who has no credential learns nothing else.

    Fails when a request is judged before its caller is known.
    """
    _, metadata = guarded.issue()
    channel: Any = guarded.replica.channel
    unary = channel.unary_unary("/holdoff.v1.LeaseService/GetLease")
    stream = channel.stream_stream("/holdoff.v1.LeaseService/StreamAcquireLease")
    calls: list[Any] = [
        lambda **options: unary(b"\xff" * 9, **options),
        lambda **options: list(stream(iter([b"\xff" * 9]), **options)),
        lambda **options: unary(b"\x0a\xff\x7f" + b"x" * 16383, **options),
    ]
    for call in calls:
        assert reason_of(lambda call=call: call(timeout=20)) == "CREDENTIAL_MISSING"
        assert reason_of(lambda call=call: call(timeout=20, metadata=metadata)) == "INVALID_FIELD"


def certified(folder: Path, store_url: str, names: Sequence[str], types: str) -> tuple[str, str]:
    """Call with a certificate that has these names; return the reason, and who it was."""
    authority = trustme.CA()
    files = TlsFiles(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
    ours, theirs = authority.issue_cert("localhost"), authority.issue_cert(*names)
    files.key.write_bytes(ours.private_key_pem.bytes())
    files.cert.write_bytes(b"".join(one.bytes() for one in ours.cert_chain_pems))
    ca = authority.cert_pem.bytes()
    (folder / "ca.pem").write_bytes(ca)
    path = folder / "access.toml"
    path.write_text(
        '[[grants]]\nidentities = ["credential:*"]\nrole = "admin"\nresources = ["*"]\n'
    )
    with Replica(
        store_url,
        certificates=Certificates(files),
        access=AccessFile(path),
        client_identity=types.split(","),
    ) as replica:
        port = replica.address.rpartition(":")[2]
        secure = grpc.ssl_channel_credentials(
            ca, theirs.private_key_pem.bytes(), theirs.cert_chain_pems[0].bytes()
        )
        with grpc.secure_channel(f"localhost:{port}", secure, NO_PROXY) as channel:
            leases = lease_service_pb2_grpc.LeaseServiceStub(channel)
            try:
                leases.ListLeases(lease_service_pb2.ListLeasesRequest(), timeout=20)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, "test")
                return failure.reason, failure.metadata.get("identity", "")
    return "", ""


@pytest.mark.parametrize(
    ("names", "types", "reason", "identity"),
    [
        (["web1.example"], "uri,dns", "NOT_ALLOWED", "dns:web1.example"),
        (["web1.example"], "email", "CREDENTIAL_MISSING", ""),
        (["a@b.example"], "uri,dns", "CREDENTIAL_MISSING", ""),
        (["a@b.example"], "email", "NOT_ALLOWED", "email:a@b.example"),
        (["a@b.example", "web1.example"], "dns", "NOT_ALLOWED", "dns:web1.example"),
        (["a@b.example", "web1.example"], "email,dns", "NOT_ALLOWED", "email:a@b.example"),
        (["web1.example", "web2.example"], "dns", "CREDENTIAL_REFUSED", ""),
        (["10.0.0.1"], "ip", "NOT_ALLOWED", "ip:10.0.0.1"),
    ],
)
def test_a_certificate_says_who_calls(  # noqa: PLR0913, PLR0917 - a row of a table
    tmp_path: Path,
    valkey: Server,
    names: list[str],
    types: str,
    reason: str,
    identity: str,
) -> None:
    """Its one name of a type that may say so, which is the name of no credential.

    Fails when its first name counts, whatever its type; when one of two counts; and when a name in
    a certificate is granted what a credential of the same name is.
    """
    assert certified(tmp_path, valkey.url, names, types) == (reason, identity)
