"""The same jobs twice: on their own, and each under `holdoff run`.

Acts one and two: six jobs on three "hosts" share one refresh token of a
simulated Exact Online and run on one schedule. Each act has a fresh simulator
with the same seeds; all that differs in the second is the wrapper around each
command.

Act three: a job with a bug errs on every call. It runs on the three hosts in
turn, far enough apart for the token, so that only the count of its errors
matters: too many, and the provider blocks the app for all jobs. Its two
fleets, one on its own and one under `holdoff run`, play side by side.

Everything is real: the simulators and the coordinator are processes of their
own, the coordinator's store is a Valkey, each job is a child process that
speaks HTTP. The last line is `violations: uncoordinated=<n> holdoff=<m>`,
counted by the simulators. Exit code 0 if the jobs on their own broke rules in
each act, and those under Holdoff none and did their work; 1 otherwise; 130 on
Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from asyncio.subprocess import PIPE, STDOUT, Process, create_subprocess_exec
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

BIN = Path(sys.executable).parent
HOLDOFF = str(BIN / "holdoff")
COORDINATOR = str(BIN / "holdoff-coordinator")
JOB = str(Path(__file__).with_name("job.py"))

ALONE, TOGETHER = "uncoordinated", "holdoff"
HOSTS = ("amsterdam", "brussels", "cologne")
START_MINUTES = (0, 2)
"""Each host starts one job at each of these minutes of simulated time, as by cron."""
BUG_START_MINUTES = (0, 12, 24)
"""In act three each host has its own minute: so far apart a token may be refreshed."""
LAST_START_MINUTE = 36
TOKENS = ("finance", "sales")
"""Two users' grants to the app."""

TIME_SCALE = 120
SHORT_TIME_SCALE = 350
POLICY_INTERVAL_SECONDS = 572
"""What the `exact-online` preset keeps: the provider's 570 s, and a margin of 2 s."""
CLOCKS_MARGIN_SECONDS = 0.1
"""Real time on top. Scaled down, the preset's margin is a few milliseconds, and store and
simulator measure with different clocks: one may be slewed, both round."""

ERRORS_ALLOWED, ERRORS_MARGIN = 10, 2
"""Of a user at an endpoint in an hour, by the provider; and what the preset keeps in hand."""
KNOWN_OF_THE_BUG = ("--division=535193", "--endpoint=financial/GLAccounts")
"""What a user of `holdoff run` says of the job with the bug: where it calls."""

LIMIT_SECONDS = 150
STOP_SECONDS = 8


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(slots=True)
class Run:
    """One run of a job, as seen from outside."""

    name: str
    start_minute: int
    token: str = "finance"  # noqa: S105 -- a name
    bug: bool = False
    line: str = ""
    """The last line that it wrote."""
    error_times: list[datetime] = field(default_factory=list)
    """When it wrote that a call was refused."""
    started_seconds: float | None = None
    """When the job itself, not its wrapper, wrote its first line."""
    ended_seconds: float | None = None
    exit_code: int | None = None


