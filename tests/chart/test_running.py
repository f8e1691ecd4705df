"""What the chart's containers run is run here, with the rendered files, environment and probes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.chart.helm import Rendering, render
from tests.e2e.service import BIN
from tests.harness import LONG, NO_PROXY, wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.conftest import StartValkey
    from tests.stores import Store

# Where the code is, if not in the environment that these tests run in.
CODE = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
SECRET = "a password of the store"
ValuesAndSecrets = tuple[dict[str, Any], dict[str, Any]]
POLICY = 'name = "ours"\ntitle = "Ours"\n\n[refresh]\ninterval = "5s"\n'

MODES = ("embedded", "external", "sentinel", "cluster")
CALLERS = ("by credential", "by certificate", "by TLS alone", "without TLS")
# Each mode of store and each way to call; at length, each mode with each way.
PAIRS = [*itertools.product(MODES, CALLERS)] if LONG else [*zip(MODES, CALLERS, strict=True)]


def listens(port: int) -> bool:
    """Tell whether something listens on a port of the loopback address."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


class Pod:
    """A pod of the chart as processes of this machine.

    Its folders lie below one of ours, its ports are free ones of the loopback address, and of the
    Secrets it is given the text; the rest is as rendered.
    """

    def __init__(self, rendering: Rendering, folder: Path, secrets: Mapping[str, Any]) -> None:
        self._rendering = rendering
        self._folder = folder
        self._secrets = secrets
        self.ports = {port: free_port() for port in (50051, 50052, 9090)}

    def start(self, pod: Mapping[str, Any]) -> subprocess.Popen[str]:
        """Start the only container of a pod."""
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            self._mount(volumes.get(mount["name"], {}), self._folder / mount["mountPath"][1:])
        variables = {one["name"]: self.here(one["value"]) for one in container.get("env", [])}
        return subprocess.Popen(
            [self.here(word) for word in (*container["command"], *container["args"])],
            env={**CODE, "PATH": f"{BIN}:/usr/bin:/bin", **variables},
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def here(self, word: str) -> str:
        """Put a path or an address of the pod where it is on this machine."""
        word = re.sub(r"/(etc|var/lib)/holdoff|^/tmp$", lambda it: f"{self._folder}{it[0]}", word)
        return re.sub(
            r"(?:0\.0\.0\.0|holdoff\.prod\.svc):(\d+)",
            lambda it: f"127.0.0.1:{self.ports[int(it[1])]}",
            word,
        )

    def _mount(self, volume: Mapping[str, Any], folder: Path) -> None:
        """Lay the files down as the kubelet does: links to links, which it swaps at a change."""
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            texts = self._rendering.manifests[f"ConfigMap/{name}"]["data"]
        else:
            texts = self._secrets.get(volume.get("secret", {}).get("secretName"), {})
        if not texts or (folder / "..data").exists():
            return
        (folder / "..1").mkdir()
        (folder / "..data").symlink_to("..1")
        for name, text in texts.items():
            (folder / "..1" / name).write_text(text)
            (folder / name).symlink_to(f"..data/{name}")

    def probe(self, probe: Mapping[str, Any]) -> bool:
        """Ask as the kubelet does: in plain text, without credentials."""
        port = self.ports[probe["grpc"]["port"]]
        if not listens(port):  # which is cheaper to ask than gRPC
            return False
        with grpc.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(
                    health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", "")),
                    timeout=10,
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.contextmanager
def running(pod: Pod, specification: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Run a coordinator until its probes say that it serves; then end it as the kubelet does."""
    process = pod.start(specification)
    try:
        container = specification["containers"][0]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = functools.partial(pod.probe, container[kind])
            wait_until(lambda: process.poll() is not None or asked(), 60)  # noqa: B023 - used at once
        assert process.poll() is None, process.communicate()[0]
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=specification["terminationGracePeriodSeconds"])
    assert process.returncode == 0


def lease(pod: Pod, rendering: Rendering) -> None:
    """Run the pod of `helm test`."""
    process = pod.start(rendering.manifests["Pod/holdoff-test"]["spec"])
    output, _none = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "took a lease" in output


def issue(pod: Pod, rendering: Rendering) -> str:
    """Issue the credential of `helm test` by the command of the notes."""
    [command] = re.findall(r"-- (holdoff-coordinator token issue .*)", rendering.notes)
    return subprocess.run(
        ["bash", "-c", pod.here(command).replace("IDENTITY", "'helm test'")],
        env={**CODE, "PATH": f"{BIN}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def store(request: pytest.FixtureRequest, start_valkey: StartValkey) -> ValuesAndSecrets:
    """Give the values of a mode of store, and the Secrets that they name."""
    mode = request.param
    values: dict[str, Any] = {"mode": mode}
    if mode == "embedded":
        return values, {}
    if mode == "external":
        url = start_valkey("--requirepass", SECRET, password=SECRET).url
        url = re.sub(r"//:[^@]*@", "//", url)
        values |= {"urlSecret": {"name": "url"}, "passwordSecret": {"name": "password"}}
        return values, {"url": {"url": url}, "password": {"password": SECRET}}
    fixture = {"sentinel": "watched_primary", "cluster": "three_nodes"}[mode]
    servers: Store = request.getfixturevalue(fixture)
    return values | {mode: {"url": servers.url}}, {}


def secured(caller: str) -> ValuesAndSecrets:
    """Return the values of TLS for a way to call, and the Secrets that they name."""
    authority = trustme.CA()
    ca = authority.cert_pem.bytes().decode()

    def secret(name: str) -> dict[str, str]:
        leaf = authority.issue_cert(name)
        chain = "".join(one.bytes().decode() for one in leaf.cert_chain_pems)
        return {"tls.crt": chain, "tls.key": leaf.private_key_pem.bytes().decode(), "ca.crt": ca}

    values: dict[str, Any] = {"tls": {"secretName": "server"}}
    if caller == "by certificate":
        values["tls"]["clientCA"] = {"secretName": "client"}
        values["test"] = {"certificateSecret": "client"}
    elif caller == "by credential":
        grants = [
            {
                "identities": ["credential:helm test"],
                "role": role,
                "resources": ["apps/helm-test/tokens/*"],
            }
            for role in ("custodian", "holder")
        ]
        values |= {"access": {"grants": grants}, "test": {"credentialSecret": {"name": "who"}}}
    return values, {"server": secret("127.0.0.1"), "client": secret("test@corp.example")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("store", "caller"), PAIRS, indirect=["store"])
def test_every_mode_serves_and_gives_leases(
    store: ValuesAndSecrets, caller: str, tmp_path: Path
) -> None:
    """Fails when an argument is misspelt, a file is mounted elsewhere, or probes ask the TLS port.

    It also fails when `helm test` does not say who it is or cannot run twice, and when the metrics
    are at another port than the Service and the ServiceMonitor say.
    """
    plain = caller == "without TLS"
    values, secrets = ({"metrics": {"enabled": True}}, {}) if plain else secured(caller)
    secrets |= store[1]
    rendering = render({"store": store[0], "policies": {"ours": POLICY}, **values})
    pod = Pod(rendering, tmp_path, secrets)
    with running(pod, rendering.pod()) as process:
        line = Path(f"/proc/{process.pid}/cmdline").read_text()
        environment = Path(f"/proc/{process.pid}/environ").read_text()
        assert SECRET not in line + environment
        if caller == "by credential":
            secrets["who"] = {"credential": issue(pod, rendering)}
        lease(pod, rendering)
        if plain:
            lease(pod, rendering)  # whose token is there now
            url = f"http://127.0.0.1:{pod.ports[9090]}/metrics"
            with urllib.request.urlopen(url, timeout=30) as page:
                assert b'kind="lease_granted"} 2.0' in page.read()
