"""Who may do what: every call by every role, over real connections; and who is not known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import holdoff
import holdoff.aio
from holdoff._status import from_rpc_error
from holdoff.v1 import (
    admin_service_pb2,
    audit_pb2,
    budget_pb2,
    budget_service_pb2,
    custody_service_pb2,
    grant_pb2,
    lease_service_pb2,
    lease_service_pb2_grpc,
    policy_service_pb2,
    token_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.embedded import EmbeddedStore
from tests.e2e.service import Service
from tests.e2e.tls import TlsService
from tests.harness import NO_PROXY, coordinator_command, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result
    from google.protobuf.message import Message

OURS, NEIGHBOUR, THEIRS = "apps/a/tokens/ours", "apps/a/tokens/theirs", "apps/b/tokens/t"
ROLES = ("viewer", "reporter", "holder", "custodian", "gateway", "admin")
GRANTS = "".join(
    f"""
[[grants]]
identities = ["email:{role}@corp.example", "credential:{role}"]
role = "{role}"
resources = ["apps/a/tokens/ours"]
"""
    for role in ROLES
)
GRANTS += """
[[grants]]
identities = ["credential:operator"]
role = "admin"
resources = ["*"]

[[grants]]
identities = ["credential:owner-?"]
role = "admin"
resources = ["apps/a"]
"""

SEE = frozenset(ROLES)
REPORT, HOLD = {"reporter", "holder", "gateway", "admin"}, {"holder", "admin"}
KEEP, ADMINISTER = {"custodian", "admin"}, {"admin"}
WHOLE_APP: set[str] = set()  # a role on one token is not enough
OF_ALL_APPS = "CustodyService/RotateKeys"  # nor is one on an app
TOKEN, SCOPE = token_pb2.Token(name=OURS), budget_pb2.Scope(token=OURS)
LEASE, BUDGET, BACK_OFF = f"{OURS}/leases/1", "apps/a/budgets/errors-x", "apps/a/backOffs/block-x"
GRANT, ID = f"{OURS}/grant", str(uuid.uuid4())

MATRIX: dict[str, tuple[Any, set[str] | frozenset[str]]] = {
    "LeaseService/AcquireLease": (lease_service_pb2.AcquireLeaseRequest(token=OURS), HOLD),
    "LeaseService/StreamAcquireLease": (
        lease_service_pb2.StreamAcquireLeaseRequest(
            acquire=lease_service_pb2.AcquireLeaseRequest(token=OURS)
        ),
        HOLD,
    ),
    "LeaseService/RenewLease": (lease_service_pb2.RenewLeaseRequest(name=LEASE), HOLD),
    "LeaseService/FollowLease": (lease_service_pb2.FollowLeaseRequest(name=LEASE), HOLD),
    "LeaseService/ReleaseLease": (lease_service_pb2.ReleaseLeaseRequest(name=LEASE), HOLD),
    "LeaseService/GetLease": (lease_service_pb2.GetLeaseRequest(name=LEASE), SEE),
    "LeaseService/ListLeases": (lease_service_pb2.ListLeasesRequest(), SEE),
    "LeaseService/ListLeaseHistory": (
        lease_service_pb2.ListLeaseHistoryRequest(parent=OURS),
        SEE,
    ),
    "LeaseService/ListWaiters": (lease_service_pb2.ListWaitersRequest(parent=OURS), SEE),
    "LeaseService/ListQuarantines": (
        lease_service_pb2.ListQuarantinesRequest(parent="apps/a"),
        SEE,
    ),
    "LeaseService/WatchLeases": (lease_service_pb2.WatchLeasesRequest(parent=OURS), SEE),
    "TokenService/CreateToken": (
        token_service_pb2.CreateTokenRequest(token=TOKEN),
        KEEP,
    ),
    "TokenService/UpdateToken": (
        token_service_pb2.UpdateTokenRequest(token=TOKEN),
        KEEP,
    ),
    "TokenService/GetToken": (token_service_pb2.GetTokenRequest(name=OURS), SEE),
    "TokenService/ListTokens": (token_service_pb2.ListTokensRequest(parent="apps/a"), SEE),
    "CustodyService/PutGrant": (
        custody_service_pb2.PutGrantRequest(grant=grant_pb2.Grant(name=GRANT)),
        KEEP,
    ),
    "CustodyService/BeginAuthorization": (
        custody_service_pb2.BeginAuthorizationRequest(grant=grant_pb2.Grant(name=GRANT)),
        KEEP,
    ),
    "CustodyService/CompleteAuthorization": (
        custody_service_pb2.CompleteAuthorizationRequest(name=GRANT),
        KEEP,
    ),
    "CustodyService/GetGrant": (custody_service_pb2.GetGrantRequest(name=GRANT), SEE),
    "CustodyService/ListGrants": (
        custody_service_pb2.ListGrantsRequest(parent="apps/a"),
        SEE,
    ),
    "CustodyService/DeleteGrant": (custody_service_pb2.DeleteGrantRequest(name=GRANT), KEEP),
    "CustodyService/TrustGrant": (custody_service_pb2.TrustGrantRequest(name=GRANT), KEEP),
    "CustodyService/RotateKeys": (custody_service_pb2.RotateKeysRequest(), WHOLE_APP),
    "CustodyService/WatchGrant": (custody_service_pb2.WatchGrantRequest(name=GRANT), SEE),
    "CustodyService/CheckGrant": (custody_service_pb2.CheckGrantRequest(name=GRANT), KEEP),
    "CustodyService/GetAccessToken": (
        custody_service_pb2.GetAccessTokenRequest(name=GRANT),
        {"gateway", "admin"},
    ),
    "BudgetService/RecordEvents": (
        budget_service_pb2.RecordEventsRequest(events=[budget_pb2.Event(scope=SCOPE)]),
        REPORT,
    ),
    "BudgetService/Reserve": (budget_service_pb2.ReserveRequest(scope=SCOPE), REPORT),
    "BudgetService/Commit": (budget_service_pb2.CommitRequest(app="apps/a"), REPORT),
    "BudgetService/Cancel": (budget_service_pb2.CancelRequest(app="apps/a"), REPORT),
    "BudgetService/GetBudget": (budget_service_pb2.GetBudgetRequest(name=BUDGET), SEE),
    "BudgetService/ListBudgets": (budget_service_pb2.ListBudgetsRequest(), SEE),
    "BudgetService/ListBackOffs": (budget_service_pb2.ListBackOffsRequest(), SEE),
    "BudgetService/WatchBudgets": (budget_service_pb2.WatchBudgetsRequest(), SEE),
    "BudgetService/Explain": (budget_service_pb2.ExplainRequest(scope=SCOPE), SEE),
    "PolicyService/GetPolicy": (policy_service_pb2.GetPolicyRequest(), SEE),
    "PolicyService/ListPolicies": (policy_service_pb2.ListPoliciesRequest(), SEE),
    "AdminService/BreakLease": (admin_service_pb2.BreakLeaseRequest(name=LEASE), ADMINISTER),
    "AdminService/ResetBudget": (admin_service_pb2.ResetBudgetRequest(name=BUDGET), WHOLE_APP),
    "AdminService/SetBackOff": (admin_service_pb2.SetBackOffRequest(scope=SCOPE), ADMINISTER),
    "AdminService/ClearBackOff": (
        admin_service_pb2.ClearBackOffRequest(name=BACK_OFF),
        WHOLE_APP,
    ),
    "AdminService/EndQuarantine": (
        admin_service_pb2.EndQuarantineRequest(app="apps/a"),
        WHOLE_APP,
    ),
    "AdminService/ListAuditEvents": (
        admin_service_pb2.ListAuditEventsRequest(parent=OURS),
        ADMINISTER,
    ),
}
# These answer with what the caller may see, if that is anything within the app.
ABOUT_A_PART = {
    "LeaseService/ListLeases",
    "LeaseService/ListQuarantines",
    "TokenService/ListTokens",
    "CustodyService/ListGrants",
    "BudgetService/Commit",
    "BudgetService/Cancel",
    "BudgetService/GetBudget",
    "BudgetService/ListBudgets",
    "BudgetService/ListBackOffs",
    "BudgetService/WatchBudgets",
    "PolicyService/GetPolicy",
    "PolicyService/ListPolicies",
}
SERVICES = {
    service.name: service
    for module in (
        lease_service_pb2,
        token_service_pb2,
        custody_service_pb2,
        budget_service_pb2,
        policy_service_pb2,
        admin_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
}


class GuardedService(TlsService):
    """A coordinator that serves TLS and asks who calls."""

    def __init__(self, folder: Path, *, mutual: bool = False) -> None:
        super().__init__(folder, mutual=mutual)
        self.folder = folder
        self.access_file = folder / "access.toml"
        self.access_file.write_text(GRANTS)
        self.environment["HOLDOFF_ACCESS_FILE"] = str(self.access_file)

    def token(self, *arguments: str) -> Result:
        """Run `holdoff-coordinator token …` beside it."""
        return coordinator_command("token", *arguments, "--data-dir", str(self.data_dir))

    def issue(self, identity: str, life_seconds: int = 3600) -> Path:
        """Issue a credential into a file, as `token issue` does, which takes a second to start."""
        path = self.folder / f"{identity}.credential"

        async def issue() -> None:
            url = await EmbeddedStore(self.data_dir).running_url()
            assert url
            client = connect(url)
            try:
                _, text, _ = await Credentials(client).issue(identity, life_seconds, "admin@host")
            finally:
                await client.aclose()
            path.touch(0o600)
            path.write_text(f"{text}\n")

        with ThreadPoolExecutor(1) as thread:  # the test may have a loop of its own
            thread.submit(asyncio.run, issue()).result()
        return path

    def client(self, credential: Path | None) -> holdoff.Client:
        """Connect as whoever this is."""
        return holdoff.Client(
            self.address, ca_file=self.files.ca, credential_file=credential, timeout_seconds=20
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedService]:
    """Give a coordinator that asks for credentials, with tokens, which tests share."""
    with guarded(tmp_path_factory.mktemp("access")) as one:
        yield one


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[GuardedService]:
    """Run a coordinator that asks for credentials, with tokens."""
    with GuardedService(folder) as one:
        with one.client(one.issue("operator")) as operator:
            for token in (OURS, NEIGHBOUR, THEIRS):
                operator.create_token(token, refresh_interval_seconds=0.1)
        yield one


def call(
    channel: grpc.Channel, method: str, request: Message, metadata: Any = ()
) -> holdoff.HoldoffError | None:
    """Call a method; return its error, if it has one."""
    service, _, name = method.partition("/")
    descriptor = SERVICES[service].methods_by_name[name]
    kind = "_".join(
        "stream" if streams else "unary"
        for streams in (descriptor.client_streaming, descriptor.server_streaming)
    )
    stub = getattr(channel, kind)(
        f"/holdoff.v1.{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=lambda raw: raw,
    )
    argument = iter([request]) if descriptor.client_streaming else request
    try:
        answer = stub(argument, metadata=metadata, timeout=40)
        if descriptor.server_streaming:
            next(answer)
            answer.cancel()
    except StopIteration:
        return None
    except grpc.RpcError as error:
        return from_rpc_error(error, "here")
    return None


def test_the_matrix_names_every_call() -> None:
    """A call that is new has to be thought about here, and in the coordinator's own table."""
    calls = {f"{name}/{one.name}" for name, service in SERVICES.items() for one in service.methods}
    assert set(MATRIX) == calls


