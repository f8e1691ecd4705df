"""The examples of clients/examples: each command line is parsed by the real command, and run.

A fake Data Hub, the coordinator of the test and a temporary folder stand in for what is the
reader's own; nothing else of a line is changed.
"""

from __future__ import annotations

import configparser
import contextlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import click
import pytest

import holdoff
from holdoff.cli import main
from holdoff.cli.run import run
from tests.e2e.service import BIN
from tests.harness import at_length

if TYPE_CHECKING:
    from tests.e2e.service import Service

CLIENTS = Path(__file__).parents[2] / "clients"
EXAMPLES = CLIENTS / "examples"
LANGUAGES = ["en", "nl"]
TOKEN = "apps/exact-nl/tokens/finance"
ENDPOINT = "coordinator.example.com:50051"

# The ranges of minute, hour, day of the month, month and day of the week.
CRON_RANGES = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]

FAKE_DATA_HUB = """#!/bin/sh
echo 'to stderr' >&2
for word; do
  echo "word: $word"
  case $word in /logfile:*) echo ran >>"${word#*:}" ;; esac
done
exit "$(cat "$(dirname "$0")/exit-code")"
"""


def cron_jobs(language: str) -> tuple[dict[str, str], list[tuple[list[str], str, str]]]:
    """Read a crontab of /etc/cron.d: its variables, and the fields, user and text of each job."""
    variables, jobs = {}, []
    text = (EXAMPLES / language / "datahub.cron").read_text(encoding="utf-8")
    assert text.endswith("\n"), "cron ignores a last line without an end"
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if variable := re.fullmatch(r"(\w+)=(\S+)", line):
            variables[variable[1]] = variable[2]
        else:
            assert len(line) < 1000, "cron takes no longer line"
            *fields, user, command = line.split(maxsplit=6)
            assert not re.search(r"(?<!\\)%", command), "cron ends the command at a bare %"
            jobs.append((fields, user, command))
    return variables, jobs


def unit(language: str, name: str) -> configparser.ConfigParser:
    """Read a unit of systemd in which no setting is given twice."""
    text = (EXAMPLES / language / name).read_text(encoding="utf-8").replace("\\\n", " ")
    parser = configparser.ConfigParser(
        interpolation=None, delimiters=("=",), comment_prefixes=("#",)
    )
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(text)
    return parser


def task(language: str) -> tuple[str, str]:
    """Read the command and the arguments of a task of Task Scheduler."""
    data = (EXAMPLES / language / "datahub-nightly.xml").read_bytes()
    assert data.isascii()
    assert not data.startswith(b"<?xml"), "PowerShell and schtasks disagree about encodings"
    root = ET.fromstring(data)  # noqa: S314 - our own
    texts = {one.tag.rpartition("}")[2]: one.text or "" for one in root.iter()}
    return texts["Command"], texts["Arguments"]


def windows_words(arguments: str) -> list[str]:
    """Split as Windows programs do, where no quote stands in a word."""
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', arguments)]


def holdoff_words(command: str) -> list[str]:
    """Return the words of the `holdoff` in a shell's line, without its name."""
    words = shlex.split(command.partition(" >>")[0])
    assert words[0] in {"holdoff", "/usr/local/bin/holdoff"}
    return words[1:]


def commands(language: str) -> list[list[str]]:
    """Return the words of every `holdoff` in the examples of a language."""
    shell = [job[2] for job in cron_jobs(language)[1]]
    shell.append(unit(language, "datahub-nightly.service")["Service"]["ExecStart"])
    return [*map(holdoff_words, shell), windows_words(task(language)[1])]


