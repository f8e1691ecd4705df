"""TLS between clients and coordinator: certificates of both sides, and how they change."""

from __future__ import annotations

import datetime as dt
import re
import ssl
import threading
import uuid
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

import holdoff
import holdoff.aio
from holdoff.v1 import lease_service_pb2, lease_service_pb2_grpc
from tests.e2e.service import Service
from tests.e2e.tls import Files, TlsService, with_certificate
from tests.harness import NO_PROXY, coordinator_command, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsService]:
    """Give a coordinator that asks for certificates, which the tests of this module share."""
    service = TlsService(tmp_path_factory.mktemp("tls"))
    service.environment["HOLDOFF_HEALTH_LISTEN"] = "127.0.0.1:0"
    with service:
        yield service


@pytest.fixture
def token() -> str:
    """Give the name of a token that is not there yet."""
    return f"apps/{uuid.uuid4().hex}/tokens/t"


async def test_all_clients_speak_mutual_tls(
    service: TlsService, tmp_path: Path, token: str
) -> None:
    """The wrapper, and both clients in Python; no key shows in a log.

    Fails when the channel, or one client, takes no certificate.
    """
    files = service.named(tmp_path, "etl@corp.example")
    with holdoff.Client(
        service.address, ca_file=files.ca, cert_file=files.cert, key_file=str(files.key)
    ) as client:
        client.create_token(token)
    environment = service.environment | with_certificate(files)
    done = service.holdoff("run", "--token", token, "--", "echo", "done", env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    async with holdoff.aio.Client(
        service.address, ca_file=files.ca, cert_file=files.cert, key_file=files.key
    ) as client:
        assert token in [one.name async for one in client.list_tokens()]
    wait_until(lambda: any(token in line and "released" in line for line in service.log))
    told = "".join(service.log)
    assert '"tls": true' in told
    assert "PRIVATE" not in told
    assert "insecure" not in told


def test_several_coordinators_have_the_name_of_the_first(
    service: TlsService, tmp_path: Path
) -> None:
    """Of two addresses the second answers.

    Fails when gRPC looks for a certificate that names the whole list.
    """
    files = service.named(tmp_path, "etl@corp.example")
    endpoint = f"127.0.0.1:1,{service.address}"
    with holdoff.Client(
        endpoint, ca_file=files.ca, cert_file=files.cert, key_file=files.key
    ) as client:
        assert list(client.list_tokens("apps/nothing")) == []


@pytest.mark.parametrize("what", ["plain", "no certificate", "expired", "stranger", "impostor"])
def test_who_is_not_known_gets_no_answer(service: TlsService, tmp_path: Path, what: str) -> None:
    """Exit code 69, and a text that says what it may be.

    Fails when certificates are not asked for, or not checked, on either side.
    """
    files = service.named(tmp_path, "etl@corp.example")
    other = trustme.CA()
    if what == "expired":
        files = service.named(tmp_path, "old@corp.example", not_after=YESTERDAY)
    elif what == "stranger":
        files.write(other.issue_cert("etl@corp.example"), service.authority)
    elif what == "impostor":
        files.write(service.authority.issue_cert("etl@corp.example"), other)
    variables: dict[str, str | None] = {**with_certificate(files)}
    if what in ("plain", "no certificate"):
        variables |= {"HOLDOFF_CERT_FILE": None, "HOLDOFF_KEY_FILE": None}
    if what == "plain":
        variables["HOLDOFF_CA_FILE"] = None
    refused = service.invoke("token", "list", **variables)
    assert refused.exit_code == 69, refused.stderr
    assert "no answer from the coordinator" in refused.stderr
    assert "HOLDOFF_CA_FILE" in refused.stderr


def test_what_one_began_another_cannot_take_over(
    service: TlsService, tmp_path: Path, token: str
) -> None:
    """A request id belongs to the name in the certificate that it came with.

    Fails when everybody is `anonymous`.
    """
    answers: list[str] = []
    for name in ("one@corp.example", "two@corp.example", "one@corp.example"):
        files = service.named(tmp_path, name)
        credentials = grpc.ssl_channel_credentials(
            files.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes()
        )
        with (
            holdoff.Client(
                service.address, ca_file=files.ca, cert_file=files.cert, key_file=files.key
            ) as client,
            grpc.secure_channel(service.address, credentials, NO_PROXY) as channel,
        ):
            if not answers:
                client.create_token(token)
            request = lease_service_pb2.AcquireLeaseRequest(
                token=token, request_id="6f1f3c1e-5d3a-4f5e-9d0e-0a3b1c2d3e4f"
            )
            request.ttl.FromSeconds(30)
            try:
                lease_service_pb2_grpc.LeaseServiceStub(channel).AcquireLease(request, timeout=10)
                answers.append("OK")
            except grpc.RpcError as error:
                answers.append(error.code().name)
    assert answers == ["OK", "INVALID_ARGUMENT", "OK"]


def test_a_certificate_changes_under_load(tmp_path: Path) -> None:
    """No call fails while the authority is replaced, then half of a pair, then all of it.

    Fails when the files are read at the start only, or half a pair is served.
    """
    with TlsService(tmp_path, mutual=False) as service:
        first, second = service.authority, trustme.CA()
        trusted = Files(tmp_path, "both")
        trusted.write(first.issue_cert("x"), first, second)
        calls, faults, stop = [0], [], threading.Event()

        def load() -> None:
            while not stop.is_set():
                try:
                    with holdoff.Client(service.address, ca_file=trusted.ca) as client:
                        list(client.list_tokens())
                    calls[0] += 1
                except holdoff.HoldoffError as error:
                    faults.append(str(error))

        def more() -> None:
            before = calls[0]
            wait_until(lambda: calls[0] > before + 20 or faults)

        loads = [threading.Thread(target=load) for _ in range(2)]
        for one in loads:
            one.start()
        try:
            more()
            leaf = second.issue_cert("127.0.0.1")
            service.files.cert.write_bytes(leaf.cert_chain_pems[0].bytes())  # and not its key
            wait_until(lambda: any("stays as it was" in line for line in service.log))
            more()
            service.files.write(leaf, second)
            wait_until(lambda: served(service) == leaf.cert_chain_pems[0].bytes().decode())
            more()
        finally:
            stop.set()
            for one in loads:
                one.join()
        assert faults == []


def served(service: Service) -> str:
    """Return the certificate that a new connection gets."""
    host, _, port = service.address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


def test_health_is_asked_in_the_clear(service: TlsService) -> None:
    """Kubernetes' probes speak no TLS: for them is a port that answers nothing else.

    Fails when the port is not opened, or serves more than health.
    """
    line = wait_until(lambda: next((one for one in service.log if "health" in one), ""))
    address = re.search(r'"health": "([^"]+)"', line)
    assert address
    with grpc.insecure_channel(address[1], NO_PROXY) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert answer.status == SERVING
        with pytest.raises(grpc.RpcError) as refused:
            lease_service_pb2_grpc.LeaseServiceStub(channel).ListLeases(
                lease_service_pb2.ListLeasesRequest(), timeout=10
            )
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


# Mistakes ------------------------------------------------------------------------------------


def serve(folder: Path, *arguments: str) -> Result:
    """Start a coordinator that is not to start."""
    return coordinator_command("serve", "--data-dir", str(folder / "data"), *arguments)


def test_beyond_loopback_only_with_certificates_or_if_told(tmp_path: Path) -> None:
    """TLS alone does not say who calls; `--insecure` is said again at each start.

    Fails when such an address is served without a word.
    """
    service = TlsService(tmp_path)
    tls = ("--tls-cert-file", str(service.files.cert), "--tls-key-file", str(service.files.key))
    for options in ((), tls):
        refused = serve(tmp_path, "--listen", "0.0.0.0:0", *options)
        assert refused.exit_code == 64
        assert "tls_client_ca_file" in refused.stderr
        assert "insecure" in refused.stderr
    service.address = "0.0.0.0:0"
    with service:
        assert not [line for line in service.log if "insecure" in line]
    plain = Service(tmp_path)
    plain.address, plain.environment["HOLDOFF_INSECURE"] = "0.0.0.0:0", "1"
    with plain:
        wait_until(lambda: any("insecure" in line for line in plain.log))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["cert"], "belong together"),
        (["client-ca"], "needs tls_cert_file"),
        (["cert=missing", "key"], "cannot read missing: No such file"),
        (["cert", "key=other"], "other.key is of no use for TLS"),
        (["cert=ca.txt", "key"], "ca.txt with the key"),
        (["cert", "key", "client-ca=ca.txt"], "ca.txt is of no use for TLS"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, options: list[str], says: str) -> None:
    """64, and the file that is wrong, before anything is served."""
    own = TlsService(tmp_path).files
    other = Files(tmp_path, "other")
    other.write(trustme.CA().issue_cert("127.0.0.1"))
    (tmp_path / "ca.txt").write_text("no PEM at all")
    paths = {"cert": own.cert, "key": own.key, "client-ca": own.ca}
    arguments = []
    for option in options:
        name, _, path = option.partition("=")
        path = {"": str(paths[name]), "other": str(other.key)}.get(path, path)
        path = str(tmp_path / path) if path == "ca.txt" else path
        arguments += [f"--tls-{name}-file", path]
    refused = serve(tmp_path, *arguments)
    assert refused.exit_code == 64
    assert says in refused.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"HOLDOFF_CERT_FILE": "x"}, "give a CA file (HOLDOFF_CA_FILE)"),
        ({"HOLDOFF_CA_FILE": "missing"}, "cannot read missing: No such file"),
        ({"HOLDOFF_CA_FILE": "{ca}", "HOLDOFF_KEY_FILE": "x"}, "belong together"),
        ({"HOLDOFF_CA_FILE": "{key}"}, "is of no use for TLS"),
        (
            {"HOLDOFF_CA_FILE": "{ca}", "HOLDOFF_CERT_FILE": "{cert}", "HOLDOFF_KEY_FILE": "{ca}"},
            "is of no use for TLS",
        ),
    ],
)
def test_files_of_a_client_that_cannot_be(
    tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    """64, and which file or variable it is."""
    files = TlsService(tmp_path).files
    paths = {"ca": str(files.ca), "cert": str(files.cert), "key": str(files.key)}
    given = {name: value.format(**paths) for name, value in variables.items()}
    refused = Service(tmp_path).invoke("token", "list", **given)
    assert refused.exit_code == 64, refused.stderr
    assert says in refused.stderr
