"""`holdoff simulator`: its commands against a simulator that really listens."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from holdoff.cli import main
from holdoff.simulator import Seed, Switches, serving
from holdoff.simulator.switches import SETTINGS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = str(Path(sys.executable).with_name("holdoff"))
SEED = Seed()
FORM = {
    "grant_type": "refresh_token",
    "client_id": SEED.client_id,
    "client_secret": SEED.client_secret,
    "refresh_token": SEED.refresh_token,
}


def holdoff(*arguments: str, **env: str) -> Result:
    """Run the command in this process."""
    return CliRunner(env=env).invoke(main, ["simulator", *arguments], prog_name="holdoff")


async def aside(*arguments: str) -> Result:
    """Run the command while this thread serves."""
    return await asyncio.to_thread(holdoff, *arguments)


@asynccontextmanager
async def served(*options: str) -> AsyncIterator[str]:
    """Run `holdoff simulator serve` as a process of its own, and yield its URL."""
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "simulator", "serve", *options), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:\d+", (await process.stdout.readline()).decode())
        assert match
        yield match[0]
    finally:
        process.terminate()
        assert await process.wait() == 0


async def refresh(url: str, *agents: str) -> list[int]:
    """Ask for a token as each of some clients in turn."""
    statuses = []
    async with aiohttp.ClientSession() as http:
        for agent in agents:
            headers = {"User-Agent": agent}
            async with http.post(f"{url}/api/oauth2/token", data=FORM, headers=headers) as answer:
                statuses.append(answer.status)
    return statuses


async def test_report_is_a_table() -> None:
    """The table says who broke which rule how often, the block, and the errors of the scope.

    Fails when a broken rule is blamed on another client or a number is left out.
    """
    async with serving() as url:
        guilty = ["job/guilty"] * 11
        assert await refresh(url, "job/good", *guilty, "job/late") == [200, *[400] * 11, 403]
        result = await aside("report", url)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.stdout.startswith("12 violations until ")
    assert ["refresh_interval", "job/guilty", "11"] in lines
    assert ["error_limit", "job/guilty", "1"] in lines
    assert [SEED.client_id, SEED.user, "oauth2/token", "11", "11"] in lines
    assert ["job/good", "1", "1", "0", "0", "0", "0", "0", "0"] in lines
    assert ["job/guilty", "11", "0", "0", "0", "11", "0", "0", "12"] in lines
    assert ["job/late", "1", "0", "0", "0", "0", "1", "0", "0"] in lines
    request = ["POST", "/api/oauth2/token", "400", f"{SEED.user}/oauth2/token"]
    [last] = [line for line in lines if line[3:5] == ["error_limit", "job/guilty"]]
    assert (last[0], last[5:9]) == ("12", request)
    blocked = f"{SEED.user}/oauth2/token"
    assert [SEED.client_id] in [line[:1] for line in lines if line[-1:] == [blocked]]


async def test_report_of_nothing_is_short() -> None:
    """Where nothing was asked there are no empty tables."""
    async with serving() as url:
        result = await aside("report", f"{url}/")
    assert len(result.stdout.split("\n")) <= 4, result.stdout
    assert result.stdout.startswith("0 violations")


async def test_report_as_json() -> None:
    """`--output json` prints the report as it is, one document."""
    async with serving(time_scale=7) as url:
        result = await aside("report", url, "--output", "json")
    assert json.loads(result.stdout)["time_scale"] == 7


async def test_report_shows_what_a_terminal_would_obey() -> None:
    """A client's name is whatever it sends: escape sequences are shown, not sent on."""
    async with serving() as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = "GET /api/v1/1/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
        writer.write((head + "User-Agent: \u202eevil\r\n\r\n").encode())
        assert b" 401 " in await reader.readline()
        writer.close()
        result = await aside("report", url)
    assert "\\u202eevil" in result.stdout
    assert "\u202e" not in result.stdout


async def test_fault_from_the_command_line() -> None:
    """A fault is asked for, listed, met and cleared; its options go along."""
    async with serving() as url:
        asked = await aside(
            *("fault", url, "error", "--count", "2", "--path", "/api/oauth2/token"),
            *("--status", "503", "-o", "json"),
        )
        assert json.loads(asked.stdout)["pending"] == [
            {"fault": "error", "path": "/api/oauth2/token", "count": 2, "status": 503}
        ]
        assert await refresh(url, "job/a") == [503]
        listed = await aside("fault", url)
        assert ["error", "/api/oauth2/token", "1", "503"] in [
            line.split() for line in listed.stdout.splitlines()
        ]
        assert (await aside("fault", url, "--clear")).stdout == "no faults are pending\n"
        assert await refresh(url, "job/a") == [200]
        report = await aside("report", url)
    assert ["error", "1"] in [line.split() for line in report.stdout.splitlines()]


async def test_fields_that_a_partial_answer_lacks() -> None:
    """Each `--without` names a field; the list of pending faults shows them."""
    async with serving() as url:
        fields = ("--without", "access_token", "--without", "expires_in")
        asked = await aside("fault", url, "partial-answer", *fields)
        assert "access_token, expires_in" in asked.stdout


