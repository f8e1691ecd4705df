"""The same jobs twice: on their own, and each under `holdoff run`.

Six jobs on three "hosts" share one refresh token of a simulated Exact Online
and run on one schedule. Each act has a fresh simulator with the same seed; all
that differs in the second is the wrapper around each command.

Everything is real: the simulator and the coordinator are processes of their
own, the coordinator's store is a Valkey, each job is a child process that
speaks HTTP. The last line is `violations: uncoordinated=<n> holdoff=<m>`,
counted by the simulators. Exit code 0 if n > 0, m = 0 and every job under
Holdoff did its work; 1 otherwise; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from asyncio.subprocess import PIPE, STDOUT, Process, create_subprocess_exec
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
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

HOSTS = ("amsterdam", "brussels", "cologne")
START_MINUTES = (0, 2)
"""Each host starts one job at each of these minutes of simulated time, as by cron."""
TOKEN = "apps/demo/tokens/finance"  # noqa: S105 -- a name

TIME_SCALE = 120
SHORT_TIME_SCALE = 350
POLICY_INTERVAL_SECONDS = 572
"""What the `exact-online` preset keeps: the provider's 570 s, and a margin of 2 s."""
CLOCKS_MARGIN_SECONDS = 0.1
"""Real time on top. Scaled down, the preset's margin is a few milliseconds, and store and
simulator measure with different clocks: one may be slewed, both round."""

LIMIT_SECONDS = 85
STOP_SECONDS = 8


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(slots=True)
class Run:
    """One run of a job, as seen from outside."""

    name: str
    start_minute: int
    line: str = ""
    """The last line that it wrote."""
    started_seconds: float | None = None
    """When the job itself, not its wrapper, wrote its first line."""
    ended_seconds: float | None = None
    exit_code: int | None = None


@dataclass(slots=True)
class Act:
    """One fleet's act: its runs, and what the provider says of them."""

    fleet: str
    runs: list[Run]
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

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

    def done(self) -> int:
        """Jobs that ended well, and of which the simulator saw a token and an API call."""
        agents = self.report["agents"]
        return sum(
            run.exit_code == 0
            and run.name in agents
            and agents[run.name]["tokens_received"] > 0
            and agents[run.name]["api_calls_succeeded"] > 0
            for run in self.runs
        )


