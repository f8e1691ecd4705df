"""A grant in custody of a real coordinator, which is started and asked as an operator does."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

from tests.custodian import CLIENT_SECRET, REFRESH_TOKEN, key_directory
from tests.e2e.service import Service

if TYPE_CHECKING:
    from pathlib import Path

SIMULATED = """\
like = "exact-online"
name = "simulated"
[oauth]
token_urls = ["http://127.0.0.1:8080/api/oauth2/token"]
hosts = ["127.0.0.1:8080"]
"""


def test_a_grant_survives_a_restart(tmp_path: Path) -> None:
    """Promises 8 and 9: it is put from a file and stdin, kept encrypted, and is there afterwards.

    Fails when the options do not reach the coordinator, or a secret reaches its directory or log.
    """
    keys = tmp_path / "keys"
    keys.mkdir()
    service = Service(tmp_path, policies={"simulated": SIMULATED})
    service.environment |= {
        "HOLDOFF_CUSTODY_KEY_DIR": str(key_directory(keys, "first")),
        "HOLDOFF_CUSTODY_LOOPBACK_HTTP": "true",
    }
    secret, refresh_token = tmp_path / "client.secret", tmp_path / "refresh.token"
    secret.write_text(CLIENT_SECRET)
    refresh_token.write_text(f"{REFRESH_TOKEN}\n")
    token = "apps/e2e/tokens/kept"
    with service:
        assert any("custody without an access file" in line for line in service.log)
        with service.asked() as client:
            client.create_token(token, policy="simulated")
        words = ["--client-id", "ours", "--client-secret-file", str(secret), "--output", "json"]
        with refresh_token.open() as stdin:
            done = service.holdoff("grant", "put", token, *words, stdin=stdin)
        grant = json.loads(done.stdout)
        assert grant["token_url"].startswith("http://127.0.0.1:8080/")
        assert grant["status"]["state"] == "GRANT_STATE_COOLING"
        log = "".join(service.log)
        for file in (secret, refresh_token):
            file.unlink()
        service.end(signal.SIGTERM)
        service.start()
        kept = service.json("grant", "show", token)
        assert (kept["etag"], kept["key_id"]) == (grant["etag"], "first")
        assert kept["not_before_time"] == grant["not_before_time"]
        log += "".join(service.log)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"sealed_grant" in one for one in written)
    for text in (REFRESH_TOKEN, CLIENT_SECRET):
        assert text not in log
        assert not any(text.encode() in one for one in written)
