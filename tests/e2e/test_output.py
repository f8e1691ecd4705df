"""What a command writes is passed on unchanged, and seen; with real processes and terminals.

`programs/output_driver.py` plays the wrapper. It reports what it saw as hashes, and its warnings.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdoff import _output
from holdoff._output import LogTail
from holdoff._platform import boottime_ns
from tests.e2e.processes import Terminal, library_program, program, python
from tests.harness import LONG, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux promises")

MIB = 1 << 20


class Driver:
    """The wrapper with its command, as a command line; and what it reports."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "report"
        self.note = folder / "note"

    def command(self, argv: list[str], **options: object) -> list[str]:
        """Return the driver's command line."""
        settings = {"report": str(self._path), "argv": argv} | options
        return library_program("output_driver", json.dumps(settings))

    def reports(self, key: str) -> list[Any]:
        """Return what was reported under a key so far."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [report[key] for line in lines if key in (report := json.loads(line))]

    def reported(self, key: str) -> Any:
        """Return the first value reported under this key; waits for it."""
        return wait_until(lambda: self.reports(key))[0]

    def stop(self) -> None:
        """Leave nothing behind, whatever the test found."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.fsencode(self._path) in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """Give a driver that was not started."""
    driver = Driver(tmp_path)
    yield driver
    driver.stop()


# Bytes --------------------------------------------------------------------------------------


def test_binary_data_on_both_streams(driver: Driver, tmp_path: Path) -> None:
    """Twenty MB of binary data on stdout and stderr at once arrive, and are seen, unchanged.

    Fails when a chunk is decoded, when a short write loses its rest, or the streams are mixed up.
    """
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        command = driver.command(program("binary", 200, driver.note))
        subprocess.run(command, stdout=stdout, stderr=stderr, check=True)
    hashes = driver.note.read_text().split()
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in (out, err)] == hashes
    assert list(driver.reported("seen").values()) == hashes
    assert out.stat().st_size > 10 * MIB


def test_two_hundred_megabytes(driver: Driver) -> None:
    """All of them arrive through a pipe, in order; in the short run a tenth of them."""
    command = (
        "import hashlib, os, sys\n"
        "hash = hashlib.sha256()\n"
        f"for number in range({200 if LONG else 20}):\n"
        "    data = b'%07d\\n' % number * 131072\n"
        "    hash.update(data)\n"
        "    sys.stdout.buffer.write(data)\n"
        "open(sys.argv[1], 'w').write(hash.hexdigest())\n"
    )
    arrived = hashlib.sha256()
    with subprocess.Popen(
        driver.command(python(command, driver.note)), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while data := process.stdout.read(MIB):
            arrived.update(data)
    assert arrived.hexdigest() == driver.note.read_text() == driver.reported("seen")["stdout"]


def test_partial_lines_come_at_once(driver: Driver) -> None:
    """A prompt without an end of line arrives while the command waits for its answer.

    Fails when the passage waits for a line or for more.
    """
    command = ["sh", "-c", "printf 'name? '; read name; printf 'hello '; printf $name >&2"]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(driver.command(command), bufsize=0, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.read(6) == b"name? "
        assert process.communicate(b"x\n", timeout=30) == (b"hello ", b"x")


def test_order_of_streams_that_are_one(driver: Driver) -> None:
    """With `2>&1` stdout and stderr keep the order in which they were written.

    Fails when each of them has a pipe of its own.
    """
    command = python("import os\nfor n in range(2000): os.write(1 + n % 2, b'%d\\n' % n)")
    process = subprocess.run(
        driver.command(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    assert [int(line) for line in process.stdout.split()] == list(range(2000))


@pytest.mark.parametrize("streams", list(itertools.product([False, True], repeat=3)))
def test_the_command_has_terminals_where_we_have(
    driver: Driver, streams: tuple[bool, bool, bool]
) -> None:
    """`isatty` of the three descriptors is ours.

    Fails when the command always, or never, gets a terminal.
    """
    command = python(
        "import json, os, sys\n"
        "with open(sys.argv[1], 'w') as file: json.dump([*map(os.isatty, (0, 1, 2))], file)",
        driver.note,
    )
    controller, terminal = pty.openpty()
    with Path(os.devnull).open("r+") as null:
        stdin, stdout, stderr = (terminal if wanted else null.fileno() for wanted in streams)
        subprocess.run(
            driver.command(command), stdin=stdin, stdout=stdout, stderr=stderr, check=True
        )
    os.close(terminal)
    os.close(controller)
    assert json.loads(driver.note.read_text()) == list(streams)


def test_a_terminal_gets_the_bytes_that_it_would(driver: Driver) -> None:
    """The real terminal shows the same as without us: line ends are translated once.

    Fails when the command's terminal translates too, or heeds control characters.
    """
    command = python(
        "import os, sys\nos.write(1, bytes(range(256)) + b'\\n\\n'); os.write(2, b'!')"
    )
    shown = []
    for argv in (command, driver.command(command)):
        controller, terminal = pty.openpty()
        process = subprocess.Popen(argv, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown.append(read_all(controller))
        assert process.wait() == 0
    assert shown[0] == shown[1]
    assert len(shown[0]) == 256 + 1 + 2 * 2 + 1


def read_all(fd: int) -> bytes:
    """Read until there is nobody left to write, and close."""
    data = b""
    try:
        while more := os.read(fd, MIB):
            data += more
    except OSError:  # how a terminal ends
        pass
    os.close(fd)
    return data


# Terminals ----------------------------------------------------------------------------------


@pytest.fixture
def on_terminal(driver: Driver) -> Iterator[Callable[[str], Terminal]]:
    """Give a function that runs a Python program under the driver on a terminal of its own."""
    terminals = []

    def start(source: str) -> Terminal:
        terminals.append(Terminal(driver.command(python(source, driver.note))))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_window_size(on_terminal: Callable[[str], Terminal]) -> None:
    """The command knows the size of our window, and is told when it changes.

    Fails when the size is not copied, or the command gets no signal after it was.
    """
    terminal = on_terminal(
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "while True:\n"
        "    os.write(1, b'%d %d\\n' % os.get_terminal_size(1))\n"
        "    signal.sigwait([signal.SIGWINCH])\n"
    )
    terminal.expect("0 0")
    terminal.resize(50, 123)
    terminal.expect("123 50")
    terminal.resize(24, 80)
    terminal.expect("80 24")


def test_keyboard(on_terminal: Callable[[str], Terminal]) -> None:
    """The command reads the terminal, /dev/tty included, and Ctrl-C is its own."""
    terminal = on_terminal(
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print('got', input('first? '), open('/dev/tty').readline(), flush=True)\n"
        "signal.sigwait([signal.SIGINT])\n"
        "os.write(1, b'interrupted')\n"
    )
    terminal.expect("first? ")
    terminal.type("one\ntwo\n")
    terminal.expect("got one two")
    terminal.type("\x03")
    terminal.expect("interrupted")


@pytest.fixture
def shell() -> Iterator[Terminal]:
    """Give an interactive shell with job control."""
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"])
    terminal.type("PS1='$ '; stty -echo; echo re''ady\n")
    terminal.expect("ready")
    yield terminal
    terminal.close()


def line(driver: Driver, argv: list[str]) -> str:
    """Return a short command line that runs a command under the driver."""
    script = driver.note.with_name("run")
    script.write_text(f"#!/bin/sh\nexec {shlex.join(driver.command(argv))}\n")
    script.chmod(0o755)
    return str(script)


def test_job_control(driver: Driver, shell: Terminal) -> None:
    """Ctrl-Z, `fg` and the way back to the shell work as without a passage."""
    shell.type(line(driver, program("reader")) + "\n")
    shell.expect("front")
    for word in ("one", "two"):
        shell.type("\x1a")
        shell.expect("Stopped")
        shell.type(f"fg\n{word}\n")
        shell.expect(f"got {word}")
    shell.type("\n")
    shell.type("echo still $((40+2))\n")
    shell.expect("still 42")


def test_output_of_a_lent_terminal(driver: Driver, shell: Terminal) -> None:
    """Under `stty tostop` the wrapper, which is in the background, is not stopped by our output.

    Fails when the threads let SIGTTOU through.
    """
    shell.type(f"stty tostop; {line(driver, program('reader'))}; stty -tostop\n")
    shell.expect("front")
    shell.type("word\n")
    shell.expect("got word")


def test_a_command_with_redirected_output_has_the_terminal(driver: Driver, shell: Terminal) -> None:
    """With `> file` the command is in front at once, though what it writes to is a pipe.

    Fails when the pipe counts as a pipeline.
    """
    shell.type(f"{line(driver, program('reader'))} > {driver.note}; echo over\n")
    wait_until(lambda: driver.note.exists() and driver.note.read_text())
    assert driver.note.read_text() == "front\n"
    shell.type("\n")
    shell.expect("over")


# Readers that block, leave or are full ------------------------------------------------------


def test_a_reader_that_leaves(driver: Driver) -> None:
    """The command gets SIGPIPE, as it would from `| head -1` itself.

    Fails when our end of its pipe stays open.
    """
    with subprocess.Popen(driver.command(["yes"]), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGPIPE


def test_a_reader_that_left_long_ago(driver: Driver) -> None:
    """A command that writes seldom gets EPIPE at its first write after the reader left.

    Fails when only a write tells that the reader is gone.
    """
    command = python(
        "import os, select\n"
        "os.write(1, b'x')\n"
        "reader_left = select.poll()\n"
        "reader_left.register(1, 0)\n"
        "reader_left.poll()\n"
        "try: os.write(1, b'x')\n"
        "except BrokenPipeError: os._exit(3)\n"
    )
    with subprocess.Popen(driver.command(command), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.wait(30) == 3


def test_a_full_disk(driver: Driver) -> None:
    """The command's output ends, and a warning says why; the other stream goes on."""
    command = ["sh", "-c", "trap 'echo told >&2; exit 5' PIPE; while :; do echo x; done"]
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            driver.command(command), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (process.returncode, b"told" in process.stderr) == (5, True)
    assert driver.reports("warning") == ["cannot write stdout, so it ends: No space left on device"]


