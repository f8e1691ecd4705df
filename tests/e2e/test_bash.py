"""`clients/bash/holdoff.sh`, sourced by real Bash scripts that run beside a real coordinator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdoff._recognise import OutputRecogniser, Seen, SeenBlock, SeenError
from holdoff.policies import presets
from holdoff_coordinator.policies import policy_message
from tests.harness import at_length, wait_until

if TYPE_CHECKING:
    from tests.e2e.service import Service

SHIM = Path(__file__).parents[2] / "clients/bash/holdoff.sh"


class Scripts:
    """Runs scripts that source the shim; `$TOKEN` is a token of their own."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.token = service.create_token("t")
        self._folder = folder

    def command(self, text: str, *arguments: str) -> list[str]:
        """Write a script, strict as scripts should be, and return how to run it."""
        path = self._folder / "script.sh"
        head = f"set -euo pipefail\nsource '{SHIM}'\nTOKEN={self.token}\n"
        path.write_text(head + text, encoding="utf-8")
        return ["bash", str(path), *arguments]

    def run(self, text: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        defaults = {"env": self.service.environment, "input": ""}
        command = self.command(text, *arguments)
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=40, **defaults | options
        )


@pytest.fixture
def scripts(service: Service, tmp_path: Path) -> Scripts:
    """Give what runs scripts."""
    return Scripts(service, tmp_path)


@pytest.mark.parametrize("code", [0, 4, *at_length(1, 75)])
@pytest.mark.parametrize("command", ["job", "bash -c 'exit \"$1\"' bash"])
def test_exit_codes_pass(scripts: Scripts, command: str, code: int) -> None:
    """A program's and a function's own; under `set -e` the script ends with it too.

    Fails when `with_lease` is not the last word on its exit code, such as with an `|| return 1`.
    """
    done = scripts.run(f"job() {{ return $1; }}\nwith_lease $TOKEN -- {command} {code}\necho after")
    assert (done.returncode, done.stdout) == (code, "" if code else "after\n"), done.stderr


def test_options_go_to_run_and_all_else_to_the_command(scripts: Scripts, tmp_path: Path) -> None:
    """Words arrive as they were written, also `--`, nothing and white space.

    Fails when an expansion in `with_lease` is not quoted.
    """
    result = tmp_path / "a result.json"
    text = """
        show() { printf '<%s>' "$@"; }
        with_lease "$TOKEN" --job 'a job' --result-file "$1" -- show '' 'a  b' -- '*' $'c\\nd' "e'"
        with_lease "$TOKEN" printf '<%s>' '' 'a  b' -- '*' $'c\\nd' "e'"
    """
    done = scripts.run(text, str(result))
    assert done.stdout == "<><a  b><--><*><c\nd><e'>" * 2, done.stderr
    assert json.loads(result.read_text())["job"] == "a job"


def test_a_function_finds_what_it_needs(scripts: Scripts) -> None:
    """Input, other functions, options and exported variables; others do not reach it.

    Fails when `set` or `shopt` options are not handed over, or not all functions are.
    """
    text = r"""
        shopt -s extglob nullglob
        export VISIBLE=1 token=mine name=mine
        hidden=1
        kind() { case $1 in @(a|b)*) echo "$0 kind 1" ;; *) echo "$0 kind 2" ;; esac; }
        job() {
          kind "$1"
          echo $VISIBLE $token $name ${hidden-hidden} /nowhere/* $HOLDOFF_TOKEN
          cat
          false | true
          echo not reached
        }
        ended=0
        IFS=$'\n'
        said=$(echo input | { set -e; with_lease "$TOKEN" job abc; }) || ended=$?
        echo "$said, $ended"
    """
    done = scripts.run(text)
    script = scripts.command(text)[1]
    expected = f"{script} kind 1\n1 mine mine hidden {scripts.token}\ninput, 1\n"
    assert done.stdout == expected, done.stderr


def test_functions_replace_no_command_of_others(scripts: Scripts) -> None:
    """Programs that a function starts see only functions that the script itself exported.

    Fails when they are not taken out of the environment again.
    """
    text = """
        date() { echo replaced; }
        mine() { echo exported; }
        export -f mine
        job() { date; mine; bash -c 'type -t date; mine'; }
        with_lease "$TOKEN" job
    """
    done = scripts.run(text)
    assert done.stdout == "replaced\nexported\nfile\nexported\n", done.stderr