class Stage:
    """Runs acts and shows them: a live table on a terminal, a line per event in a log."""

    def __init__(self, folder: Path, time_scale: float, rotation: str) -> None:
        self.console = Console()
        self.folder = folder
        self.time_scale = time_scale
        self.rotation = rotation

    async def act(self, fleet: str, wrapper: Sequence[str], env: dict[str, str]) -> Act:
        """Run every job of a fleet against a fresh simulator.

        Args:
            fleet: the fleet's name.
            wrapper: what to put before each job's command; `{name}` becomes the job's name.
            env: variables on top of our own.
        """
        names = [f"job/{fleet}/{host}" for host in HOSTS]
        act = Act(
            fleet,
            [Run(f"{name}/{n}", m) for n, m in enumerate(START_MINUTES, 1) for name in names],
        )
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(
                service(
                    [
                        HOLDOFF,
                        *("simulator", "serve"),
                        f"--time-scale={self.time_scale}",
                        f"--rotation={self.rotation}",
                    ],
                    ready=r"(http://[\d.:]+)",
                )
            )
            grant_file = self.folder / f"{fleet}.json"
            [grant] = (await fetch(f"{url}/_simulator/seed"))["seeds"]
            grant_file.write_text(json.dumps(grant))

            act.started = time.monotonic()
            live = (
                Live(get_renderable=lambda: self._progress(act), console=self.console)
                if self.console.is_terminal
                else nullcontext()
            )
            with live:
                async with asyncio.TaskGroup() as jobs:
                    for run in act.runs:
                        prefix = [part.format(name=run.name) for part in wrapper]
                        command = [
                            *prefix,
                            sys.executable,
                            JOB,
                            str(grant_file),
                            "--name",
                            run.name,
                        ]
                        jobs.create_task(self._run(act, run, command, env))
                act.seconds = time.monotonic() - act.started
            act.report = await fetch(f"{url}/_simulator/report")
        return act

    async def _run(self, act: Act, run: Run, command: list[str], env: dict[str, str]) -> None:
        await asyncio.sleep(run.start_minute * 60 / self.time_scale)
        async with child(command, env) as process:
            async for line in lines(process):
                if line.endswith(f" {run.name} started"):
                    run.started_seconds = time.monotonic() - act.started
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

    def _progress(self, act: Act) -> Table:
        seconds = time.monotonic() - act.started
        table = Table("job", "started", "now", title=f"{act.fleet}: {seconds:.1f} s", expand=True)
        for run in act.runs:
            style = {None: "", 0: "green"}.get(run.exit_code, "red")
            label = run.name.removeprefix(f"job/{act.fleet}/")
            table.add_row(label, _seconds(run.started_seconds), run.line, style=style)
        return table

    def table(self, first: Act, second: Act) -> Table:
        """Lay the two acts side by side."""
        table = Table(title=f"Refresh tokens: rotation {self.rotation}; time x {self.time_scale:g}")
        table.add_column("")
        for act in (first, second):
            table.add_column(act.fleet, justify="right")

        def row(label: str, *values: object) -> None:
            table.add_row(label, *(str(value) for value in values))

        acts = (first, second)
        row("jobs done", *(f"{act.done()} of {len(act.runs)}" for act in acts))
        row("token requests", *(act.count("token_requests") for act in acts))
        row("- too early", *(act.broken("refresh_interval") for act in acts))
        row("- with an old refresh token", *(act.broken("old_refresh_token") for act in acts))
        row("API calls answered", *(act.count("api_calls_succeeded") for act in acts))
        row("app blocked", *(len(act.report["blocks"]) for act in acts))
        row("- requests refused meanwhile", *(act.count("refused_while_blocked") for act in acts))
        row("time taken", *(_seconds(act.seconds) for act in acts))
        table.add_section()
        for one, other in zip(first.runs, second.runs, strict=True):
            label = one.name.removeprefix(f"job/{first.fleet}/")
            row(f"{label} started at", *(_seconds(run.started_seconds) for run in (one, other)))
        return table


async def perform(stage: Stage) -> bool:
    """Perform both acts and tell whether Holdoff kept its promise.

    Raises:
        DemoError: something did not start, or all took too long.
    """
    interval_seconds = POLICY_INTERVAL_SECONDS / stage.time_scale + CLOCKS_MARGIN_SECONDS
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            stage.say("Act one: the jobs on their own.")
            first = await stage.act("uncoordinated", (), {})

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
                env = {"HOLDOFF_ENDPOINT": endpoint}
                await command(
                    [
                        *(HOLDOFF, "token", "create", TOKEN),
                        f"--refresh-interval={interval_seconds * 1000:.0f}ms",
                    ],
                    env,
                )
                wrapper = (HOLDOFF, "run", "--token", TOKEN, "--job", "{name}", "--")
                second = await stage.act("holdoff", wrapper, env)
    except TimeoutError as error:
        raise DemoError(f"not done after {LIMIT_SECONDS} s") from error

    stage.console.print(stage.table(first, second))
    for violation in second.report["violations"]:
        stage.say("broken under Holdoff: {rule} by {agent}: {detail}".format_map(violation))
    sys.stdout.write(f"violations: uncoordinated={first.violations} holdoff={second.violations}\n")
    return first.violations > 0 and second.violations == 0 and second.done() == len(second.runs)


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
    parser.add_argument("--short", action="store_true", help="in less than 20 s, for CI")
    parser.add_argument(
        "--rotation",
        choices=("reuse", "strict"),
        default="reuse",
        help="whether the provider takes old refresh tokens (default: reuse)",
    )
    try:
        return asyncio.run(_main(parser.parse_args()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