def test_a_blocked_reader_delays_nothing_else(driver: Driver) -> None:
    """Renewals go on, so the command outlasts its first fence by far; then all arrives.

    Fails when the passage runs in the wrapper's main thread.
    """
    command = python("import os\nos.write(2, b'begun')\nos.write(1, b'x' * 3_000_000)")
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(driver.command(command, fence=2), **pipes) as process:
        assert process.stderr is not None
        assert process.stderr.read(5) == b"begun"
        first_fence = boottime_ns() + 2 * 10**9
        wait_until(lambda: boottime_ns() > first_fence)
        assert not driver.reports("ended")
        assert len(process.communicate(timeout=30)[0]) == 3_000_000
    assert driver.reports("event") == ["started"]


def test_a_blocked_reader_does_not_hide_the_end(driver: Driver) -> None:
    """The end of the command is known while what it wrote still waits; the wrapper waits too.

    Fails when the wrapper does not wait for its reader, or only the first call of `finish` does:
    what was written would be lost.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filler = os.write(writing, bytes(MIB))
    os.set_blocking(writing, True)
    process = subprocess.Popen(driver.command(["echo", "late"], twice=True), stdout=writing)
    os.close(writing)
    assert driver.reported("ended") == 0
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert read_all(reading)[filler:] == b"late\n"
    assert process.wait(30) == 0


def test_a_pipe_that_does_not_block(driver: Driver) -> None:
    """A pipe that somebody else has set to non-blocking loses nothing.

    Fails when EAGAIN is not waited out.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen(
        driver.command(["head", "-c", "3000000", "/dev/zero"]), stdout=writing
    )
    os.close(writing)
    assert len(read_all(reading)) == 3_000_000
    assert process.wait(30) == 0