@pytest.mark.parametrize("shown", ["certificate", "credential"])
def test_every_role_may_do_its_own(tmp_path: Path, shown: str) -> None:
    """38 calls by 6 roles, and by 3 who have no role for the token: allowed or refused.

    Fails when any entry of the coordinator's table is another, when it compares a token's name
    without its app, and when a role on a token is taken for one on its app.
    """
    everybody = [*ROLES, "owner-1", "neighbour", "nobody"]
    with GuardedService(tmp_path, mutual=shown == "certificate") as service:
        service.access_file.write_text(
            GRANTS.replace('-?"]', '-?", "email:owner-?@corp.example"]')
            + """
[[grants]]
identities = ["credential:neighbour*", "email:neighbour@*"]
role = "admin"
resources = ["apps/a/tokens/theirs", "apps/b", "apps/*/tokens/t"]
"""
        )
        wrong = []
        for who in everybody:
            key = certificate = None
            metadata: Any = ()
            if shown == "certificate":
                files = service.named(tmp_path, f"{who}@corp.example")
                key, certificate = files.key.read_bytes(), files.cert.read_bytes()
            else:
                text = service.issue(who).read_text().strip()
                metadata = (("authorization", f"Bearer {text}"),)
            secure = grpc.ssl_channel_credentials(service.files.ca.read_bytes(), key, certificate)
            with grpc.secure_channel(service.address, secure, NO_PROXY) as channel:
                for method, (request, roles) in MATRIX.items():
                    error = call(channel, method, request, metadata)
                    allowed = who in roles or (who == "owner-1" and method != OF_ALL_APPS)
                    if who == "neighbour":
                        allowed = method in ABOUT_A_PART
                    if isinstance(error, holdoff.errors.WrongSecret):
                        error = None
                    if isinstance(error, holdoff.errors.Refused) == allowed:
                        wrong.append((who, method, error))
                    if isinstance(error, holdoff.errors.NotAllowed):
                        typed = f"email:{who}@corp.example", f"credential:{who}"
                        assert error.metadata["identity"] == typed[shown == "credential"]
        assert wrong == []


