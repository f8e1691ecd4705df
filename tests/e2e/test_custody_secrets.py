"""Where the secrets of custody may be found while real processes use them, and after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from holdoff.v1 import grant_pb2
from tests.custodian import key_directory
from tests.e2e.service import BIN, Service
from tests.e2e.test_tracing import collecting
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff import Client

CLIENT_SECRET = "a-client-secret-that-nobody-may-read"
REFRESH_TOKEN = "a-refresh-token-that-nobody-may-read"
TOKEN = "apps/e2e/tokens/secret"
DEAD_TOKEN, CUT_TOKEN = "apps/dead/tokens/secret", "apps/cut/tokens/secret"
REFRESH_TOKENS = {
    TOKEN: REFRESH_TOKEN,
    DEAD_TOKEN: "a-refresh-token-that-the-provider-refuses",
    CUT_TOKEN: "a-refresh-token-of-a-request-that-is-cut-off",
}
SEED = f"""\
[[seeds]]
client_id = "ours"
client_secret = "{CLIENT_SECRET}"
user = "finance@example.com"
refresh_token = "{REFRESH_TOKEN}"
divisions = [535193]
"""
POLICY = """\
like = "exact-online"
name = "simulated"
[oauth]
token_urls = ["http://{address}/api/oauth2/token"]
hosts = ["{address}"]
"""


class Processes:
    """What all processes of this machine show to others: arguments and environments."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            for kind in ("cmdline", "environ"):
                for path in Path("/proc").glob(f"[0-9]*/{kind}"):
                    with contextlib.suppress(OSError):
                        self.seen.add(path.read_bytes())

    def __enter__(self) -> set[bytes]:
        self._thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextlib.contextmanager
def provider(folder: Path) -> Iterator[str]:
    """Run a simulated provider that knows the refresh token; give its address."""
    (folder / "seeds.toml").write_text(SEED)
    address = f"127.0.0.1:{free_port()}"
    command = [str(BIN / "holdoff"), "simulator", "serve", "--listen", address]
    process = subprocess.Popen(
        [*command, "--seed-file", str(folder / "seeds.toml")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert address in process.stdout.readline()
        yield address
    finally:
        process.kill()
        process.communicate()


def senders(parent: int) -> list[int]:
    """List the processes of a coordinator that make a request."""
    found = []
    for child in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in child.read_text().split():
            with contextlib.suppress(OSError):
                if b"custody.sender" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


def crash_sender(service: Service, client: Client, address: str) -> None:
    """Let the process that makes a request crash while the provider does not answer."""
    fault = {"fault": "hang", "path": "/api/oauth2/token", "seconds": 600}
    faults = f"http://{address}/_simulator/faults"
    with urllib.request.urlopen(faults, json.dumps(fault).encode()) as response:
        assert response.status == 200

    def last() -> grant_pb2.RefreshAttempt:
        return client.grants.get(CUT_TOKEN).last_attempt

    with client.access_token(CUT_TOKEN):
        wait_until(lambda: last().step == grant_pb2.REFRESH_STEP_INTENDED)
        [sender] = senders(service.process.pid)
        os.kill(sender, signal.SIGABRT)
        wait_until(lambda: last().outcome)
    assert "the sending process ended" in client.grants.get(CUT_TOKEN).last_attempt.outcome
    assert client.grants.get(CUT_TOKEN).generation == 1


def test_secrets_are_nowhere(tmp_path: Path) -> None:
    """Neither on disk, nor in a log, metric, trace, or the arguments or environment of a process.

    A grant is put, refreshed, handed out and checked; the provider refuses that of another token;
    a process that makes a request crashes; then the coordinator does.
    """
    kept = tmp_path / "kept"
    (kept / "keys").mkdir(parents=True)
    (tmp_path / "secret").write_text(CLIENT_SECRET)
    with provider(tmp_path) as address, Processes() as seen, collecting() as (traced, variables):
        service = Service(kept, policies={"simulated": POLICY.format(address=address)})
        metrics = f"127.0.0.1:{free_port()}"
        service.environment |= {
            "HOLDOFF_CUSTODY_KEY_DIR": str(key_directory(kept / "keys", "first")),
            "HOLDOFF_CUSTODY_LOOPBACK_HTTP": "true",
            "HOLDOFF_METRICS_LISTEN": metrics,
            **variables,
        }
        with service:
            words = ["--client-id", "ours", "--last-refreshed", "1h"]
            words += ["--client-secret-file", str(tmp_path / "secret")]
            for token, text in REFRESH_TOKENS.items():
                with service.asked() as client:
                    client.create_token(token, policy="simulated")
                (tmp_path / "refresh").write_text(text)
                put = ["grant", "put", token, *words]
                service.holdoff(*put, "--refresh-token-file", str(tmp_path / "refresh"))
            access_token = service.holdoff("grant", "access-token", TOKEN).stdout.strip()
            assert len(access_token) > 20
            for command in ("show", "show --check", "list"):
                service.holdoff("grant", *command.split(), *([TOKEN] if "show" in command else []))
            refused = service.holdoff("grant", "access-token", DEAD_TOKEN)
            assert "the refresh token dead" in refused.stderr
            with service.asked() as client:
                crash_sender(service, client, address)
            with urllib.request.urlopen(f"http://{metrics}/metrics") as response:
                shown = response.read()
            wait_until(lambda: b"script end_refresh" in traced.all())
            log = "".join(service.log)
            service.end(signal.SIGABRT)
            service.start()
            assert service.json("grant", "show", TOKEN)["generation"] == "2"
            log += "".join(service.log)
            said = refused.stdout + refused.stderr
    traces = traced.all()
    written = [path.read_bytes() for path in kept.rglob("*") if path.is_file()]
    assert any(b"sealed_access" in one for one in written)
    assert b"GetAccessToken" in traces
    for expected in ("custody needs attention", "refused (dead)"):
        assert expected in log
    assert not list(Path.cwd().glob("core*"))
    for secret in (CLIENT_SECRET, *REFRESH_TOKENS.values(), access_token):
        assert secret not in log + said
        assert secret.encode() not in traces
        assert secret.encode() not in shown
        assert not any(secret.encode() in one for one in written)
        assert not any(secret.encode() in one for one in seen)
    assert any(b"holdoff-coordinator" in one for one in seen)
