"""The simulated provider over https, with a certificate of its own authority."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import ssl
import subprocess
import sys
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner
from cryptography import x509

from holdoff._authority import server_context
from holdoff.cli import main
from holdoff.simulator import serving

PROGRAM = str(Path(sys.executable).with_name("holdoff"))


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """Name a file for the authority's certificate."""
    return tmp_path / "ca.pem"


async def get(url: str, ca: Path) -> Any:
    """Read a JSON document from a server whose certificate the authority signed."""
    trust = ssl.create_default_context(cafile=ca)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    async with aiohttp.ClientSession() as http, http.get(url, ssl=trust) as response:
        assert response.status == 200
        return await response.json()


async def aside(*arguments: str) -> Any:
    """Run a command while this thread serves."""
    runner = CliRunner()
    return await asyncio.to_thread(
        runner.invoke, main, ["simulator", *arguments], prog_name="holdoff"
    )


async def test_names_of_the_certificate(ca: Path) -> None:
    """A client that trusts the authority reaches the server by each name; others do not."""
    async with serving(tls=ca) as url:
        assert url.startswith("https://127.0.0.1:")
        [seed] = (await get(f"{url}/_simulator/seed", ca))["seeds"]
        assert seed["token_url"].startswith(url)
        assert await get(f"{url.replace('127.0.0.1', 'localhost')}/_simulator/report", ca)
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.get(f"{url}/_simulator/report")


async def test_an_ipv6_address(ca: Path) -> None:
    """The certificate is valid for ::1."""
    async with AsyncExitStack() as stack:
        try:
            url = await stack.enter_async_context(serving("::1", tls=ca))
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert await get(f"{url}/_simulator/report", ca)


async def test_authorities_differ(ca: Path, tmp_path: Path) -> None:
    """Each start has an authority of its own."""
    async with serving(tls=ca), serving(tls=tmp_path / "other.pem") as url:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await get(url, ca)


def test_the_certificate_of_the_authority(ca: Path) -> None:
    """The file has the certificate of an authority and no key."""
    server_context("Holdoff simulator", "example.com", ca)
    assert b"PRIVATE" not in ca.read_bytes()
    certificate = x509.load_pem_x509_certificate(ca.read_bytes())
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


async def test_a_reset_over_tls(ca: Path) -> None:
    """A fault resets the connection under TLS too."""
    async with serving(tls=ca) as url:
        trust = ssl.create_default_context(cafile=ca)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as http:
            http._retry_connection = False
            fault = {"fault": "lost-answer", "path": "/api/"}
            async with http.post(f"{url}/_simulator/faults", json=fault) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientOSError) as caught:
                await http.get(f"{url}/api/v1/current/Me")
            assert caught.value.errno == errno.ECONNRESET


async def test_commands_over_tls(ca: Path, tmp_path: Path) -> None:
    """`report` and `fault` take the authority's file, and ask for it if it is missing."""
    async with serving(tls=ca) as url:
        result = await aside("report", url, "--ca-file", str(ca))
        assert (result.exit_code, result.stdout[:12]) == (0, "0 violations")
        result = await aside("fault", url, "reset", "--ca-file", str(ca))
        assert result.exit_code == 0
        result = await aside("report", url)
        assert (result.exit_code, "--ca-file" in result.stderr) == (69, True)
        empty = tmp_path / "empty.pem"
        empty.touch()
        result = await aside("report", url, "--ca-file", str(empty))
        assert (result.exit_code, "it has no certificate" in result.stderr) == (64, True)


@pytest.mark.parametrize("named", [True, False])
def test_serve_with_tls(ca: Path, *, named: bool) -> None:
    """`serve --tls` prints where its authority is; a file that was not named is removed."""
    options = ["--ca-out", str(ca)] if named else []
    with subprocess.Popen(
        [PROGRAM, "simulator", "serve", "--tls", *options], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            match = re.search(r" at (https://\S+) .* CA (.*)\)$", process.stdout.readline())
            assert match
            file = Path(match[2])
            assert (file == ca) is named
            trust = ssl.create_default_context(cafile=file)
            report = f"{match[1]}/_simulator/report"
            with urllib.request.urlopen(report, timeout=40, context=trust) as answer:  # noqa: S310 -- our own server
                assert json.load(answer)["time_scale"] == 1
        finally:
            process.terminate()
    assert process.returncode == 0
    assert file.exists() is named


def test_wrong_options(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong option is named; without the package the error says what to install."""

    def serve(*options: str) -> Any:
        return CliRunner().invoke(main, ["simulator", "serve", *options], prog_name="holdoff")

    result = serve("--ca-out", str(ca))
    assert (result.exit_code, "--ca-out belongs to --tls" in result.stderr) == (64, True)
    missing = ca.parent / "missing" / "ca.pem"
    result = serve("--tls", "--ca-out", str(missing))
    assert (result.exit_code, f"--ca-out {missing}: No such file" in result.stderr) == (64, True)

    if Path("/dev/full").exists():  # a disk that is full
        result = serve("--tls", "--ca-out", "/dev/full")
        assert (result.exit_code, "--ca-out /dev/full: No space" in result.stderr) == (64, True)
    monkeypatch.delitem(sys.modules, "holdoff._authority", raising=False)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    result = serve("--tls", "--ca-out", str(ca))
    assert result.exit_code == 1
    assert "pip install 'holdoff[simulator]'" in result.stderr