def test_no_text_of_a_function_in_an_argument_list(scripts: Scripts) -> None:
    """Other users can read the arguments of every process, and a function may know a password.

    Fails when functions are handed over as `bash -c "$(declare -f)"`.
    """
    text = """
        job() { : "s3cret"; cat /proc/[0-9]*/cmdline 2>/dev/null || true; }
        with_lease "$TOKEN" --isolate never -- job
    """
    done = scripts.run(text)
    assert scripts.token in done.stdout, done.stderr
    assert "s3cret" not in done.stdout


def test_a_lost_lease_ends_a_function_and_all_that_it_started(scripts: Scripts) -> None:
    """79, as for any command.

    Fails when a function runs beside `holdoff run` and not under it.
    """
    mark = uuid.uuid4().hex
    text = f'job() {{ sleep 60 & exec -a {mark} sleep 60; }}\nwith_lease "$TOKEN" job'
    process = subprocess.Popen(
        scripts.command(text), env=scripts.service.environment, stderr=subprocess.PIPE, text=True
    )
    lease = scripts.service.only_lease(scripts.token)
    wait_until(lambda: alive(mark))
    with scripts.service.asked() as client:
        client.break_lease(lease["name"], "test")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 79, stderr
    assert not alive(mark)


def alive(mark: str) -> bool:
    """Whether a process with such an argument runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_no_lease_is_75_and_no_coordinator_69(scripts: Scripts) -> None:
    """The codes of `holdoff run`, which a script can tell apart."""
    text = """
        hold() { touch "$1"; cat; }
        with_lease "$TOKEN" hold "$1" < <(
          until [[ -e $1 ]]; do sleep 0.05; done
          with_lease "$TOKEN" --no-wait -- true >&2 || echo $?
        )
        HOLDOFF_ENDPOINT=127.0.0.1:1 with_lease "$TOKEN" --no-wait -- true
    """
    flag = scripts.command(text)[1] + ".held"
    done = scripts.run(text, flag)
    assert (done.returncode, done.stdout) == (69, "75\n"), done.stderr
    assert "held by" in done.stderr


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("with_lease", 64, "a token and a command are needed"),
        ('with_lease "$TOKEN"', 64, "with_lease apps/exact-nl/tokens/finance --wait 2h --"),
        ('with_lease "$TOKEN" --wait 2h true', 64, "after options -- and a command are needed"),
        ('with_lease "$TOKEN" --no-wait --', 64, "after options -- and a command are needed"),
        ("with_lease nonsense true", 64, "--token"),
        ('with_lease "$TOKEN" --nonsense -- true', 64, "--nonsense"),
        ('with_lease "$TOKEN" no-such-program', 127, "PATH"),
        ('PATH=/usr/bin:/bin; with_lease "$TOKEN" true', 127, "pip install holdoff"),
        ("holdoff_error 535193 400", 64, "holdoff_error DIVISION ENDPOINT STATUS"),
    ],
)
def test_mistakes_are_told_with_their_remedy(
    scripts: Scripts, line: str, code: int, words: str
) -> None:
    """And with the exit code that `holdoff run` has for them."""
    done = scripts.run(line)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr


@pytest.mark.parametrize("shell", [["dash"], ["bash", "-c", 'unset BASH_VERSION; . "$1"', ""]])
def test_another_shell_is_told_so(shell: list[str], tmp_path: Path) -> None:
    """Instead of a syntax error.

    Fails when the check is taken out, or is not the first thing in the file.
    """
    script = tmp_path / "script"
    script.write_text(f". '{SHIM}' || exit\necho 'not refused'\n")
    done = subprocess.run([*shell, script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (69, "")
    assert "#!/usr/bin/env bash" in done.stderr


NASTY = "/api/v1/1/crm/Accounts"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (
            "holdoff_error 535193 crm/Accounts 400",
            SeenError(400, "535193", "crm/Accounts"),
        ),
        ("holdoff_error '' '' 404", SeenError(404)),
        ("holdoff_error 1 a 000", SeenError(0, "1", "a")),
        (
            f"""holdoff_error "a b'c" 'https://eva:pw@x.example{NASTY}?$filter="secret"#s' 401""",
            SeenError(401, "a b'c", NASTY),
        ),
        (
            "holdoff_error 1 $'a\" status=\"500\\r\\nHOLDOFF-BLOCKED\\e[1m' 403",
            SeenError(403, "1", "a status=500HOLDOFF-BLOCKED[1m"),
        ),
        (
            f"holdoff_error 1 {'a' * 5000} 400",
            SeenError(400, "1", "a" * 2000),
        ),
        ("holdoff_error 1 a 429", SeenBlock(429, "1", "a", None, "too-many-calls")),
        ("holdoff_blocked", SeenBlock()),
        ("holdoff_blocked 403", SeenBlock(403)),
        ("holdoff_blocked 429 60", SeenBlock(429, retry_after_seconds=60.0)),
        ("holdoff_blocked 429 'Wed, 21 Oct 2026 07:28:00 GMT'", SeenBlock(429)),
    ],
)
def test_what_is_told_is_what_is_recognised(line: str, seen: Seen) -> None:
    """One line on stderr whatever is in the values, and nothing secret in it.

    Fails when quotes, control characters or the query are left in, or the status comes last.
    """
    before, after = "[[ ab =~ b ]]", "[[ ${BASH_REMATCH[0]} == b ]]"
    text = f"set -euo pipefail; source '{SHIM}'; {before}; {line}; {after}"
    environment = {"PATH": os.environ["PATH"], "HOLDOFF_REPORT_KEY": KEY}
    done = subprocess.run(["bash", "-c", text], check=False, capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (0, b"", 1), done.stderr
    assert b"secret" not in done.stderr
    assert b"pw" not in done.stderr
    recogniser = OutputRecogniser(policy_message(presets()["exact-online"]), KEY)
    assert [*recogniser.feed(done.stderr), *recogniser.finish()] == [seen]


def test_a_report_outside_a_run_says_so() -> None:
    """Without a key it is the plain line, which counts where the output is trusted.

    Fails when it is silent, or ends a script that is run by hand.
    """
    text = f"set -euo pipefail; source '{SHIM}'; holdoff_blocked 403; echo done"
    done = subprocess.run(
        ["bash", "-c", text], check=False, capture_output=True, env={"PATH": os.environ["PATH"]}
    )
    assert (done.returncode, done.stdout) == (0, b"done\n")
    warning, line = done.stderr.splitlines()
    assert b"HOLDOFF_REPORT_KEY is not set" in warning
    assert b"holdoff run --trust-output" in warning
    recogniser = OutputRecogniser(policy_message(presets()["exact-online"]), trust_output=True)
    assert [*recogniser.feed(line), *recogniser.finish()] == [SeenBlock(403)]


def test_errors_and_blocks_are_counted(scripts: Scripts) -> None:
    """Also those of a function whose output is captured.

    Fails when they are told on stdout.
    """
    text = """
        fetch() { holdoff_error 535193 "crm/Accounts?code=$1" 404; echo "answer $1"; }
        job() {
          for code in 1 2 3; do answer=$(fetch "$code"); done
          echo "$answer"
          holdoff_blocked 403 30
        }
        with_lease "$TOKEN" --when-quiet finish -- job
    """
    done = scripts.run(text)
    assert (done.returncode, done.stdout) == (0, "answer 3\n"), done.stderr
    with scripts.service.asked() as client:
        (budget,) = client.list_budgets(token=scripts.token, division="535193")
        (back_off,) = client.list_back_offs(scripts.service.app)
    assert (budget.used, budget.scope.endpoint) == (3, "crm/Accounts")
    assert back_off.status == 403


def test_the_page_is_right(scripts: Scripts, tmp_path: Path) -> None:
    """Its first script counts what the provider answers, its second takes the lease by itself.

    Fails when an example does not work as it stands, but for the names in it.
    """
    page = (SHIM.parent / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "curl").write_text("#!/bin/sh\nprintf 404\n")
    (tmp_path / "curl").chmod(0o755)
    path = f"{tmp_path}:{scripts.service.environment['PATH']}"
    env = scripts.service.environment | {"PATH": path}
    for script in (first, f'#!/usr/bin/env bash\n{second}echo "$HOLDOFF_TOKEN $*"\n'):
        ours = script.replace("apps/exact-nl/tokens/finance", scripts.token)
        ours = ours.replace("/usr/local/lib/holdoff/holdoff.sh", str(SHIM))
        assert ours.count(scripts.token) == 1
        (tmp_path / "page.sh").write_text(ours, encoding="utf-8")
        done = subprocess.run(
            ["bash", tmp_path / "page.sh", "a b"],
            env=env,
            check=False,
            capture_output=True,
            text=True,
            timeout=40,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{scripts.token} a b\n"
    with scripts.service.asked() as client:
        (budget,) = client.list_budgets(token=scripts.token, division="535193")
    assert budget.used == 1
