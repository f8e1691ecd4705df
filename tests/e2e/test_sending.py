"""A request to a token URL: when its coordinator dies, and who can see its secrets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdoff_coordinator.custody import spool
from holdoff_coordinator.custody.outcomes import Answered, Outcome
from tests.e2e.processes import library_program
from tests.token_urls import TokenUrl, read_request, token_url, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SECRET_BYTES = 8192
"""So long that what is freed is not used again soon."""
ROTATED = secrets.token_hex(SECRET_BYTES // 2).encode()
WITHOUT_TRACING = """
import ctypes, os, sys
for capability in 21, 19:  # CAP_SYS_ADMIN, CAP_SYS_PTRACE
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # drops it from the bounding set
os.execv(sys.argv[1], sys.argv[1:])
"""
LOOK = """
import os, sys
try:
    print(len([os.readlink(entry.path) for entry in os.scandir(f"/proc/{sys.argv[1]}/fd")]))
except PermissionError:
    print("refused")
"""


class Scene:
    """A driver, its sender, and a token URL that answers when it is let."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret, self.token = (secrets.token_hex(SECRET_BYTES // 2).encode() for _ in range(2))
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer once the test lets it."""
        await read_request(reader)
        self.asked.set()
        await self.go.wait()
        body = b'{"refresh_token":"' + ROTATED + b'"}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    @contextlib.asynccontextmanager
    async def driving(self, step: str) -> AsyncIterator[TokenUrl]:
        """Run a driver to a step."""
        async with token_url(self.answer) as served:
            command = library_program("sending_driver", served.url, self.folder / "one", step)
            self.driver = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", WITHOUT_TRACING, *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert self.driver.stdin is not None
            self.driver.stdin.write(self.secret + self.token)
            self.sender = int(await self.line())
            try:
                yield served
            finally:
                with contextlib.suppress(ProcessLookupError):
                    self.driver.kill()
                await self.driver.wait()

    async def line(self) -> str:
        """Read a line of the driver."""
        assert self.driver.stdout is not None
        return (await self.driver.stdout.readline()).decode().strip()

    def ended(self) -> bool:
        """Tell whether the sender ended."""
        try:
            stat = Path(f"/proc/{self.sender}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"

    def answers(self) -> list[Outcome]:
        """Open what lies in the spool."""
        files = map(Path, spool.answers(str(self.folder)))
        return [spool.read(file.read_bytes(), lambda _: bytes(range(32))).outcome for file in files]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Return a scene with an empty spool."""
    return Scene(tmp_path)


@pytest.mark.parametrize("step", ["started", "connected"])
async def test_killed_before_the_right(scene: Scene, step: str) -> None:
    """Nothing is sent when the coordinator dies before it gave the right: the sender dies too."""
    async with scene.driving(step) as served:
        await scene.driver.wait()
        await until(scene.ended)
    assert served.received == b""
    assert scene.answers() == []


async def test_killed_after_the_right(scene: Scene) -> None:
    """Of a right that was just given comes nothing, or an answer in the spool."""
    async with scene.driving("right") as served:
        await scene.driver.wait()
        scene.go.set()
        await until(scene.ended)
    assert len(scene.answers()) == bool(served.received)


@pytest.mark.parametrize("step", ["sent", "reported"])
async def test_killed_after_the_request(scene: Scene, step: str) -> None:
    """The answer to a request that was sent is in the spool, sealed, though the coordinator died.

    Fails when the sender dies with its coordinator.
    """
    async with scene.driving(step):
        if step == "sent":
            await scene.driver.wait()
        scene.go.set()
        await scene.driver.wait()
        await until(scene.ended)
    (kept,) = scene.answers()
    assert isinstance(kept, Answered)
    assert ROTATED in kept.received.body
    assert ROTATED not in (scene.folder / "one").read_bytes()
    assert (scene.folder / "one").stat().st_mode & 0o777 == 0o600


async def test_the_sender_shows_nothing(scene: Scene) -> None:
    """Arguments and environment have no secret, and others of the user cannot look inside.

    Fails when the sender is dumpable.
    """
    async with scene.driving("stay"):
        await scene.asked.wait()
        arguments = shown(scene.sender, "cmdline")
        assert scene.token not in arguments
        assert scene.secret not in arguments
        assert await look_into(scene.sender) == "refused"
        assert await look_into(scene.driver.pid) != "refused"  # so that nothing else is why
        if os.geteuid() == 0:
            assert shown(scene.sender, "environ") == b""


def shown(pid: int, name: str) -> bytes:
    """Return what /proc shows of a process."""
    return Path(f"/proc/{pid}/{name}").read_bytes()


async def look_into(pid: int) -> str:
    """Look into a process without a privilege for it."""
    look = [sys.executable, "-I", "-S", "-c", LOOK, str(pid)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", WITHOUT_TRACING, *look),
        stdout=asyncio.subprocess.PIPE,
    )
    return (await process.communicate())[0].decode().strip()


async def test_the_coordinator_keeps_nothing(scene: Scene) -> None:
    """After the call, no secret is anywhere in the coordinator's memory.

    Fails when one is kept, or not zeroed; memory that was freed may be used again before the look.
    """
    async with scene.driving("stay"):
        scene.go.set()
        assert await scene.line() == "done"
        try:
            memory = memory_of(scene.driver.pid)
        except PermissionError:
            pytest.skip("may not read another process's memory")
    assert b"public-client-id" in memory
    for secret in (scene.secret, scene.token, ROTATED):
        parts = [secret[start : start + 32] for start in range(0, SECRET_BYTES, 512)]
        assert not [part for part in parts if part in memory]


def memory_of(pid: int) -> bytes:
    """Return all that a process can write to."""
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area = re.match("([0-9a-f]+)-([0-9a-f]+) rw", line)
            if area:
                start, end = (int(number, 16) for number in area.groups())
                memory.seek(start)
                with contextlib.suppress(OSError):  # of a device
                    parts.append(memory.read(end - start))
    return b"".join(parts)