def test_who_sees_a_token_sees_no_other(service: GuardedService) -> None:
    """Lists, watches and single budgets leave out what is not theirs, without a word about it.

    Fails when a list is not trimmed, or a budget that is another's is refused, not unknown.
    """
    viewer, owner = service.issue("viewer"), service.issue("owner-1")
    with service.client(owner) as client:
        for token in (OURS, NEIGHBOUR):
            client.record_error(token, division="1", endpoint="x/Y", status=400)
        theirs = next(one for one in client.list_budgets("apps/a") if one.scope.token == NEIGHBOUR)
        client.acquire(NEIGHBOUR, wait_seconds=0)
        client.set_back_off(NEIGHBOUR, 60, "test")
        assert [one.name for one in client.list_tokens()] == [OURS, NEIGHBOUR]
    with service.client(viewer) as client:
        assert [token.name for token in client.list_tokens()] == [OURS]
        assert {budget.scope.token for budget in client.list_budgets()} == {OURS}
        assert list(client.list_leases()) == []
        assert list(client.list_back_offs()) == []
        with pytest.raises(holdoff.errors.BudgetNotFound):
            client.get_budget(theirs.name)
        with pytest.raises(holdoff.errors.BudgetNotFound):
            client.get_budget(f"{theirs.name[:-3]}xyz")
        for refused in (NEIGHBOUR, "apps/a/tokens/there-is-none"):
            with pytest.raises(holdoff.errors.NotAllowed) as error:
                client.get_token(refused)
            text = str(error.value).replace(refused, "TOKEN")
            assert text.startswith("'credential:viewer' lacks the role viewer on TOKEN: ")
        for page in ("tokens", "leases"):
            told = names_of_pages(service, viewer, page)
            assert NEIGHBOUR not in told
            assert THEIRS not in told
        snapshot = next(iter(client.watch_leases("apps/a"))).snapshot
        assert [token.token for token in snapshot.tokens] == [OURS]