@dataclass(slots=True)
class Act:
    """One fleet's act: its runs, and what the provider says of them."""

    fleet: str
    app: str
    folder: Path
    """For its grants, and what the wrapper tells of runs."""
    time_scale: float
    runs: list[Run]
    started: float = 0.0
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    def command(self, run: Run) -> list[str]:
        """Tell how to start a run: the job itself or, under Holdoff, its wrapper before it."""
        job = [sys.executable, JOB, str(self.grant_file(run.token)), "--name", run.name]
        if run.bug:
            job.append("--bug")
        if self.fleet == ALONE:
            return job
        wrapper = [HOLDOFF, "run", "--token", self.token(run.token), "--job", run.name]
        if run.bug:
            # Paused, as by default, it would hold the lease for as long as its access token lives.
            wrapper += [*KNOWN_OF_THE_BUG, "--when-quiet=terminate"]
            wrapper.append(f"--result-file={self.result_file(run)}")
        return [*wrapper, "--", *job]

    def token(self, name: str) -> str:
        """Name a token as Holdoff does."""
        return f"apps/{self.app}/tokens/{name}"

    def grant_file(self, token: str) -> Path:
        """Where the hosts share a token's grant."""
        return self.folder / f"{token}.json"

    def result_file(self, run: Run) -> Path:
        """Where the wrapper tells how a run ended."""
        return self.folder / f"{run.name.replace('/', '-')}.json"

    @property
    def healthy_runs(self) -> list[Run]:
        """Those without the bug."""
        return [run for run in self.runs if not run.bug]

    @property
    def violations(self) -> int:
        """Every broken rule that the simulator counted."""
        return int(self.report["totals"]["violations"])

    def broken(self, rule: str) -> int:
        """How often a rule was broken."""
        return int(self.report["totals"]["by_rule"][rule])

    def count(self, what: str) -> int:
        """A count of the simulator over all jobs."""
        return sum(counts[what] for counts in self.report["agents"].values())

    def most_errors(self) -> int:
        """The errors of one user at one endpoint, where they are most.

        All of the act: a strict reading of an hour, which is some seconds on its scale of time.
        """
        return max((scope["total"] for scope in self.report["errors"]), default=0)

    def done(self) -> int:
        """Healthy jobs that ended well, and of which the simulator saw a token and an API call."""
        agents = self.report["agents"]
        return sum(
            run.exit_code == 0
            and run.name in agents
            and agents[run.name]["tokens_received"] > 0
            and agents[run.name]["api_calls_succeeded"] > 0
            for run in self.healthy_runs
        )

    def errors_per_second(self) -> float:
        """How fast the job with the bug erred where it was fastest."""
        gaps = (after - before for run in self.runs for before, after in pairwise(run.error_times))
        return 1 / min((gap.total_seconds() for gap in gaps), default=math.inf)

    def reaction_seconds(self) -> float | None:
        """From a job's word of its last error to its end by the wrapper; None if none was ended."""
        for run in self.runs:
            if run.error_times and self.result_file(run).exists():
                result = json.loads(self.result_file(run).read_bytes())
                if result["outcome"] == "backed_off":
                    ended = datetime.fromisoformat(result["ended_at"])
                    return (ended - run.error_times[-1]).total_seconds()
        return None


