"""What `deploy/` holds: the coordinator as a service of systemd."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import holdoff
from holdoff_coordinator.settings import Settings
from tests.e2e.service import BIN, Service

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "holdoff-coordinator.service"
PROGRAM = "/opt/holdoff/bin/holdoff-coordinator"
NO_EXECUTABLE_MEMORY = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE; a Linux before 6.3 does not know it
os.execvp(sys.argv[1], sys.argv[1:])
"""
NEEDS_SYSTEMD = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not installed"
)


def settings() -> dict[str, list[str]]:
    """Return the settings of the unit's service."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


class Hardened(Service):
    """The unit's command with its environment, and what of its sandbox can be had without systemd.

    Memory that is written is never executed, privileges cannot be gained, and all capabilities
    are gone.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (environment,) = settings()["Environment"]
        variables = dict(word.split("=", 1) for word in environment.split())
        assert variables["HOLDOFF_DEFAULT_DATA_DIR"] == "%S/holdoff"
        self.data_dir = folder / "holdoff"
        self.environment |= variables | {"HOLDOFF_DEFAULT_DATA_DIR": str(self.data_dir)}

    def command(self) -> list[str]:
        """Return the command line."""
        (start,) = settings()["ExecStart"]
        self.environment["HOLDOFF_LISTEN"] = self.address
        program = shlex.split(start.replace(PROGRAM, str(BIN / "holdoff-coordinator")))
        privileges = ["setpriv", "--no-new-privs", "--inh-caps=-all"]
        if os.geteuid() == 0:
            privileges.append("--bounding-set=-all")
        return [sys.executable, "-c", NO_EXECUTABLE_MEMORY, *privileges, *program]


def test_the_service_runs_in_its_sandbox(tmp_path: Path) -> None:
    """It serves, and TERM ends it and its store within the time that systemd gives.

    Fails when a variable is none of ours, or the store needs what the unit denies.
    """
    with Hardened(tmp_path) as service:
        with holdoff.Client(service.address) as client:
            client.create_token("apps/a/tokens/t")
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        store = service.valkey_pid()
        service.process.terminate()
        (stop,) = settings()["TimeoutStopSec"]
        assert service.process.wait(float(stop.removesuffix("s"))) == 0
        assert not Path(f"/proc/{store}").exists()
        assert list(service.data_dir.rglob("*.aof"))


@NEEDS_SYSTEMD
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Without a word; and it finds little that the service may do beyond what it needs.

    Fails with a misspelt setting, or when half of the sandbox is taken out.
    """
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, str(BIN / "holdoff-coordinator")))
    verify = ["systemd-analyze", "verify", str(copy)]
    verified = subprocess.run(verify, check=False, capture_output=True, text=True)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    judge = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=15"]
    judged = subprocess.run([*judge, str(copy)], check=False, capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout.splitlines()[-1]


def test_the_certificates_of_its_comment_are_settings_of_ours() -> None:
    """Fails when a variable that the comment names is none."""
    named = set(re.findall("HOLDOFF_[A-Z_]+", UNIT.read_text())) - {"HOLDOFF_DEFAULT_DATA_DIR"}
    ours = {f"HOLDOFF_{name.upper()}" for name in Settings.model_fields}
    assert named
    assert named <= ours