# The end, and who looks ---------------------------------------------------------------------


@pytest.mark.parametrize("leak", ["silent", "chatter"])
def test_somebody_holds_the_output_open(driver: Driver, leak: str) -> None:
    """All that the command wrote arrives, and what outlives it is waited for with a limit.

    Fails when the passage reads to the end of the output alone.
    """
    command = driver.command(["echo", "mine"], leak=leak, patience=0.5)
    with driver.note.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, start_new_session=True)
    assert process.wait(30) == 0
    os.killpg(process.pid, signal.SIGKILL)  # the leak
    assert b"mine\n" in driver.note.read_bytes()


def test_who_looks_and_fails(driver: Driver) -> None:
    """An exception in `on_data` is told once, without its text, and stops no output."""
    process = subprocess.run(
        driver.command(program("binary", 10, driver.note), fail=True),
        capture_output=True,
        check=True,
    )
    hashes = [hashlib.sha256(data).hexdigest() for data in (process.stdout, process.stderr)]
    assert driver.note.read_text().split() == hashes
    (warning,) = driver.reports("warning")
    assert "ValueError" in warning
    assert "4711" not in warning


def test_the_end_comes_in_time(driver: Driver) -> None:
    """The passage is over with the command: nobody but the command holds its output open.

    Fails when the wrapper keeps its end of it.
    """
    subprocess.run(
        driver.command(["true"], patience=90), stderr=subprocess.PIPE, check=True, timeout=40
    )
    assert not driver.reports("warning")


# Log files ----------------------------------------------------------------------------------


class Log:
    """A log file, and what a `LogTail` sees of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = b""
        self.warnings: list[str] = []

    def follow(self) -> LogTail:
        """Begin to follow."""
        self.tail = LogTail(self.path, self._on_data, self.warnings.append)
        self.tail.start()
        return self.tail

    def _on_data(self, source: str, data: bytes) -> None:
        assert source == "log"
        self.seen += data

    def append(self, data: bytes) -> None:
        """Write more."""
        with self.path.open("ab") as file:
            file.write(data)

    def expect(self, data: bytes) -> None:
        """Wait until exactly this has been seen."""
        wait_until(lambda: len(self.seen) >= len(data))
        assert self.seen == data


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Give a log file that does not exist yet, and look that no thread is left."""
    monkeypatch.setattr(_output, "_TICK_SECONDS", 0.01)
    log = Log(tmp_path / "job.log")
    yield log
    if hasattr(log, "tail"):
        log.tail.finish()


