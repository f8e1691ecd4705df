"""Completion as each shell does it: the script is loaded, a line is typed, and Tab is pressed."""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from holdoff.v1 import (
    budget_pb2,
    budget_service_pb2,
    budget_service_pb2_grpc,
    lease_pb2,
    token_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)
from tests.harness import wait_until

FINANCE = "apps/exact-nl/tokens/finance"
BIN = Path(sys.executable).parent
PROMPT = "READY> "
KILL_LINE = "\x15"


class Tokens(token_service_pb2_grpc.TokenServiceServicer):
    """Knows one token, which is held."""

    def ListTokens(
        self, request: token_service_pb2.ListTokensRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.ListTokensResponse:
        del request, context
        token = token_pb2.Token(name=FINANCE, wait_reason=lease_pb2.WAIT_REASON_HELD)
        return token_service_pb2.ListTokensResponse(tokens=[token])


class BackOffs(budget_service_pb2_grpc.BudgetServiceServicer):
    """Knows one back-off."""

    def ListBackOffs(
        self, request: budget_service_pb2.ListBackOffsRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.ListBackOffsResponse:
        del request, context
        back_off = budget_pb2.BackOff(name="apps/exact-nl/backOffs/block-1")
        return budget_service_pb2.ListBackOffsResponse(back_offs=[back_off])


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where a coordinator with one token listens."""
    server = grpc.server(ThreadPoolExecutor(2))
    token_service_pb2_grpc.add_TokenServiceServicer_to_server(
        Tokens(),  # type: ignore[abstract] # nothing else is asked
        server,
    )
    budget_service_pb2_grpc.add_BudgetServiceServicer_to_server(
        BackOffs(),  # type: ignore[abstract] # nothing else is asked
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def environment(endpoint: str, tmp_path: Path) -> dict[str, str]:
    """A home without any configuration, and a simple terminal."""
    return {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "HOLDOFF_ENDPOINT": endpoint,
        "PS1": PROMPT,
    }


def shell(name: str) -> str:
    """The path of a shell; its tests are skipped where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


class Terminal:
    """An interactive shell, its keyboard and its screen."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._fd, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        """Press keys; what was shown before does not count any more."""
        self.shown = ""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Wait until it is shown."""
        give_up = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < give_up, f"{text!r} is not in {self.shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                # Escape sequences would stand between the letters.
                chunk = os.read(self._fd, 65536).decode(errors="replace")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", chunk)

    def close(self) -> None:
        """End the shell."""
        self._process.kill()
        self._process.wait(10)
        os.close(self._fd)


@pytest.mark.parametrize(
    ("name", "options", "preparation"),
    [
        ("bash", ["--norc", "--noprofile", "-i"], ""),
        ("zsh", ["-f", "-i"], "autoload -U compinit; compinit -u -D; "),
    ],
)
def test_tab_completes(
    name: str, options: list[str], preparation: str, environment: dict[str, str]
) -> None:
    """Tab completes commands, options and names of tokens in bash and zsh, of both programs."""
    terminal = Terminal([shell(name), *options], environment)
    try:
        terminal.wait_for(PROMPT)
        terminal.type(f'{preparation}eval "$(holdoff completion {name})"; echo load""ed\n')
        terminal.wait_for("loaded")
        terminal.wait_for(PROMPT)
        for typed, rest in (
            ("holdoff token hist", "ory"),
            ("holdoff run --lab", "el"),
            ("holdoff token show apps/exact-nl/tokens/f", "inance"),
            ("holdoff backoff clear apps/exact-nl/backOffs/b", "lock-1"),
            ("holdoff-coordinator ser", "ve"),
        ):
            terminal.type(f"{KILL_LINE}{typed}\t")
            terminal.wait_for(typed + rest)
    finally:
        terminal.close()


def test_fish_completes_with_descriptions(environment: dict[str, str]) -> None:
    """Fish offers commands with their summaries, and tokens with their states.

    Fails with click's own script, which ends a summary at its first comma.
    """

    def offered(line: str) -> dict[str, str]:
        script = f"holdoff completion fish | source; complete -C '{line}'"
        result = subprocess.run(
            [shell("fish"), "--no-config", "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert result.stderr == ""
        pairs = (one.partition("\t") for one in result.stdout.splitlines())
        return {value: description for value, _, description in pairs}

    assert offered("holdoff wa") == {"watch": "Watch tokens and leases, live."}
    assert offered("holdoff token show apps/") == {FINANCE: "held"}
    # The coordinator of this test knows no policies: the presets are there all the same.
    assert set(offered("holdoff policy show z")) == {"zoho"}
    assert set(offered("holdoff token create apps/a/tokens/t --policy x")) == {"xero"}
    assert "serve" in offered("holdoff-coordinator ser")


@pytest.mark.parametrize("name", ["zsh", "powershell"])
def test_descriptions_are_shown(environment: dict[str, str], name: str) -> None:
    """A shell gets three lines for a token: the kind of value, its name and its state."""
    variables = {
        **environment,
        "_HOLDOFF_COMPLETE": f"{name}_complete",
        "COMP_WORDS": "holdoff token show apps/",
        "COMP_CWORD": "3",
    }

    def offered() -> list[str]:
        result = subprocess.run(
            [str(BIN / "holdoff")],
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return result.stdout.splitlines()

    # A busy machine may take longer than the second for which completion waits.
    wait_until(lambda: offered() == ["plain", FINANCE, "held"], 30)


def test_the_script_for_powershell_is_whole(environment: dict[str, str]) -> None:
    """It registers a block for each program, with its variable, and its brackets are balanced."""
    script = subprocess.run(
        [str(BIN / "holdoff"), "completion", "powershell"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    blocks = script.split("Register-ArgumentCompleter")[1:]
    assert [block.split()[:3] for block in blocks] == [
        ["-Native", "-CommandName", "holdoff"],
        ["-Native", "-CommandName", "holdoff-coordinator"],
    ]
    assert "$env:_HOLDOFF_COMPLETE = 'powershell_complete'" in blocks[0]
    assert "$env:_HOLDOFF_COORDINATOR_COMPLETE = 'powershell_complete'" in blocks[1]
    code = re.sub(r"'[^']*'|\"[^\"]*\"", "", script)
    assert all(code.count(left) == code.count(right) for left, right in ("{}", "()", "[]"))


def test_powershell_completes(environment: dict[str, str]) -> None:
    """PowerShell itself completes commands and names, where there is one."""
    line = "holdoff token show apps/exact-nl/tokens/f"
    script = (
        "holdoff completion powershell | Out-String | Invoke-Expression; "
        f"[System.Management.Automation.CommandCompletion]::CompleteInput('{line}', {len(line)}, "
        "$null).CompletionMatches.CompletionText"
    )
    result = subprocess.run(
        [shell("pwsh"), "-NoProfile", "-Command", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split() == [FINANCE]
