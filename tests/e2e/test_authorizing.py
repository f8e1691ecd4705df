"""A coordinator that is killed while it exchanges the code of an authorization."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

import holdoff
from holdoff import errors
from tests.custodian import key_directory
from tests.e2e.service import Service
from tests.e2e.test_custody_secrets import CLIENT_SECRET, POLICY, TOKEN, provider
from tests.harness import wait_until

if TYPE_CHECKING:
    from pathlib import Path

REDIRECT = "https://app.example.com/callback"


def test_a_kill_during_the_exchange_loses_nothing(tmp_path: Path) -> None:
    """The answer is in the spool, and becomes the grant when the coordinator is back.

    Fails when the answer to a code is not kept in the spool, or not adopted.
    """
    (tmp_path / "keys").mkdir()
    with provider(tmp_path) as address:
        policy = POLICY.format(address=address)
        policy += f'authorization_urls = ["http://{address}/api/oauth2/auth"]\n'
        service = Service(tmp_path, policies={"simulated": policy})
        service.environment |= {
            "HOLDOFF_CUSTODY_KEY_DIR": str(key_directory(tmp_path / "keys", "first")),
            "HOLDOFF_CUSTODY_LOOPBACK_HTTP": "true",
        }
        with service:
            with service.asked() as client:
                client.create_token(TOKEN, policy="simulated")
                begun = client.grants.begin_authorization(
                    TOKEN,
                    client_id="ours",
                    client_secret=CLIENT_SECRET,
                    redirect_uri=REDIRECT,
                )
            code = _allow(begun.authorization_url)
            fault = {"fault": "late-answer", "seconds": 2, "path": "/api/oauth2/token"}
            _ask(address, "faults", fault)
            completing = threading.Thread(target=_complete, args=(service, begun.state, code))
            completing.start()
            wait_until(lambda: _accepted(address) == 1)
            service.end(signal.SIGKILL)
            completing.join()
            wait_until(lambda: [*(service.data_dir / "spool").glob("[!.]*")])
            service.start()
            with service.asked() as client:
                wait_until(lambda: [*client.grants.list()])
                grant = client.grants.get(TOKEN)
                assert grant.generation == 1
                with client.access_token(TOKEN) as access:
                    assert access.current(20)
            assert _accepted(address) == 1


def _allow(url: str) -> str:
    """Allow the app; return the code."""
    parts = urlsplit(f"{url}&user=finance@example.com")
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("GET", f"{parts.path}?{parts.query}")
    location = connection.getresponse().headers["Location"]
    connection.close()
    return parse_qs(urlsplit(location).query)["code"][0]


def _complete(service: Service, state: str, code: str) -> None:
    with holdoff.Client(service.address) as client, pytest.raises(errors.HoldoffError):
        client.grants.complete_authorization(TOKEN, state, code=code)


def _ask(address: str, what: str, document: object) -> None:
    url = f"http://{address}/_simulator/{what}"
    urllib.request.urlopen(url, json.dumps(document).encode()).close()


def _accepted(address: str) -> int:
    with urllib.request.urlopen(f"http://{address}/_simulator/report") as answer:
        accepted: int = json.load(answer)["token_requests"]["accepted"]
    return accepted