def test_a_log_is_followed_from_its_end(log: Log) -> None:
    """What was there before is not this run's; the rest comes as it is written, and at the end.

    Fails when the file is read from its beginning.
    """
    log.append(b"old\n")
    log.follow()
    log.append(b"one\nha")
    log.expect(b"one\nha")
    log.append(b"lf\n\xff\x00")
    log.tail.finish()
    assert log.seen == b"one\nhalf\n\xff\x00"
    assert not log.warnings


def test_a_log_that_comes_later(log: Log) -> None:
    """A file that is not there yet is read from its beginning, without its byte order mark."""
    log.follow()
    log.append(b"\xef\xbb\xbffirst\n")
    log.expect(b"first\n")
    log.path.unlink()
    log.append(b"x")
    log.tail.finish()
    assert log.seen == b"first\nx"


def test_a_log_that_never_comes(log: Log) -> None:
    """A typing error in the name does not go unnoticed, unless the run never began."""
    LogTail(log.path, print, log.warnings.append).finish()
    assert not log.warnings
    log.follow().finish()
    (warning,) = log.warnings
    assert str(log.path) in warning
    assert "never there" in warning


def test_rotation(log: Log) -> None:
    """A log that is moved away and begun anew is read to its end, and then the new one.

    Fails when the new file is opened before the old one was read to its end.
    """
    log.follow()
    expected = b""
    for number in range(5):
        for part in (b"a", b"b"):
            data = b"%d%s\n" % (number, part)
            log.append(data)
            expected += data
            if part == b"a":
                log.expect(expected)
        log.path.rename(log.path.with_suffix(f".{number}"))
    log.tail.finish()
    assert log.seen == expected
    assert not log.warnings


def test_truncation(log: Log) -> None:
    """A log that is written anew counts from its beginning, also when it has outgrown the old one.

    Fails when only a smaller size counts as truncation.
    """
    log.append(b"an old log\n")
    log.follow()
    log.path.write_bytes(b"short\n")
    log.expect(b"short\n")
    log.path.write_bytes(b"something longer\n")
    log.expect(b"short\nsomething longer\n")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16(log: Log, encoding: str) -> None:
    """UTF-16 comes as UTF-8, whatever the moments at which it was read.

    Fails when each piece is decoded by itself.
    """
    log.append(("\ufeff" + "old\n").encode(encoding))
    log.follow()
    text = "partitie '\u20ac 😀 (535193)'\r\n"
    data = text.encode(encoding)
    decoder, expected = codecs.getincrementaldecoder(encoding)(), b""
    for index in range(0, len(data), 5):
        piece = data[index : index + 5]
        log.append(piece)
        expected += decoder.decode(piece).encode()
        log.expect(expected)
    log.expect(text.encode())
    log.path.write_bytes(b"plain\n")
    log.expect(text.encode() + b"plain\n")


def test_invalid_text(log: Log) -> None:
    """UTF-16 that is none is replaced, and other bytes come as they are."""
    log.follow()
    log.append(b"\xff\xfe" + "\ud83d".encode("utf-16-le", "surrogatepass") + b"a\x00")
    log.tail.finish()
    assert log.seen == "\ufffda".encode()


def test_what_cannot_be_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a FIFO, a device and a file that may not be read are refused at once, by name."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path(os.devnull), tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match=path.name):
            LogTail(path, print, print)
    file = tmp_path / "secret"
    file.touch(0)
    if os.geteuid() == 0:  # who may read everything, so that the system cannot refuse
        refusal = PermissionError(13, "Permission denied")
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(refusal))
    with pytest.raises(ValueError, match="Permission denied"):
        LogTail(file, print, print)


def test_a_log_that_becomes_something_else(log: Log) -> None:
    """One warning, and no wait, when there is a FIFO later; the old file is still followed."""
    log.append(b"old\n")
    log.follow()
    with log.path.open("ab") as file:
        log.path.unlink()
        os.mkfifo(log.path)
        wait_until(lambda: log.warnings)
        file.write(b"more\n")
    log.expect(b"more\n")
    log.tail.finish()
    assert len(log.warnings) == 1


def test_a_large_log(log: Log) -> None:
    """Ten MB at once come in chunks."""
    log.append(b"x")
    log.follow()
    data = os.urandom(10 * MIB)
    log.append(data)
    log.expect(data)
