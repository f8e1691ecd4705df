"""Whom a coordinator lets change what is in custody, by how it was started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import structlog.testing

from holdoff_coordinator import commands
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.settings import Settings
from tests.custodian import key_directory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("listen", "has_access", "is_closed"),
    [
        ("127.0.0.1:0", False, True),
        ("[::1]:0", False, True),
        ("localhost:0", False, True),
        ("0.0.0.0:0", False, False),
        ("coordinator:50051", False, False),
        ("0.0.0.0:0", True, True),
    ],
)
@pytest.mark.parametrize("has_keys", [True, False])
def test_without_an_access_file_on_loopback_only(
    tmp_path: Path, listen: str, *, has_access: bool, is_closed: bool, has_keys: bool
) -> None:
    """Custody needs an access file beyond loopback; on loopback a warning says what is at risk.

    Fails when `--insecure` opens custody to a network.
    """
    path = tmp_path / "access.toml"
    path.write_text("grants = []\n")
    files: dict[str, Any] = {"access": AccessFile(path) if has_access else None}
    if has_keys:
        keys = tmp_path / "keys"
        keys.mkdir()
        files["custody_keys"] = KeyDirectory(key_directory(keys, "first"))
    settings = Settings(listen=listen, insecure=True, data_dir=tmp_path)
    with structlog.testing.capture_logs() as logs:
        terms = commands._terms(settings, commands._Files(**files))
    assert terms.is_closed is is_closed
    assert set(terms.keys()) == ({"first"} if has_keys else set())
    assert terms.loopback_http is False
    warned = any("every user of this host" in one["event"] for one in logs)
    assert warned is (has_keys and not has_access)
