"""The directory of the spool, as a coordinator finds it when it starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from holdoff_coordinator.cli import main
from holdoff_coordinator.custody import spool, spool_folder
from holdoff_coordinator.custody.key_files import create_key
from holdoff_coordinator.custody.spool_folder import SpoolFolderError, held
from holdoff_coordinator.settings import Settings
from tests.custodian import key_directory

if TYPE_CHECKING:
    from pathlib import Path

AUTHORITY = "not a certificate"


def test_it_is_created_for_us_alone(tmp_path: Path) -> None:
    """Fails when others can read the directory or its parent, or its lock counts as an answer."""
    folder = tmp_path / "data" / "spool"
    with held(folder):
        assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700] * 2
        assert [path.stat().st_mode & 0o077 for path in folder.iterdir()] == [0]
        assert spool.answers(str(folder)) == []
    with held(folder):  # again, as after a restart
        pass


def test_a_second_coordinator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of a host with the same data directory: the second gets the remedy.

    Fails when the two share a spool, so that one removes what the other needs.
    """
    monkeypatch.setattr(spool_folder, "_PATIENCE_SECONDS", 0.0)
    keys = tmp_path / "keys"
    keys.mkdir()
    create_key(key_directory(keys), "first")
    options = ("--custody-key-dir", str(keys), "--redis-url", "redis://127.0.0.1:1/0")
    variables = {"HOLDOFF_DEFAULT_DATA_DIR": str(tmp_path / "state")}
    with held(tmp_path / "state" / "spool"):
        done = CliRunner().invoke(main, ["serve", *options], env=variables)
    assert done.exit_code == 69
    assert f"process {os.getpid()}" in done.stderr
    assert "--custody-spool-dir" in done.stderr


def test_a_directory_that_is_not_safe_is_refused(tmp_path: Path) -> None:
    """Each refusal says what to do; without custody the directory is left alone."""
    folder = tmp_path / "spool"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SpoolFolderError, match=r"chmod go-w .*--custody-spool-dir"), held(folder):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(SpoolFolderError, match="choose another with --custody-spool-dir"),
        held(tmp_path / "file"),
    ):
        pass
    folder.chmod(0o500)
    if os.geteuid():  # root may write everywhere
        with pytest.raises(SpoolFolderError, match="give it to user"), held(folder):
            pass
    assert Settings(data_dir=tmp_path / "none").spool() is None


def test_where_token_urls_may_be(tmp_path: Path) -> None:
    """Networks and authorities are read at the start, and what is wrong in them is refused."""
    settings = Settings(custody_network="10.1.0.0/16,fd00:1::/32")
    assert settings.networks() == ("10.1.0.0/16", "fd00:1::/32")
    path = tmp_path / "authorities.pem"
    path.write_text(AUTHORITY)
    for options, words in (
        (("--custody-network", "10.1.0.0/16", "--custody-network", "10.1.2.3/16"), "10.1.0.0/16"),
        (("--custody-ca-file", str(path)), "has no certificates"),
        (("--custody-ca-file", str(tmp_path / "none.pem")), "cannot read"),
    ):
        done = CliRunner().invoke(main, ["serve", "--data-dir", str(tmp_path), *options])
        assert (done.exit_code, words in done.stderr) == (64, True), done.stderr
