"""The Dockerfile and the compose file, as far as they go without an engine for containers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdoff_coordinator.cli import main
from tests.chart.helm import DEPLOY
from tests.chart.test_running import listens
from tests.e2e.service import BIN
from tests.harness import wait_until
from tests.ports import free_port

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
PATH = {"PATH": f"{BIN}:{os.environ['PATH']}"}


def instruction(name: str) -> str:
    """Return what the last instruction of a name in the Dockerfile says."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    return str(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[-1])


def test_the_dockerfile_has_nothing_to_lint() -> None:
    """Fails when the last user is root, or a base has no version."""
    subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], check=True)
    assert instruction("USER") == "65532:65532"


def test_the_compose_file_is_valid() -> None:
    """Fails when a key is misspelt, by the schema of the compose specification."""
    subprocess.run(
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"],
        check=True,
        env=os.environ | PATH,
    )


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_pinned_and_private(name: str) -> None:
    """Fails when an image has no version, or a port is published beyond loopback."""
    service = COMPOSE["services"][name]
    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]


def test_the_coordinator_knows_what_compose_tells_it() -> None:
    """Fails when an option of the compose file is misspelt."""
    told = [one.partition("=")[0] for one in COMPOSE["services"]["coordinator"]["command"][1:]]
    known = {option for one in main.commands["serve"].params for option in one.opts}
    assert [option for option in told if option not in known] == []


def test_what_the_image_holds_serves_and_is_healthy(tmp_path: Path) -> None:
    """Fails when the image's environment lacks a package, or its health check asks elsewhere."""
    image = tmp_path / "holdoff"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | PATH
    subprocess.run([DEPLOY / "install.sh", image], check=True, env=outside)
    port = free_port()
    command = [
        word.replace("50052", str(port))
        for word in json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD"))
    ]
    variable, path = instruction("ENV").split()[-1].split("=")
    assert path.startswith(f"{instruction('VOLUME')}/")
    outside[variable] = path.replace(instruction("VOLUME"), str(tmp_path))
    check = [str(image / "bin" / "python"), str(image / "healthy.py"), f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [str(image / "bin" / command[0]), *command[1:], "--listen", "127.0.0.1:0"], env=outside
    )
    try:
        wait_until(lambda: process.poll() is not None or listens(port), 60)
        assert process.poll() is None
        wait_until(lambda: subprocess.run(check, check=False, env=outside).returncode == 0, 60)
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert subprocess.run(check, check=False, env=outside).returncode != 0
    assert Path(outside[variable]).is_dir()
