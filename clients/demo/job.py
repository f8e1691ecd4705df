"""A job as companies run them from a scheduler: refresh, store, call the API, end.

It is an ordinary OAuth client and knows nothing of Holdoff. Its grant is a JSON
file that all hosts share, with `token_url`, `api_url`, `client_id`,
`client_secret`, `refresh_token` and `divisions`. With `--bug` it calls the API in
a way that the provider refuses, again and again, and prints what Data Hub prints.

Exit codes are Data Hub's: 0 when all went well, 2 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

ATTEMPTS = 4
RETRY_PAUSE_SECONDS = 0.25
TIMEOUT_SECONDS = 10
ENDPOINTS = ("crm/Accounts", "logistics/Items", "salesinvoice/SalesInvoices")

BUG_ENDPOINT = "financial/GLAccounts"
BUG_CALLS = 6
BUG_PAUSE_SECONDS = 0.3


class Job:
    """One run of the job.

    Args:
        grant_file: the file that all hosts share.
        name: who this is, for the log and the User-Agent.
        bug: whether it does what it does wrongly.
    """

    def __init__(self, grant_file: Path, name: str, *, bug: bool) -> None:
        self._grant_file = grant_file
        self._name = name
        self._call = self._look_up if bug else self._call_all

    def run(self) -> int:
        """Do the job and return its exit code."""
        self._log("started")
        try:
            access_token = self._refresh()
            if access_token is None:
                return 2
            grant = self._read_grant()
            return 0 if self._call(grant, access_token) else 2
        except OSError as error:  # the provider or the grant file is out of reach
            self._log(f"failed: {error}")
            return 2

    def _refresh(self) -> str | None:
        """Trade the refresh token for an access token, trying a few times as clients do."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(RETRY_PAUSE_SECONDS)
            grant = self._read_grant()  # again each time: another host may have renewed it
            form = {
                "grant_type": "refresh_token",
                "client_id": grant["client_id"],
                "client_secret": grant["client_secret"],
                "refresh_token": grant["refresh_token"],
            }
            status, body = self._send(grant["token_url"], urllib.parse.urlencode(form).encode())
            if status == 200:  # noqa: PLR2004 -- HTTP's OK
                # Before anything else: the provider may refuse the old one from now on.
                self._write_grant({**grant, "refresh_token": body["refresh_token"]})
                self._log(f"token: {status}")
                return str(body["access_token"])
            self._log(f"token: {status} {body.get('error_description', '')}")
        return None

    def _call_all(self, grant: dict[str, Any], access_token: str) -> bool:
        """Read each endpoint once and tell whether all answered."""
        headers = {"Authorization": f"Bearer {access_token}"}
        succeeded = True
        for endpoint in ENDPOINTS:
            url = f"{grant['api_url']}/{grant['divisions'][0]}/{endpoint}"
            status, _ = self._send(url, headers=headers)
            self._log(f"{endpoint}: {status}")
            succeeded = succeeded and status == 200  # noqa: PLR2004 -- HTTP's OK
        return succeeded

    def _look_up(self, grant: dict[str, Any], access_token: str) -> bool:
        """Look ledger accounts up, each with a filter that lacks its last quote: a 400 each time.

        Like many a job it does not stop there: maybe the next account is better.
        """
        headers = {"Authorization": f"Bearer {access_token}"}
        accounts = f"{grant['api_url']}/{grant['divisions'][0]}/{BUG_ENDPOINT}"
        succeeded = True
        for code in range(1000, 1000 + BUG_CALLS):
            url = accounts + "?$filter=" + urllib.parse.quote(f"Code eq '{code}")
            status, _ = self._send(url, headers=headers)
            if status != 200:  # noqa: PLR2004 -- HTTP's OK
                succeeded = False
                self._log(f"The remote server returned an error: ({status}).\n{url}")
            time.sleep(BUG_PAUSE_SECONDS)
        return succeeded

    def _send(
        self, url: str, form: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a request; an error status is an answer too."""
        headers = {"User-Agent": self._name, "Accept": "application/json", **(headers or {})}
        request = urllib.request.Request(url, form, headers)  # noqa: S310 -- the grant's own URL
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def _read_grant(self) -> dict[str, Any]:
        grant: dict[str, Any] = json.loads(self._grant_file.read_bytes())
        return grant

    def _write_grant(self, grant: dict[str, Any]) -> None:
        """Replace the grant in one step, so that no host ever reads half of it."""
        descriptor, name = tempfile.mkstemp(dir=self._grant_file.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(grant, file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(self._grant_file)

    def _log(self, text: str) -> None:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
        sys.stdout.write(f"{now} {self._name} {text}\n")
        sys.stdout.flush()


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Refresh a token and call an API with it.")
    parser.add_argument("grant_file", type=Path, help="JSON file with the grant, shared by hosts")
    parser.add_argument("--name", required=True, help="who this is, sent as the User-Agent")
    parser.add_argument("--bug", action="store_true", help="make calls that the API refuses")
    arguments = parser.parse_args()
    return Job(arguments.grant_file, arguments.name, bug=arguments.bug).run()


if __name__ == "__main__":
    sys.exit(main())