def names_of_pages(service: GuardedService, credential: Path, kind: str) -> str:
    """Return all that pages of one entry tell, their page tokens included."""
    secure = grpc.ssl_channel_credentials(service.files.ca.read_bytes())
    metadata = (("authorization", f"Bearer {credential.read_text().strip()}"),)
    told, page_token = "", "first"
    with grpc.secure_channel(service.address, secure, NO_PROXY) as channel:
        while page_token:
            page_token = "" if page_token == "first" else page_token
            page: Any
            if kind == "tokens":
                page = token_service_pb2_grpc.TokenServiceStub(channel).ListTokens(
                    token_service_pb2.ListTokensRequest(page_size=1, page_token=page_token),
                    metadata=metadata,
                )
            else:
                page = lease_service_pb2_grpc.LeaseServiceStub(channel).ListLeases(
                    lease_service_pb2.ListLeasesRequest(page_size=1, page_token=page_token),
                    metadata=metadata,
                )
            page_token = page.next_page_token
            told += str(page)
    return told


def test_credentials_come_and_go(service: GuardedService) -> None:
    """Issued, listed, used, expired, revoked; from the files and the listing nobody can use one.

    Fails when the hash is not compared, when expiry is not looked at, when a revoked one stays
    known, and when the secret is kept.
    """
    path = service.folder / "holder.credential"
    path.unlink(missing_ok=True)
    issued = service.token("issue", "holder", "--expires-in", "1h", "--output-file", str(path))
    assert (issued.exit_code, issued.stdout) == (0, ""), issued.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    secret = path.read_text().strip()
    listed = service.token("list", "--output", "json")
    credentials = json.loads(listed.stdout)["credentials"]
    [one] = [one for one in credentials if one["identity"] == "holder"]
    assert one["expire_time"] > one["issue_time"]
    assert secret.split("_", 2)[2] not in listed.stdout
    assert "holder" in service.token("list").stdout

    environment = {**service.environment, "HOLDOFF_CREDENTIAL_FILE": str(path)}
    done = service.holdoff("run", "--token", OURS, "--", "echo", "done", env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr

    short = service.issue("viewer", life_seconds=1)
    with service.client(short) as client:
        wait_until(lambda: isinstance(refused(client), holdoff.errors.CredentialExpired))
        assert "holdoff-coordinator token issue viewer" in str(refused(client))
    forged = service.folder / "forged.credential"
    forged.write_text(f"{secret[:-4]}AAAA")
    with service.client(forged) as client:
        assert isinstance(refused(client), holdoff.errors.CredentialRefused)

    with service.client(path) as client:
        assert refused(client) is None
        revoked = service.token("revoke", one["id"])
        assert revoked.exit_code == 0, revoked.stderr
        wait_until(lambda: isinstance(refused(client), holdoff.errors.CredentialRefused))
    again = service.token("revoke", one["id"])
    assert (again.exit_code, "there is no such credential" in again.stderr) == (69, True)
    told = "".join(service.log)
    assert "call refused" in told
    with service.client(service.issue("operator")) as operator:
        trail = list(operator.list_audit_events())
    made, gone = audit_pb2.AUDIT_KIND_CREDENTIAL_ISSUED, audit_pb2.AUDIT_KIND_CREDENTIAL_REVOKED
    about = [event for event in trail if event.resource == f"credentials/{one['id']}"]
    assert [event.kind for event in about] == [gone, made]
    assert {event.reason for event in about} == {"of 'holder'"}
    assert all(event.identity.startswith("operator:") for event in about)
    refusals = [one for one in trail if one.kind == audit_pb2.AUDIT_KIND_CALL_REFUSED]
    assert {event.reason for event in refusals} >= {
        "GetToken: CREDENTIAL_EXPIRED",
        "GetToken: CREDENTIAL_REFUSED",
    }
    assert secret.split("_", 2)[2] not in str(trail)
    assert secret not in told
    assert secret.split("_", 2)[2] not in told
    for file in service.data_dir.rglob("*"):
        if file.is_file():
            assert secret.split("_", 2)[2].encode() not in file.read_bytes()


def test_a_credential_goes_where_only_its_owner_looks(service: GuardedService) -> None:
    """To a new file, or to a standard output that was asked for; else nothing is issued.

    Fails when a file or a link that exists is written to, when a credential is issued that goes
    nowhere, and when its file stays although none was issued.
    """
    known = service.token("list").stdout
    target, link = service.folder / "target", service.folder / "link"
    target.write_text("theirs")
    link.symlink_to(service.folder / "planted")
    for options in ([], ["--output-file", str(target)], ["--output-file", str(link)]):
        refused = service.token("issue", "viewer", *options)
        assert (refused.exit_code, refused.stdout) == (64, ""), refused.stderr
        assert "--output-file" in refused.stderr
    assert service.token("issue", "dns:web1", "--output-file", "-").exit_code == 64
    assert target.read_text() == "theirs"
    assert not (service.folder / "planted").exists()
    assert service.token("list").stdout == known
    new = service.folder / "new.credential"
    nowhere = ["--output-file", str(new), "--redis-url", "redis://127.0.0.1:1/0"]
    assert coordinator_command("token", "issue", "viewer", *nowhere).exit_code == 69
    assert not new.exists()
    issued = service.token("issue", "viewer", "--output-file", "-")
    assert issued.stdout.startswith("holdoff_")


@pytest.mark.parametrize("life", ["0s", "0.9s", "-1h", "soon", ""])
def test_no_end_has_to_be_asked_for(tmp_path: Path, life: str) -> None:
    """Fails when a life of less than a second is taken for one without an end."""
    options = ["--expires-in", life, "--data-dir", str(tmp_path), "--output-file", "-"]
    issued = coordinator_command("token", "issue", "viewer", *options)
    assert (issued.exit_code, issued.stdout) == (64, "")
    assert "never" in issued.stderr


def test_a_user_without_a_name_may_issue(service: GuardedService) -> None:
    """As in the image, whose user stands in no password file.

    Fails when the audit trail wants the name of whoever issued a credential.
    """
    issue = ["issue", "viewer", "--output-file", "-", "--data-dir", str(service.data_dir)]
    program = (
        "import os, sys; from holdoff_coordinator import cli; os.environ.pop('USER', None); "
        "[os.environ.pop(name, None) for name in ('LOGNAME', 'LNAME', 'USERNAME')]; "
        "os.getuid = lambda: 65532; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "token", *issue]
    issued = subprocess.run(
        command, capture_output=True, text=True, env=service.environment, check=False, timeout=40
    )
    assert issued.returncode == 0, issued.stderr
    with service.client(service.issue("operator")) as operator:
        trail = list(operator.list_audit_events())
    assert any(event.identity.startswith("operator:uid 65532@") for event in trail)


def refused(client: holdoff.Client) -> Exception | None:
    """Try to look at our token; return why not."""
    try:
        client.get_token(OURS)
    except holdoff.HoldoffError as error:
        return error
    return None


async def test_a_credential_is_changed_without_a_restart(service: GuardedService) -> None:
    """A file that is replaced counts from the next call on, in both clients.

    Fails when it is read once.
    """
    path, other = service.issue("viewer"), service.issue("custodian")
    with service.client(path) as client:
        with pytest.raises(holdoff.errors.NotAllowed):
            client.update_token(OURS, refresh_interval_seconds=0.2)
        async with holdoff.aio.Client(
            service.address, ca_file=service.files.ca, credential_file=path
        ) as also:
            other.replace(path)
            client.update_token(OURS, refresh_interval_seconds=0.2)
            await also.update_token(OURS, refresh_interval_seconds=0.1)


def test_who_may_no_more_hears_no_more(tmp_path: Path) -> None:
    """An access file that changes counts at the next call, and at the next news of a watch.

    A file that is wrong changes nothing, and is told. Fails when it is read at the start only, or
    a stream is admitted once.
    """
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(guarded(tmp_path))
        client = stack.enter_context(service.client(service.issue("viewer")))
        busy = stack.enter_context(service.client(service.issue("owner-1")))
        watch = client.watch_leases(OURS)
        next(watch)
        service.access_file.write_text(GRANTS.replace("role", "roll"))
        busy.update_token(OURS, refresh_interval_seconds=0.2)
        assert next(watch).change.status.token == OURS
        wait_until(lambda: any("the previous grants still apply" in line for line in service.log))
        service.access_file.write_text(
            GRANTS.replace('"credential:viewer"]', '"credential:nobody"]')
        )
        busy.update_token(OURS, refresh_interval_seconds=0.1)
        with pytest.raises(holdoff.errors.NotAllowed):
            for _ in watch:
                pass
        assert isinstance(refused(client), holdoff.errors.NotAllowed)


def test_a_refusal_is_in_the_audit_trail_once_a_minute(service: GuardedService) -> None:
    """With who, from where, for what, and what was missing; `holdoff audit` shows it.

    Fails when a flood of refusals fills the trail, or a refusal is not recorded.
    """
    with service.client(service.issue("nosy")) as nosy:
        for number in range(40):
            with pytest.raises(holdoff.errors.NotAllowed):
                nosy.get_token(f"{THEIRS}{number or ''}")
    operator = {"HOLDOFF_CREDENTIAL_FILE": str(service.issue("operator"))}
    asked = ("audit", "--kind", "call-refused", "--output", "json")
    events = json.loads(service.invoke(*asked, **operator).stdout)["events"]
    found = [event for event in events if event["identity"] == "credential:nosy"]
    assert len(found) <= 2 * 11  # the minute may end meanwhile
    [one] = [event for event in found if event["resource"] == THEIRS]
    assert one["reason"] == "GetToken: NOT_ALLOWED"
    assert one["peer"].startswith("ipv4:127.0.0.1:")
    table = service.invoke("audit", THEIRS, "--since", "1h", **operator)
    assert table.exit_code == 0, table.stderr
    assert "token created" in table.stdout
    assert "credential:operator from ipv4:127.0.0.1" in table.stdout.replace("\n", "")


def test_no_credential(service: GuardedService) -> None:
    """Whoever shows none is told what is missing; garbage is answered like a wrong one.

    Fails when a call without a credential is let through, or garbage ends in INTERNAL.
    """
    shown = service.invoke("token", "list")
    assert shown.exit_code == 77, shown.stderr
    assert "HOLDOFF_CREDENTIAL_FILE" in shown.stderr
    secure = grpc.ssl_channel_credentials(service.files.ca.read_bytes())
    with grpc.secure_channel(service.address, secure, NO_PROXY) as channel:
        method = "TokenService/GetToken"
        garbage = ["x", "Basic eDp5", "Bearer", "Bearer  ", "Bearer holdoff_x_y", "Bearer a" * 500]
        for text in garbage:
            error = call(channel, method, MATRIX[method][0], (("authorization", text),))
            assert isinstance(error, holdoff.errors.Unauthenticated), text
        for method, (request, _) in MATRIX.items():
            error = call(channel, method, request)
            assert isinstance(error, holdoff.errors.CredentialMissing), method


def test_a_credential_does_not_go_over_a_network_in_the_clear(tmp_path: Path) -> None:
    """Fails when the client sends it without TLS to another host, or reads nonsense as one."""
    path = tmp_path / "credential"
    path.write_text("holdoff_x_y\n")
    with pytest.raises(ValueError, match="in the clear"):
        holdoff.Client("coordinator.example:50051", credential_file=path)
    with holdoff.Client("localhost:1", credential_file=path):
        pass
    path.write_text("two words")
    with pytest.raises(ValueError, match="holds no credential"):
        holdoff.Client("localhost:1", credential_file=path)
    with pytest.raises(ValueError, match="No such file"):
        holdoff.Client("localhost:1", credential_file=tmp_path / "missing")


def test_a_credential_that_is_revoked_under_a_run_ends_it(service: GuardedService) -> None:
    """The next renewal is refused, and the command is ended before another can hold the token.

    Fails when renewals are not admitted anew.
    """
    path = service.issue("holder")
    environment = {**service.environment, "HOLDOFF_CREDENTIAL_FILE": str(path)}
    run = service.start_holdoff(
        "run", "--token", OURS, "--ttl", "3s", "--", "sleep", "60", env=environment
    )
    with service.client(service.issue("viewer")) as viewer:
        wait_until(lambda: list(viewer.list_leases(OURS)))
        [_, credential_id, _] = path.read_text().split("_", 2)
        assert service.token("revoke", credential_id).exit_code == 0
        _, stderr = run.communicate(timeout=30)
        assert run.returncode not in (0, None), stderr
        wait_until(lambda: not list(viewer.list_leases(OURS)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "grants"),
        ("grants = 3", "grants"),
        ("[[grants]]\nidentities = []\nrole = 'boss'\nresources = ['*']", "role"),
        (
            "[[grants]]\nidentities = ['ip:x']\nrole = 'admin'\nresources = ['tokens/x']",
            "resources",
        ),
        ("[[grants]]\nidentities = ['ip:x']\nrole = 'admin'\nresource = ['*']", "resource"),
        (
            "[[grants]]\nidentities = [\n 'dns:x', # not y\n 'y',]\nrole='admin'\nresources=['*']",
            "access.toml:4: the identity 'y' has no type: write \"credential:y\"",
        ),
        ("[[grants]\n", "access.toml:1: "),
        ("\udcff", "access.toml:1: is not UTF-8"),
    ],
)
def test_an_access_file_that_is_wrong_is_refused_at_the_start(
    tmp_path: Path, text: str, says: str
) -> None:
    """Exit code 64, with the file, the place, and what to write."""
    path = tmp_path / "access.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    options = ["--access-file", str(path), "--data-dir", str(tmp_path / "data")]
    done = coordinator_command("serve", *options)
    assert done.exit_code == 64
    assert str(path) in done.stderr
    assert says in done.stderr
    assert "viewer, reporter, holder, gateway, custodian, admin" in done.stderr or "no type" in says


def test_without_an_access_file_nobody_is_asked(tmp_path: Path) -> None:
    """Fails when a credential that comes all the same is looked at."""
    path = tmp_path / "credential"
    path.write_text("holdoff_x_y\n")
    with Service(tmp_path) as service, holdoff.Client(service.address, credential_file=path) as one:
        assert list(one.list_tokens()) == []