def in_documents() -> list[str]:
    """Return every line with `holdoff run` or `with_lease` of the pages beside the clients."""
    pages = [*CLIENTS.glob("bash/*.md"), *CLIENTS.glob("examples/*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    starts = re.compile(r"\s*(?:exec )?(holdoff run --token .*|with_lease \"?[$a].* -- .*)")
    return [match[1] for match in map(starts.fullmatch, lines) if match]


def parsed(words: list[str]) -> dict[str, object]:
    """Parse the words after `holdoff`, as it does before it does anything."""
    group = main.make_context("holdoff", list(words))
    with group:
        name, _, rest = main.resolve_command(group, [*group._protected_args, *group.args])
        assert name == "run"
        return run.make_context("run", rest, parent=group).params


@pytest.mark.parametrize("language", LANGUAGES)
def test_command_lines_parse(language: str) -> None:
    """By the real parser, up to the command itself.

    Fails when an option of `holdoff run` that the examples use gets another name or range.
    """
    found = commands(language)
    assert len(found) == 4
    for words in found:
        params = parsed(words)
        command = params["command"]
        assert isinstance(command, tuple)
        assert command[0].endswith(("datahub", r"\Invantive.Producer.QueryEngine.exe"))
        # What is watched is what Data Hub writes.
        assert f"/logfile:{params['log_file']}" in command


def test_both_languages_do_the_same() -> None:
    """The same files with the same commands and settings, in other words.

    Fails when a change was made in one language only.
    """
    english, dutch = ({one.name for one in (EXAMPLES / each).iterdir()} for each in LANGUAGES)
    assert english == dutch
    assert commands("en") == commands("nl")
    for name in ("datahub-nightly.service", "datahub-nightly.timer"):
        one, other = unit("en", name), unit("nl", name)
        for each in (one, other):
            each.remove_option("Unit", "Description")
        assert one == other
    first, second = (_code(EXAMPLES / each / "datahub.logrotate") for each in LANGUAGES)
    assert first == second


def _code(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def test_command_lines_in_the_documents_parse() -> None:
    """Those of `with_lease` as the options that it hands on.

    Fails when a page shows an option that is not there.
    """
    lines = in_documents()
    assert len(lines) >= 4, lines
    for line in lines:
        words = shlex.split(line.replace("$TOKEN", TOKEN).replace("$token", TOKEN), comments=True)
        if words[0] == "with_lease":
            words = ["holdoff", "run", "--token", *words[1:]]
        assert parsed(words[1:])["token"] == TOKEN


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_crontab_is_one(language: str) -> None:
    """Five fields in their ranges, and a user; variables that the jobs need.

    Fails when a field is out of range, or a name is missing.
    """
    variables, jobs = cron_jobs(language)
    assert variables.keys() == {"SHELL", "PATH", "MAILTO", "HOLDOFF_ENDPOINT"}
    assert variables["HOLDOFF_ENDPOINT"] == ENDPOINT
    for fields, user, _ in jobs:
        assert user == "datahub"
        for field, (least, most) in zip(fields, CRON_RANGES, strict=True):
            assert re.fullmatch(r"(\*|\d+(-\d+)?)(/\d+)?", field)
            assert all(least <= int(number) <= most for number in re.findall(r"\d+", field))


class Host:
    """A folder that stands in for a server's /usr/local/bin and /var/log/datahub."""

    def __init__(self, folder: Path, service: Service) -> None:
        self.service = service
        self._folder = folder
        programs = folder / "bin"
        programs.mkdir()
        (folder / "log").mkdir()
        self._data_hub = programs / "datahub"
        self._data_hub.write_text(FAKE_DATA_HUB)
        self._data_hub.chmod(0o755)
        (programs / "holdoff").symlink_to(BIN / "holdoff")
        with service.asked() as client, contextlib.suppress(holdoff.errors.TokenExists):
            client.create_token(TOKEN, refresh_interval_seconds=0.1)

    def here(self, text: str) -> str:
        """Put this host's folders in."""
        text = text.replace("/usr/local/bin", str(self._folder / "bin"))
        return text.replace("/var/log/datahub", str(self._folder / "log"))

    def run(self, command: list[str], code: int, **variables: str) -> tuple[int, str]:
        """Run a command whose Data Hub ends with a code: its own exit code, and what it prints."""
        self._data_hub.with_name("exit-code").write_text(str(code))
        state = {"XDG_STATE_HOME": str(self._folder / "state")}
        done = subprocess.run(
            [self.here(word) for word in command],
            env=state | variables | {"HOLDOFF_ENDPOINT": self.service.address},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=50,
        )
        return done.returncode, done.stdout

    def output_of(self, job: str) -> str:
        """Return what a job of cron wrote to its file."""
        return (self._folder / "log" / f"{job}.out").read_text()


@pytest.fixture
def host(tmp_path: Path, service: Service) -> Host:
    """Give a host whose coordinator has the token of the examples."""
    return Host(tmp_path, service)


@pytest.mark.parametrize("language", ["en", *at_length("nl")])
def test_cron_mails_what_went_wrong_and_nothing_else(host: Host, language: str) -> None:
    """A job that ends with 0 prints nothing; one that fails, a line with its exit code.

    Fails when one of the outputs is not redirected, or `$?` is read too late.
    """
    variables, ((_, _, nightly), (_, _, stock)) = cron_jobs(language)
    shell = [variables["SHELL"], "-c"]
    path = host.here(variables["PATH"])
    assert host.run([*shell, nightly], 0, PATH=path) == (0, "")
    assert "word: /file:/srv/datahub/nightly.sql" in host.output_of("nightly")
    code = "exit code 3:" if language == "en" else "afsluitcode 3:"
    for name, line in (("nightly", nightly), ("stock", stock)):
        _, mail = host.run([*shell, line], 3, PATH=path)
        assert code in mail
        assert mail.startswith(name)
        assert mail.count("\n") == 1
    # No lease in time, which the fake Data Hub stands in for.
    assert host.run([*shell, stock], 75, PATH=path)[1] == ""
    assert "75:" in host.run([*shell, nightly], 75, PATH=path)[1]


def test_the_unit_runs_data_hub(host: Host) -> None:
    """With its exit code, and with both halves of what systemd makes of one there.

    Fails when a code that passes is not retried, or one of Data Hub's own is.
    """
    service = unit("en", "datahub-nightly.service")["Service"]
    assert service["Environment"] == f"HOLDOFF_ENDPOINT={ENDPOINT}"
    command = shlex.split(service["ExecStart"])
    code, output = host.run(command, 2)
    assert (code, output.splitlines()[-1]) == (2, "word: /interactive:False")
    assert service["RestartForceExitStatus"].split() == ["69", "75"]
    assert service["SuccessExitStatus"].split() == ["1", "143"]
    # What `holdoff run` needs to pass on a stop, and to fall back where it may not isolate.
    assert service["KillMode"] == "mixed"
    assert service["SystemCallErrorNumber"] == "EPERM"
    assert set(service["RestrictNamespaces"].split()) == {"pid", "mnt"}
    assert "MemoryDenyWriteExecute" not in service


@pytest.mark.parametrize("language", LANGUAGES)
def test_systemd_takes_the_units(language: str, host: Host, tmp_path: Path) -> None:
    """Without a word; on a machine without systemd at least the timer's words are looked at.

    Fails with `Type=oneshot`, which may not be restarted by exit code, or a misspelt setting.
    """
    timer = unit(language, "datahub-nightly.timer")
    assert timer["Timer"]["OnCalendar"] == "*-*-* 02:15:00"
    assert timer["Install"]["WantedBy"] == "timers.target"
    if not shutil.which("systemd-analyze"):
        return
    copies = []
    for name in ("datahub-nightly.service", "datahub-nightly.timer"):
        text = (EXAMPLES / language / name).read_text(encoding="utf-8")
        copies.append(tmp_path / name)
        copies[-1].write_text(host.here(text), encoding="utf-8")
    verified = subprocess.run(
        ["systemd-analyze", "verify", *copies], check=False, capture_output=True, text=True
    )
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_task_says_first_that_it_is_untried(language: str) -> None:
    """Before anything that a Windows administrator would copy.

    Fails when the warning is taken out, or moved below the command.
    """
    text = (EXAMPLES / language / "datahub-nightly.xml").read_text()
    warning = {"en": "UNTRIED", "nl": "NIET BEPROEFD"}[language]
    assert 0 < text.index(warning) < text.index("schtasks") < text.index("<Task")
    command, arguments = task(language)
    assert command.endswith("holdoff.exe")
    assert arguments.startswith(f"--endpoint {ENDPOINT} run ")


def test_a_wrong_line_is_found() -> None:
    """What the tests above rest on.

    Fails when `parsed` does not parse.
    """
    with pytest.raises(click.UsageError):
        parsed(["run", "--token", TOKEN, "--nonsense", "--", "true"])
    with pytest.raises(click.UsageError):
        parsed(["run", "--token", TOKEN, "--wait", "soon", "--", "true"])
