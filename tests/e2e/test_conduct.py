"""What `holdoff run` does about errors in its command's output, and when it must be quiet."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import re
import signal
import sys
import termios
import time
import uuid
from typing import IO, TYPE_CHECKING, Any

import pytest

import holdoff
from holdoff.v1 import budget_pb2, lease_pb2
from tests.e2e.puppet import Puppet
from tests.e2e.service import Service
from tests.harness import LONG, at_length, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.timestamp_pb2 import Timestamp

CRM = ("--division", "1", "--endpoint", "crm/Accounts")
ERROR = "HOLDOFF-ERROR division=1 endpoint=crm/Accounts status=400"
BLOCKED = "HOLDOFF-BLOCKED status=403"

POLICY = r"""
name = "NAME"
when_quiet = "DEFAULT"

[refresh]
interval = "0.1s"
access_token_life = "LIFE"

[endpoint]
path = '/api/v1/(?P<division>[^/]+)/(?P<endpoint>.+)'

[[limit]]
name = "errors"
event = "errors"
most = 10
margin = 2
window = "WINDOW"
scope = ["app", "token", "division", "endpoint"]
statuses = [400, 404]

[block]
first = "BLOCK"
most = "1h"
"""
USUAL = {"DEFAULT": "pause", "LIFE": "0s", "WINDOW": "1h", "BLOCK": "2.5s"}
POLICIES = {
    "pause": {},
    "finish": {"DEFAULT": "finish"},
    "terminate": {"DEFAULT": "terminate"},
    "short-life": {"LIFE": "2s", "BLOCK": "10m"},
    "short-window": {"WINDOW": "3s"},
}


def policy(name: str) -> str:
    """Return the text of a policy."""
    text = POLICY
    for field, value in {"NAME": name, **USUAL, **POLICIES[name]}.items():
        text = text.replace(field, value)
    return text


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Give a coordinator that the tests of this module share, each with an app of its own."""
    texts = {name: policy(name) for name in POLICIES}
    with Service(tmp_path_factory.mktemp("conduct"), policies=texts) as service:
        yield service


