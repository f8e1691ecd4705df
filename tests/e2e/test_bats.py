"""`clients/bash/holdoff.sh` by Bats, as its author would test a script that sources it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.service import BIN

if TYPE_CHECKING:
    from tests.e2e.service import Service

SUITE = Path(__file__).parents[1] / "bats"


def test_the_suite_passes(service: Service) -> None:
    """Fails when `with_lease` drops an exit code, an option, or a function's exports."""
    environment = {**service.environment, "TOKEN": service.create_token("bats", "0.1s")}
    command = [str(BIN / "bats"), "--print-output-on-failure", str(SUITE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
