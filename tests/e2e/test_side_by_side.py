"""Two `holdoff run` side by side on one token in custody, which the coordinator refreshes."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from typing import TYPE_CHECKING

import holdoff
from holdoff.testing import custody
from tests.e2e.service import BIN
from tests.harness import wait_until

if TYPE_CHECKING:
    from pathlib import Path

SHOW = 'read go; cat "$HOLDOFF_ACCESS_TOKEN_FILE"'
JOB = f"echo started; {SHOW}; {SHOW}"


def test_two_runs_use_one_access_token(tmp_path: Path) -> None:
    """Both run at once, see one access token, and the same renewal: two requests in all.

    Fails when one waits for the other, when a lease holds up the refresh, or begins a cooldown.
    """
    with custody() as one, holdoff.Client(one.endpoint) as client:
        runs = []
        for name in ("a", "b"):
            environment = {
                **os.environ,
                "HOLDOFF_ENDPOINT": one.endpoint,
                "XDG_STATE_HOME": str(tmp_path / name),
            }
            result = str(tmp_path / f"{name}.json")
            options = [
                "--result-file",
                result,
                "--token",
                one.token,
                "--access-token-file",
                str(tmp_path / f"{name}.token"),
            ]
            runs.append(
                subprocess.Popen(
                    [BIN / "holdoff", "run", *options, "--", "sh", "-c", JOB],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        try:
            for run in runs:
                assert run.stdout
                assert run.stdout.readline() == "started\n"
            assert client.get_token(one.token).shared_lease_count == len(runs)
            first = {_token_of(run) for run in runs}
            assert len(first) == 1
            one.pass_seconds(575)
            [current] = first
            wait_until(lambda: _differ(tmp_path, current))
            second = {_token_of(run) for run in runs}
            assert len(second) == 1
            assert second != first
            assert [run.wait(30) for run in runs] == [0, 0]
        finally:
            for run in runs:
                run.kill()
                run.communicate(timeout=40)
        for name in ("a", "b"):
            assert json.loads((tmp_path / f"{name}.json").read_text())["lease_mode"] == "shared"
        with urllib.request.urlopen(f"{one.provider}/_simulator/report") as response:  # noqa: S310
            report = json.load(response)
        assert report["token_requests"]["accepted"] == 2
        assert report["agents"]["holdoff"]["violations"] == 0


def _token_of(run: subprocess.Popen[str]) -> str:
    """Let a job print its access token."""
    assert run.stdin
    assert run.stdout
    run.stdin.write("\n")
    run.stdin.flush()
    return run.stdout.readline()


def _differ(folder: Path, access_token: str) -> bool:
    """Tell whether both files have another access token than this one."""
    found = [folder / f"{name}.token" for name in ("a", "b")]
    return all(file.exists() and file.read_text() not in {"", access_token} for file in found)