async def test_wrong_faults_are_refused() -> None:
    """What the simulator refuses is a usage error with its words; so is what contradicts itself."""
    async with serving() as url:
        for arguments, says in (
            (["reset", "--seconds", "3"], "seconds: reset has none; hang, slow-body"),
            (["error", "--path", "/x"], "path: expected a beginning such as /api/oauth2/token"),
            (["rest"], "'rest'"),
            (["--count", "3"], "--count needs a KIND"),
            (["reset", "--clear"], "--clear takes no KIND"),
        ):
            result = await aside("fault", url, *arguments)
            assert (result.exit_code, says in result.stderr) == (64, True), result.stderr
        assert (await aside("fault", url)).stdout == "no faults are pending\n"


@pytest.mark.parametrize("command", ["report", "fault"])
def test_nobody_answers(command: str) -> None:
    """A URL at which nothing listens ends the command with 69 and says what should run there."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        result = holdoff(command, f"http://127.0.0.1:{unheard.getsockname()[1]}")
    assert (result.exit_code, result.stdout) == (69, "")
    assert "holdoff simulator serve" in result.stderr
    assert "Traceback" not in result.stderr


async def test_what_answers_is_no_simulator() -> None:
    """Another server at the URL ends the command with 69, and it says so."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        result = await aside("report", f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()
    assert (result.exit_code, "is not a simulator" in result.stderr) == (69, True)


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://host:port"])
def test_what_is_no_url(url: str) -> None:
    """A word that is no URL is wrong usage."""
    assert holdoff("report", url).exit_code == 64


def test_an_address_that_is_taken() -> None:
    """An address in use ends the command with 69 and a way out, as a real process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [PROGRAM, "simulator", "serve", "--listen", address],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith(f"holdoff: cannot listen on {address}: address already in use")
    assert "--listen" in done.stderr


async def test_serve_with_switches_and_seeds(tmp_path: Path) -> None:
    """Switches and a file's users reach the provider; the seeds it tells are a seed file again."""
    async with aiohttp.ClientSession() as http:

        async def told(url: str, page: str) -> Any:
            async with http.get(f"{url}/_simulator/{page}") as response:
                return await response.json()

        async with served(
            *("--apps", "2", "--users", "3"),
            *("--switch", "expires-in=number", "--switch", "block-answer=503-html"),
        ) as url:
            seeds = (await told(url, "seed"))["seeds"]
            switches = (await told(url, "report"))["switches"]
        assert len({(seed["client_id"], seed["user"]) for seed in seeds}) == 6
        expected = reduce(Switches.set, ("expires-in=number", "block-answer=503-html"), Switches())
        assert switches == expected.document()

        file = tmp_path / "seeds.json"
        file.write_text(json.dumps({"seeds": seeds[4:]}))
        async with served("--seed-file", str(file)) as url:
            again = (await told(url, "seed"))["seeds"]
            assert [seed["user"] for seed in again] == [seed["user"] for seed in seeds[4:]]
            names = ("client_id", "client_secret", "refresh_token")
            form = {"grant_type": "refresh_token", **{name: again[1][name] for name in names}}
            async with http.post(again[1]["token_url"], data=form) as response:
                assert response.status == 200
            assert await refresh(url, "job/a") == [401]  # the default app is not there


def test_wrong_options_of_serve(tmp_path: Path) -> None:
    """Each wrong option is named, with what it may be or where its file is wrong."""
    file = tmp_path / "seeds.toml"
    file.write_text('[[seeds]]\nclient_id = "app"\n')
    missing = tmp_path / "missing"
    for arguments, says in (
        (["--switch", "error-windows=sliding"], "none of the switches error-window, used-at"),
        (["--switch", "error-window=hour"], "error-window is one of sliding, clock-hour"),
        (["--seed-file", str(file)], f"{file}: seeds[0].client_secret: expected a text"),
        (["--seed-file", str(missing)], f"{missing}: No such file or directory"),
        (["--apps", "0"], "--apps"),
        (["--rotation", "reuse"], "'reuse' is now 'reusable'"),
        (["--rotation", "strict"], "'strict' is now 'single-use'"),
        (["--rotation", "once"], "'reusable', 'until-used', 'grace', 'single-use'"),
        (["--switch", "old-token-dies=issue"], "--rotation single-use"),
        (["--grace", "60"], "--grace belongs to --rotation grace"),
        (["--listen", "nowhere"], "--listen"),
    ):
        result = holdoff("serve", *arguments)
        assert (result.exit_code, says in result.stderr) == (64, True), result.stderr
    good = {name: getattr(SEED, name) for name in SEED.__slots__}
    file = tmp_path / "seeds.json"
    file.write_text(json.dumps({"seeds": [good]}))
    result = holdoff("serve", "--seed-file", str(file), "--users", "2")
    assert (result.exit_code, "omit --apps and --users" in result.stderr) == (64, True)


def test_help_explains_each_switch() -> None:
    """`serve --help` names every switch with its values and says what is open about it."""
    text = " ".join(holdoff("serve", "--help").stdout.split())
    for name in Switches().document():
        assert f"{name}=" in text
    assert "Whether ten errors are allowed in any 60 minutes or in each hour of the clock." in text


def test_switches_are_completed() -> None:
    """A shell is offered the switches with their values."""

    def offered(incomplete: str) -> list[str]:
        result = CliRunner(
            env={
                "_HOLDOFF_COMPLETE": "bash_complete",
                "COMP_WORDS": f"holdoff simulator serve --switch {incomplete}",
                "COMP_CWORD": "4",
            }
        ).invoke(main, prog_name="holdoff")
        return [line.removeprefix("plain,") for line in result.stdout.split()]

    assert offered("error") == ["error-window=sliding", "error-window=clock-hour"]
    assert offered("") == list(SETTINGS)