class Stage:
    """Plays acts and shows them: a live table on a terminal, a line per event in a log."""

    def __init__(self, folder: Path, time_scale: float, rotation: str) -> None:
        self.console = Console()
        self.folder = folder
        self.time_scale = time_scale
        self.rotation = rotation

    def act(self, fleet: str) -> Act:
        """Every host starts jobs at the same minutes, all with one token."""
        runs = [
            Run(f"job/{fleet}/{host}/{n}", minute)
            for n, minute in enumerate(START_MINUTES, 1)
            for host in HOSTS
        ]
        return Act(fleet, "demo", self._folder(f"{fleet}-demo"), self.time_scale, runs)

    def act_with_bug(self, fleet: str) -> Act:
        """A job with a bug on each host, and healthy ones with this token and with another."""
        runs: list[Run] = []
        for host, minute in zip(HOSTS, BUG_START_MINUTES, strict=True):
            runs.append(Run(f"job/{fleet}/{host}/bug", minute, bug=True))
            runs.append(Run(f"job/{fleet}/{host}/sales", minute, token="sales"))  # noqa: S106
        runs.append(Run(f"job/{fleet}/{HOSTS[0]}/finance", LAST_START_MINUTE))
        return Act(fleet, "demo-bug", self._folder(f"{fleet}-bug"), SHORT_TIME_SCALE, runs)

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    async def play(self, *acts: Act, env: dict[str, str]) -> None:
        """Play acts side by side, each against a fresh simulator.

        Args:
            acts: the acts.
            env: the jobs' variables on top of our own.
        """
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(self._provider(act)) for act in acts]
            started = time.monotonic()
            for act in acts:
                act.started = started
            if self.console.is_terminal:
                live = Live(get_renderable=lambda: self._progress(acts), console=self.console)
                stack.enter_context(live)
            async with asyncio.TaskGroup() as playing:
                for act in acts:
                    playing.create_task(self._play(act, env))
            for act, url in zip(acts, urls, strict=True):
                act.report = await fetch(f"{url}/_simulator/report")

    @asynccontextmanager
    async def _provider(self, act: Act) -> AsyncIterator[str]:
        """Run the act's simulator, and hand its grants to the hosts."""
        async with service(
            [
                HOLDOFF,
                *("simulator", "serve"),
                f"--time-scale={act.time_scale}",
                f"--rotation={self.rotation}",
                f"--users={len(TOKENS)}",
            ],
            ready=r"(http://[\d.:]+)",
        ) as url:
            seeds = (await fetch(f"{url}/_simulator/seed"))["seeds"]
            for token, grant in zip(TOKENS, seeds, strict=True):
                act.grant_file(token).write_text(json.dumps(grant))
            yield url

    async def _play(self, act: Act, env: dict[str, str]) -> None:
        async with asyncio.TaskGroup() as jobs:
            tasks = {run.name: jobs.create_task(self._run(act, run, env)) for run in act.runs}
            await asyncio.wait([tasks[run.name] for run in act.healthy_runs])
            for run in act.runs:
                if not tasks[run.name].done():  # it has the bug, and would wait for an hour
                    self._event(act, run, "held back to the end, and told to stop")
                    tasks[run.name].cancel()
        act.seconds = time.monotonic() - act.started

    async def _run(self, act: Act, run: Run, env: dict[str, str]) -> None:
        await asyncio.sleep(run.start_minute * 60 / act.time_scale)
        async with child(act.command(run), env) as process:
            async for line in lines(process):
                if line.endswith(f" {run.name} started"):
                    run.started_seconds = time.monotonic() - act.started
                elif " The remote server returned an error: " in line:
                    moment, _, _ = line.partition(f" {run.name} ")
                    run.error_times.append(datetime.fromisoformat(moment))
                self._event(act, run, line)
            run.exit_code = await process.wait()
        run.ended_seconds = time.monotonic() - act.started
        self._event(act, run, f"exit {run.exit_code}")

    def _event(self, act: Act, run: Run, line: str) -> None:
        # The job's own lines repeat the time and its name, which stand beside them here.
        run.line = line.partition(f"{run.name} ")[2] or line
        if not self.console.is_terminal:
            seconds = time.monotonic() - act.started
            self.say(f"{seconds:6.2f} s  {run.name}  {run.line}")

    def say(self, text: str, style: str | None = None) -> None:
        """Write a line as it is: no markup, colours or folds of rich's own."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _progress(self, acts: Sequence[Act]) -> Table:
        seconds = time.monotonic() - acts[0].started
        table = Table("job", "started", title=f"{seconds:.1f} s", expand=True)
        table.add_column("now", ratio=1, no_wrap=len(acts) > 1, overflow="ellipsis")
        for act in acts:
            table.add_section()
            table.add_row(act.fleet, style="bold")
            for run in act.runs:
                style = {None: "", 0: "green"}.get(run.exit_code, "red")
                errors = f"{len(run.error_times)} errors; " if run.error_times else ""
                label = run.name.removeprefix(f"job/{act.fleet}/")
                table.add_row(label, _seconds(run.started_seconds), errors + run.line, style=style)
        return table

    def table(self, acts: Sequence[Act], bug_acts: Sequence[Act]) -> Table:
        """Lay the two fleets side by side."""
        table = Table(title=f"Refresh tokens: rotation {self.rotation}; time x {self.time_scale:g}")
        table.add_column("")
        for act in acts:
            table.add_column(act.fleet, justify="right")

        def row(label: str, *values: object) -> None:
            table.add_row(label, *(str(value) for value in values))

        row("jobs done", *(f"{act.done()} of {len(act.runs)}" for act in acts))
        row("token requests", *(act.count("token_requests") for act in acts))
        row("- too early", *(act.broken("refresh_interval") for act in acts))
        row("- with an old refresh token", *(act.broken("old_refresh_token") for act in acts))
        row("API calls answered", *(act.count("api_calls_succeeded") for act in acts))
        row("app blocked", *(len(act.report["blocks"]) for act in acts))
        row("- requests refused meanwhile", *(act.count("refused_while_blocked") for act in acts))
        row("time taken", *(_seconds(act.seconds) for act in acts))
        table.add_section()
        for one, other in zip(*(act.runs for act in acts), strict=True):
            label = one.name.removeprefix(f"job/{ALONE}/")
            row(f"{label} started at", *(_seconds(run.started_seconds) for run in (one, other)))
        table.add_section()
        table.add_row(f"A job with a bug; time x {SHORT_TIME_SCALE}:")
        allowed = f"errors at one endpoint, of {ERRORS_ALLOWED} allowed"
        row(allowed, *(act.most_errors() for act in bug_acts))
        row("app blocked", *(len(act.report["blocks"]) for act in bug_acts))
        row(
            "- requests refused meanwhile",
            *(act.count("refused_while_blocked") for act in bug_acts),
        )
        row("healthy jobs done", *(f"{act.done()} of {len(act.healthy_runs)}" for act in bug_acts))
        row("API calls answered", *(act.count("api_calls_succeeded") for act in bug_acts))
        return table


async def perform(stage: Stage) -> bool:
    """Perform all acts and tell whether Holdoff kept its promise.

    Raises:
        DemoError: something did not start, or all took too long.
    """
    alone, together = stage.act(ALONE), stage.act(TOGETHER)
    bug_alone, bug_together = stage.act_with_bug(ALONE), stage.act_with_bug(TOGETHER)
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            stage.say("Act one: the jobs on their own.")
            await stage.play(alone, env={})

            stage.say("Act two: the same jobs, each under `holdoff run`.")
            async with service(
                [
                    COORDINATOR,
                    "serve",
                    "--listen=127.0.0.1:0",
                    f"--data-dir={stage.folder / 'coordinator'}",
                    "--log-format=json",
                ],
                ready=r'"address": "([\d.:]+)"',
            ) as endpoint:
                # The wrapper's own files: apart from those of this host's real jobs.
                env = {"HOLDOFF_ENDPOINT": endpoint, "XDG_STATE_HOME": str(stage.folder / "state")}
                await create_tokens(together, env)
                await create_tokens(bug_together, env)
                await stage.play(together, env=env)

                stage.say("Act three: a job with a bug, on its own and under `holdoff run`.")
                await stage.play(bug_alone, bug_together, env=env)
    except TimeoutError as error:
        raise DemoError(f"not done after {LIMIT_SECONDS} s") from error

    stage.console.print(stage.table((alone, together), (bug_alone, bug_together)))
    tell_bound(stage, bug_together)
    for act in (together, bug_together):
        for violation in act.report["violations"]:
            stage.say("broken under Holdoff: {rule} by {agent}: {detail}".format_map(violation))
    uncoordinated = alone.violations + bug_alone.violations
    coordinated = together.violations + bug_together.violations
    sys.stdout.write(f"violations: uncoordinated={uncoordinated} holdoff={coordinated}\n")
    return (
        alone.violations > 0
        and bool(bug_alone.report["blocks"])
        and coordinated == 0
        and bug_together.most_errors() <= ERRORS_ALLOWED
        and all(act.done() == len(act.healthy_runs) for act in (together, bug_together))
    )


async def create_tokens(act: Act, env: dict[str, str]) -> None:
    """Create an act's tokens, with an interval on its scale of time.

    Raises:
        DemoError: it failed.
    """
    interval_seconds = POLICY_INTERVAL_SECONDS / act.time_scale + CLOCKS_MARGIN_SECONDS
    for token in TOKENS:
        await command(
            [
                *(HOLDOFF, "token", "create", act.token(token)),
                f"--refresh-interval={interval_seconds * 1000:.0f}ms",
            ],
            env,
        )


def tell_bound(stage: Stage, act: Act) -> None:
    """Say how many errors there may be of a job that is only watched, and what bounds them hard."""
    reaction_seconds = act.reaction_seconds()
    if reaction_seconds is None:
        stage.say("The job with the bug did not have to be stopped.")
        return
    rate = act.errors_per_second()
    most = ERRORS_ALLOWED - ERRORS_MARGIN + rate * reaction_seconds
    stage.say(
        f"Erring {rate:.1f} times a second, it was stopped {reaction_seconds:.2f} s after its last"
        f" error: at most limit - margin + rate x reaction = {ERRORS_ALLOWED} - {ERRORS_MARGIN} +"
        f" {rate:.1f} x {reaction_seconds:.2f} = {most:.1f} errors.\n"
        "A hard bound needs room taken before each call, with `budget_guard`."
    )


@asynccontextmanager
async def child(command: Sequence[str], env: dict[str, str]) -> AsyncIterator[Process]:
    """Start a process that does not outlive the block.

    It gets a session of its own: a Ctrl-C reaches us alone, and we end the rest in order.
    """
    process = await create_subprocess_exec(
        *command, stdout=PIPE, stderr=STDOUT, env={**os.environ, **env}, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def lines(process: Process) -> AsyncIterator[str]:
    """Yield what a process writes, line by line."""
    assert process.stdout is not None  # noqa: S101 -- it was started with a pipe
    async for line in process.stdout:
        yield line.decode(errors="replace").rstrip()


@asynccontextmanager
async def service(command: Sequence[str], ready: str) -> AsyncIterator[str]:
    """Run a server and yield its address: the group of `ready` in the line that tells it.

    Raises:
        DemoError: it ended before it told.
    """
    async with child(command, {}) as process:
        output = lines(process)
        said = []
        async for line in output:
            said.append(line)
            if match := re.search(ready, line):
                break
        else:
            raise DemoError(f"{' '.join(command)} did not start:\n" + "\n".join(said))

        async def drain() -> None:
            async for _ in output:
                pass

        draining = asyncio.create_task(drain())  # a full pipe would stop the server
        try:
            yield match[1]
        finally:
            draining.cancel()


async def command(arguments: Sequence[str], env: dict[str, str]) -> None:
    """Run a command to its end.

    Raises:
        DemoError: it failed; the message carries what it wrote.
    """
    async with child(arguments, env) as process:
        said = [line async for line in lines(process)]
        if await process.wait():
            raise DemoError(f"{' '.join(arguments)} failed:\n" + "\n".join(said))


async def fetch(url: str) -> dict[str, Any]:
    """Read a JSON document of the simulator."""

    def get() -> dict[str, Any]:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 -- our own server
            document: dict[str, Any] = json.load(answer)
            return document

    return await asyncio.to_thread(get)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


async def _main(arguments: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 -- we are in one
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="holdoff-demo-") as folder:
        time_scale = SHORT_TIME_SCALE if arguments.short else TIME_SCALE
        stage = Stage(Path(folder), time_scale, arguments.rotation)
        try:
            return 0 if await perform(stage) else 1
        except DemoError as error:
            stage.say(f"demo: {error}", style="red")
            return 1


def main() -> int:
    """Read the arguments and perform."""
    parser = argparse.ArgumentParser(description="Run the same jobs without and with Holdoff.")
    parser.add_argument("--short", action="store_true", help="in about half a minute, for CI")
    parser.add_argument(
        "--rotation",
        choices=("reusable", "single-use"),
        default="reusable",
        help="whether the provider accepts old refresh tokens (default: reusable)",
    )
    try:
        return asyncio.run(_main(parser.parse_args()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
