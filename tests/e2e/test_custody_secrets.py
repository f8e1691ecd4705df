"""Where the secrets of custody may be found while real processes use them, and after a crash."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tests.custodian import key_directory
from tests.e2e.service import BIN, Service
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT_SECRET = "a-client-secret-that-nobody-may-read"
REFRESH_TOKEN = "a-refresh-token-that-nobody-may-read"
TOKEN = "apps/e2e/tokens/secret"
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


def test_secrets_are_nowhere(tmp_path: Path) -> None:
    """Neither on disk, nor in a log, a metric, or the arguments or environment of a process.

    A grant is put, refreshed, handed out and checked; then the coordinator crashes.
    """
    kept = tmp_path / "kept"
    (kept / "keys").mkdir(parents=True)
    for name, text in (("secret", CLIENT_SECRET), ("refresh", REFRESH_TOKEN)):
        (tmp_path / name).write_text(text)
    with provider(tmp_path) as address, Processes() as seen:
        service = Service(kept, policies={"simulated": POLICY.format(address=address)})
        metrics = f"127.0.0.1:{free_port()}"
        service.environment |= {
            "HOLDOFF_CUSTODY_KEY_DIR": str(key_directory(kept / "keys", "first")),
            "HOLDOFF_CUSTODY_LOOPBACK_HTTP": "true",
            "HOLDOFF_METRICS_LISTEN": metrics,
        }
        with service:
            with service.asked() as client:
                client.create_token(TOKEN, policy="simulated")
            files = ["--client-secret-file", str(tmp_path / "secret")]
            files += ["--refresh-token-file", str(tmp_path / "refresh")]
            words = ["--client-id", "ours", "--last-refreshed", "1h", *files]
            service.holdoff("grant", "put", TOKEN, *words)
            access_token = service.holdoff("grant", "access-token", TOKEN).stdout.strip()
            assert len(access_token) > 20
            for command in ("show", "show --check", "list"):
                service.holdoff("grant", *command.split(), *([TOKEN] if "show" in command else []))
            with urllib.request.urlopen(f"http://{metrics}/metrics") as response:
                shown = response.read()
            log = "".join(service.log)
            service.end(signal.SIGABRT)
            service.start()
            assert service.json("grant", "show", TOKEN)["generation"] == "2"
            log += "".join(service.log)
    written = [path.read_bytes() for path in kept.rglob("*") if path.is_file()]
    assert any(b"sealed_access" in one for one in written)
    assert not list(Path.cwd().glob("core*"))
    for secret in (CLIENT_SECRET, REFRESH_TOKEN, access_token):
        assert secret not in log
        assert secret.encode() not in shown
        assert not any(secret.encode() in one for one in written)
        assert not any(secret.encode() in one for one in seen)
    assert any(b"holdoff-coordinator" in one for one in seen)