class App:
    """An app with one token or more, what runs with them, and what the coordinator says of it."""

    def __init__(self, service: Service, client: holdoff.Client, folder: Path) -> None:
        self.service = service
        self.client = client
        self.name = f"apps/{uuid.uuid4()}"
        self._folder = folder
        self._runs: list[Run] = []

    def token(self, policy: str = "pause", name: str = "t") -> str:
        """Create a token."""
        token = f"{self.name}/tokens/{name}"
        self.client.create_token(token, policy=policy)
        return token

    def start(self, token: str, *arguments: str) -> Run:
        """Start a wrapper, with a puppet under it unless a command is given after `--`."""
        result = self._folder / f"{len(self._runs)}.json"
        puppet = Puppet(self._folder, len(self._runs))
        command = () if "--" in arguments else ("--", *puppet.command)
        # Its markers have no key.
        options = ("--token", token, "--result-file", str(result), "--trust-output")
        process = self.service.start_holdoff("run", *options, *arguments, *command)
        self._runs.append(Run(process, puppet, result))
        return self._runs[-1]

    def spend(self, token: str) -> None:
        """Report errors at the endpoint that `CRM` declares, as many as it has room for."""
        self.client.record_error(token, division="1", endpoint="crm/Accounts", count=8)

    def used(self) -> int:
        """Return how many errors are counted."""
        return sum(one.used for one in self.client.list_budgets(self.name))

    def back_off(self) -> budget_pb2.BackOff:
        """Return the only back-off of the app, once there is one."""
        [one] = wait_until(lambda: self.client.list_back_offs(self.name))
        return one  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of all that runs."""
        for run in self._runs:
            run.close()


class Run:
    """A wrapper, and the puppet under it."""

    def __init__(self, process: subprocess.Popen[str], puppet: Puppet, result: Path) -> None:
        self.process = process
        self.puppet = puppet
        self._result = result

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stdout, stderr

    def account(self) -> dict[str, Any]:
        """Return what the wrapper wrote about the run."""
        account: dict[str, Any] = json.loads(self._result.read_text())
        return account

    def close(self) -> None:
        """Let go of it; a guard ends what the wrapper ran."""
        self.process.kill()
        self.process.communicate()
        self.puppet.close()


@pytest.fixture
def app(coordinator: Service, tmp_path: Path) -> Iterator[App]:
    """Give an app of its own at the shared coordinator, which a test may end and start again."""
    if not coordinator.runs:  # a test failed
        coordinator.start()
    with (
        holdoff.Client(coordinator.address) as client,
        contextlib.closing(App(coordinator, client, tmp_path)) as one,
    ):
        yield one


def seconds(instant: Timestamp) -> float:
    """Return an instant in seconds since 1970."""
    return instant.ToMicroseconds() / 1e6


# When it must be quiet -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "options"), [("terminate", ("--when-quiet", "pause")), *at_length(("pause", ()))]
)
def test_paused_until_the_scope_is_open(app: App, policy: str, options: tuple[str, ...]) -> None:
    """The command stands still from the block to its end, goes on, and ends as it likes.

    Fails when the option does not go before the policy, or a pause does not end.
    """
    run = app.start(app.token(policy), *options)
    run.puppet.say(BLOCKED)
    end = seconds(app.back_off().end_time)
    wait_until(lambda: run.puppet.is_stopped)
    stopped_at = time.time()
    wait_until(lambda: run.puppet.runs_after(end))
    assert [at for at in run.puppet.runs_after(stopped_at) if at < end] == []
    run.puppet.end(3)
    code, stdout, stderr = run.wait()
    assert (code, stdout) == (3, f"{BLOCKED}\n")
    first, second = stderr.splitlines()
    assert first.startswith(f"holdoff: the provider refuses calls of {app.name}")
    assert "with HTTP 403: the command is paused" in first
    assert second == "holdoff: the command resumes"
    account = run.account()
    assert (account["outcome"], account["exit_code"], account["errors_seen"]) == ("exited", 3, 1)


def test_a_paused_holder_says_why_and_for_how_long(app: App) -> None:
    """Its own line, and its lease, name the budget, the division and the endpoint.

    Fails when the length is that of the access token, and when the lease is listed as active.
    """
    token = app.token()
    run = app.start(token, *CRM)
    run.puppet.do(f"for _ in range(8): say({ERROR!r})")
    wait_until(lambda: run.puppet.is_stopped)
    paused = lease_pb2.HOLDER_ACTIVITY_PAUSED
    wait_until(lambda: [one.activity for one in app.client.list_leases(token)] == [paused], 30)
    why = f"the budget 'errors' of {token} division 1 crm/Accounts is spent"
    wait_until(lambda: [one.activity_message for one in app.client.list_leases(token)] == [why], 30)
    app.client.reset_budget(next(app.client.list_budgets(app.name)).name, "test")
    wait_until(lambda: not run.puppet.is_stopped)
    running = lease_pb2.HOLDER_ACTIVITY_RUNNING
    wait_until(lambda: [one.activity for one in app.client.list_leases(token)] == [running], 30)
    run.puppet.end()
    code, _, stderr = run.wait()
    assert code == 0
    assert re.search(rf"{why}: the command (is|stays) paused for at least (\d+m\d*s?|1h)", stderr)


@pytest.mark.parametrize(
    ("policy", "options"), [("finish", ()), *at_length(("pause", ("--when-quiet", "finish")))]
)
def test_let_finish(app: App, policy: str, options: tuple[str, ...]) -> None:
    """The command runs on through the block, and whoever reads the log knows why.

    Fails when `finish` pauses, or the policy's word is not asked.
    """
    run = app.start(app.token(policy), *options)
    run.puppet.say(BLOCKED)
    end = seconds(app.back_off().end_time)
    wait_until(lambda: run.puppet.runs_after(end))
    assert [at for at in run.puppet.runs_after(end - 1) if at < end] != []
    run.puppet.end()
    code, _, stderr = run.wait()
    assert code == 0
    assert "the command may finish" in stderr
    assert run.account()["outcome"] == "exited"


@pytest.mark.parametrize(
    ("policy", "options"), [("terminate", ()), *at_length(("pause", ("--when-quiet", "terminate")))]
)
def test_terminated(app: App, policy: str, options: tuple[str, ...]) -> None:
    """TERM for the command, 75 for who started it, and the reason in the account.

    Fails when the end of the command is taken for its own, or nobody ends it.
    """
    run = app.start(app.token(policy), *options)
    run.puppet.do(
        "def ended(*_): note('TERM'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, ended)\n"
        f"say({BLOCKED!r})"
    )
    code, _, stderr = run.wait()
    assert code == 75
    assert "ending the command" in stderr
    account = run.account()
    assert (account["outcome"], account["child_exit_code"]) == ("backed_off", 0)
    assert account["reason"]
    wait_until(lambda: not list(app.client.list_leases(app.name)))


def test_paused_no_longer_than_the_access_token_lives(app: App) -> None:
    """A token that lives 2 s is dead after a block of ten minutes: the command is ended, with 75.

    Fails when a paused command goes on with a dead token, or is kept for the whole block.
    """
    run = app.start(app.token("short-life"))
    run.puppet.say(BLOCKED)
    code, _, stderr = run.wait()
    assert code == 75
    assert re.search(r"is paused.*; it is ended in [012]s, when its access token expires", stderr)
    assert "its access token has expired: ending the command" in stderr
    assert run.account()["outcome"] == "backed_off"


@pytest.mark.parametrize("signum", [signal.SIGTERM, *at_length(signal.SIGINT)])
def test_a_paused_command_can_be_ended(app: App, signum: signal.Signals) -> None:
    """Nobody has to wait for the end of a block to end a job.

    Fails when a signal waits until the pause is over.
    """
    token = app.token()
    run = app.start(token)
    run.puppet.have_done(f"signal.signal({signum.value}, lambda *_: sys.exit(4))")
    app.client.set_back_off(token, 60, "test")
    wait_until(lambda: run.puppet.is_stopped)
    run.process.send_signal(signum)
    assert run.wait()[0] == 4


@pytest.mark.parametrize("paused", [True, *at_length(False)])
def test_a_break_ends_the_command_at_once(app: App, paused: bool) -> None:
    """The lease would live for two minutes, and the command is gone as soon as it is broken.

    Fails when a break is noticed by the next renewal only, which comes in 40 s.
    """
    token = app.token()
    run = app.start(token)
    wait_until(lambda: run.puppet.runs)
    if paused:
        app.client.set_back_off(token, 60, "test")
        wait_until(lambda: run.puppet.is_stopped)
    [lease] = app.client.list_leases(token)
    app.client.break_lease(lease.name, "wrong file")
    wait_until(lambda: run.puppet.is_gone)
    code, _, stderr = run.wait()
    assert code == 79
    assert "wrong file" in stderr


# By its own count ----------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_paused_by_its_own_count_while_the_coordinator_is_away(app: App, killed: bool) -> None:
    """Eight errors are too many whoever is away; later each of them is counted once.

    Fails when the wrapper does not count by itself, or does not report what it has counted.
    """
    run = app.start(app.token(), *CRM)
    wait_until(lambda: run.puppet.runs)
    with away(app.service, killed=killed):
        run.puppet.do(f"for _ in range(7): say({ERROR!r})")
        seven = wait_until(lambda: run.puppet.told)[0]
        wait_until(lambda: run.puppet.runs_after(seven + 1))
        run.puppet.say(ERROR)
        wait_until(lambda: run.puppet.is_stopped)
        stopped_at = time.time()
    wait_until(lambda: app.used() == 8)
    assert app.back_off().cause == budget_pb2.BACK_OFF_CAUSE_SPENT
    assert run.puppet.is_stopped
    assert run.puppet.runs_after(stopped_at) == []
    [budget] = app.client.list_budgets(app.name)
    app.client.reset_budget(budget.name, "test")
    wait_until(lambda: not run.puppet.is_stopped)
    run.puppet.end()
    code, _, stderr = run.wait()
    assert code == 0
    assert f"the budget 'errors' of {app.name}" in stderr
    assert "division 1 crm/Accounts is spent: the command is paused" in stderr
    assert run.account()["errors_seen"] == 8
    assert app.used() == 0


@contextlib.contextmanager
def away(service: Service, *, killed: bool) -> Iterator[None]:
    """Keep a coordinator from answering."""
    if killed:
        service.end(signal.SIGKILL)
    else:
        service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if killed:
            service.start()
        else:
            service.process.send_signal(signal.SIGCONT)


def test_other_places_have_room_of_their_own(app: App) -> None:
    """Seven errors at each of two endpoints are not eight at one; statuses that are free are free.

    Fails when the wrapper counts all errors together, or those that are not limited.
    """
    run = app.start(app.token(), *CRM)
    for error in (ERROR, ERROR.replace("Accounts", "Contacts")):
        run.puppet.do(f"for _ in range(7): say({error!r})")
    last = run.puppet.say(ERROR.replace("400", "500 count=50"))
    wait_until(lambda: app.used() == 14)
    wait_until(lambda: run.puppet.runs_after(last + 1))
    run.puppet.end()
    code, _, stderr = run.wait()
    assert (code, stderr) == (0, "")
    assert run.account()["errors_seen"] == 64


# What is looked at ---------------------------------------------------------------------------


def test_data_is_no_report(app: App) -> None:
    """A marker counts with the key of the run, and the wrapper warns of one without it.

    Fails when text in the data of a job pauses the jobs of other tokens, when the key is another
    one than in the command's environment, or when it is shown by the wrapper.
    """
    attack = "customer: ACME (HOLDOFF-BLOCKED retry_after=86400)"
    program = (
        "import os; key = os.environ['HOLDOFF_REPORT_KEY']; "
        f"print({attack!r}); print({BLOCKED!r}); print({BLOCKED!r}); "
        f"print({ERROR!r}.replace('ERROR', 'ERROR key=' + key)); "
        f"print({ERROR!r}.replace('ERROR', 'ERROR key=' + key[:-1] + 'x'))"
    )
    token = app.token()
    process = app.service.start_holdoff(
        "run", "--token", token, "--", sys.executable, "-c", program
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout.startswith(f"{attack}\n{BLOCKED}\n")
    assert app.used() == 1
    assert app.client.list_back_offs(app.name) == []
    key = re.findall(r"key=([0-9a-f]{32}) ", stdout)[0]
    assert key not in stderr
    assert stderr.count("did not count, because they have no key") == 1
    assert "--trust-output" in stderr


def test_of_log_and_output_one_is_counted(app: App, tmp_path: Path) -> None:
    """An error that stands in both counts once, and what the file held before does not.

    Fails when both are read, or the log from its beginning.
    """
    log = tmp_path / "job.log"
    log.write_text(f"{ERROR}\n" * 3)
    run = app.start(app.token(), "--log-file", str(log))
    run.puppet.do(f"print({ERROR!r}, file=open({str(log)!r}, 'a'))\nsay({ERROR!r})")
    run.puppet.end()
    code, stdout, _ = run.wait()
    assert (code, stdout) == (0, f"{ERROR}\n")
    assert run.account()["errors_seen"] == 1
    assert app.used() == 1


def test_of_two_streams_one_is_counted(app: App) -> None:
    """An error on stdout and stderr counts once, and two on one of them count twice.

    Fails when each stream is counted for itself.
    """
    run = app.start(app.token())
    twice = f"{ERROR}\n{ERROR}"
    run.puppet.do(f"say({twice!r})\nprint({twice!r}, file=sys.stderr)")
    run.puppet.end()
    code, stdout, stderr = run.wait()
    assert (code, stdout) == (0, f"{twice}\n")
    assert stderr.count(ERROR) == 2
    assert run.account()["errors_seen"] == 2
    assert app.used() == 2


def test_output_that_is_not_to_be_read_is_not(app: App) -> None:
    """Nothing is counted, nobody is paused, and the output is there.

    Fails when the option is not heeded.
    """
    run = app.start(app.token(), "--no-read-output", *CRM)
    last = run.puppet.say(f"{ERROR}\n" * 9)
    wait_until(lambda: run.puppet.runs_after(last + 0.5))
    run.puppet.end()
    code, stdout, stderr = run.wait()
    assert (code, stdout.count(ERROR), stderr) == (0, 9, "")
    assert run.account()["errors_seen"] == 0
    assert app.used() == 0


def test_an_error_in_the_last_words_spoils_the_probe(app: App) -> None:
    """It is counted before the lease is given back, although its line never ends.

    Fails when the lease is given back before the last errors are counted: the end of the first
    job is then a success, and the back-off is over when the second one runs.
    """
    first, second = app.token(name="a"), app.token(name="b")
    app.client.record_block(first, status=403)
    probe = app.start(first)
    wait_until(lambda: probe.puppet.runs)
    assert app.back_off().state == budget_pb2.BACK_OFF_STATE_PROBING
    waiter = app.start(second)
    wait_until(lambda: list(app.client.list_waiters(second)))
    probe.puppet.do(f"say({ERROR!r}, end='')\nsys.exit(0)")
    assert probe.wait()[0] == 0
    assert app.used() == 1
    wait_until(lambda: waiter.puppet.runs)
    assert app.back_off().state == budget_pb2.BACK_OFF_STATE_PROBING
    waiter.puppet.end()
    assert waiter.wait()[0] == 0
    wait_until(lambda: not app.client.list_back_offs(app.name))


# Before it starts ----------------------------------------------------------------------------


def test_now_or_not_at_all_says_what_is_spent(app: App) -> None:
    """75, and the place with the time until which it is spent; other places are free.

    Fails when the declared scopes are not sent, or the answer does not say which of them it is.
    """
    token = app.token()
    app.spend(token)
    refused = app.start(token, "--no-wait", *CRM, "--", "true")
    code, _, stderr = refused.wait()
    assert code == 75
    assert "crm/Accounts" in stderr
    assert "division 1" in stderr
    assert re.search("earliest start in (59m|1h)", stderr), stderr
    assert f"holdoff explain {token}" in stderr
    account = refused.account()
    assert account["outcome"] == "not_granted"
    assert "crm/Accounts" in account["reason"]
    elsewhere = app.start(token, "--no-wait", *CRM[:3], "crm/Contacts", "--", "true")
    assert elsewhere.wait()[0] == 0


def test_a_run_that_waits_says_why(app: App) -> None:
    """A line says what is spent, where, and when it may start; then it starts.

    Fails when a back-off is told as something else, or ends unnoticed.
    """
    token = app.token("short-window")
    with app.client.acquire(token):
        waited = app.start(token, "--wait", "30s", *CRM, "--", "true")
        wait_until(lambda: list(app.client.list_waiters(token)))
        app.spend(token)
    code, _, stderr = waited.wait()
    assert code == 0
    # The first of them came while the token was held.
    waiting = [line for line in stderr.splitlines() if "is spent" in line][-1]
    for words in ("waiting for", "position 1 of 1", "crm/Accounts is spent", "earliest start in"):
        assert words in waiting, stderr
    assert f"holdoff explain {token}" in waiting
    assert waited.account()["waited_seconds"] > 0.5


def test_what_is_not_declared_is_where_the_job_erred(app: App) -> None:
    """A job that declares nothing waits for the endpoint that its name erred at; another does not.

    Fails when the name of the job is not sent with the errors, or not with the request.
    """
    token = app.token()
    buggy = app.start(token, "--job", "buggy")
    buggy.puppet.say(f"{ERROR}\n" * 8)
    wait_until(lambda: app.used() == 8)
    buggy.process.send_signal(signal.SIGTERM)
    assert buggy.wait()[0] == 128 + signal.SIGTERM
    refused = app.start(token, "--job", "buggy", "--wait", "1s", "--", "true")
    code, _, stderr = refused.wait()
    assert code == 75
    assert "crm/Accounts" in stderr
    assert app.start(token, "--job", "healthy", "--no-wait", "--", "true").wait()[0] == 0


# What stays as it was ------------------------------------------------------------------------


def test_exit_codes_and_signals_pass_while_output_is_read(app: App) -> None:
    """What the wrapper is sent reaches the command, whose own end is the wrapper's.

    Fails when reading the output puts a process or a handler in between.
    """
    token = app.token()
    run = app.start(token)
    run.puppet.have_done("signal.signal(signal.SIGUSR1, lambda *_: say('heard'))")
    run.process.send_signal(signal.SIGUSR1)
    assert run.process.stdout is not None
    assert run.process.stdout.readline() == "heard\n"
    run.puppet.end(42)
    assert run.wait()[0] == 42
    run = app.start(token)
    run.puppet.do("os.kill(os.getpid(), signal.SIGUSR2)")
    assert run.wait()[0] == 128 + signal.SIGUSR2
    account = run.account()
    assert (account["outcome"], account["child_signal"]) == ("signaled", signal.SIGUSR2)


def test_a_reader_that_blocks_delays_no_renewal(app: App) -> None:
    """Nobody reads for some lives of the lease: the command waits in its write, the lease lives on.

    Fails when renewals come from a thread that passes output on.
    """
    text = "x" * 2_000_000
    runs, leases = {}, {}
    for stream in ("stdout", "stderr"):
        token = app.token(name=stream)
        runs[stream] = app.start(token, "--ttl", "4s")
        runs[stream].puppet.do(f"sys.{stream}.write('x' * {len(text)}); sys.{stream}.flush()")
        runs[stream].puppet.end(5)
        wait_until(lambda: runs[stream].puppet.told)  # noqa: B023 - it is called here
        [leases[stream]] = app.client.list_leases(token)
    renewed_until = time.time() + (20 if LONG else 8)
    for lease in leases.values():
        wait_until(
            lambda: seconds(app.client.get_lease(lease.name).expire_time) > renewed_until,  # noqa: B023
        )
    for stream, run in runs.items():
        assert len(run.puppet.told) == 1
        code, stdout, stderr = run.wait()
        assert (code, stdout + stderr) == (5, text), stream


@pytest.mark.parametrize("must", ["pause", "end", *at_length("terminate")])
def test_a_reader_of_messages_that_blocks_delays_nothing(app: App, must: str) -> None:
    """Our stderr is full and nobody reads it: what has to be done is done all the same.

    Fails when a message is written before the command is paused or ended, or by a thread for
    which the end of the run waits.
    """
    token = app.token()
    run = app.start(token, "--when-quiet", "terminate" if must == "terminate" else "pause")
    run.puppet.do("if not os.fork():\n  os.write(2, b'x' * 2_000_000)\n  os._exit(0)")
    wait_until(lambda: is_full(run.process.stderr))
    if must == "end":
        [lease] = app.client.list_leases(token)
        app.client.break_lease(lease.name, "test")
    else:
        app.client.set_back_off(token, 60, "test")
    if must == "pause":
        wait_until(lambda: run.puppet.is_stopped)
        run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: run.puppet.is_gone)
    if must == "pause":
        wait_until(lambda: not list(app.client.list_leases(token)))


def is_full(pipe: IO[str] | None) -> bool:
    """Tell whether a pipe has no room for another page."""
    assert pipe is not None
    waiting = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, waiting)
    return waiting[0] >= fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
