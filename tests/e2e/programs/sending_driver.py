"""A coordinator, as far as sending goes: refreshes once, and is killed at a step, or stays.

The standard input has client secret and refresh token, each of 8192 bytes; the arguments are URL,
path in the spool, and step.
"""

import asyncio
import json
import os
import signal
import sys

from holdoff_coordinator.custody.outcomes import Answered, boottime_us
from holdoff_coordinator.custody.sending import Connected, Limits, Reach, Request, Sending, wipe
from holdoff_coordinator.custody.spool import Spooling

url, path, last_step = sys.argv[1:]
secret, token = bytearray(8192), bytearray(8192)
assert os.readv(0, [secret, token]) == 2 * 8192


def step(name: str) -> None:
    """End here, if this is the last step."""
    if name == last_step:
        os.kill(os.getpid(), signal.SIGKILL)


def tell(word: object) -> None:
    """Write a line."""
    os.write(1, f"{word}\n".encode())


async def main() -> None:
    """Refresh once."""
    minute = 60_000_000
    async with Sending(
        Request(url, "public-client-id", secret, {"refresh_token": token}),
        reach=Reach(plain_http=True),
        limits=Limits(connect_us=minute, right_us=minute, answer_us=minute),
        spooling=Spooling(path, bytearray(range(32)), b"wrapped"),
    ) as sending:
        connecting = asyncio.create_task(sending.connect())
        await asyncio.sleep(0)
        tell(sending.pid)
        step("started")
        assert isinstance(await connecting, Connected)
        step("connected")
        deadline_us = boottime_us() + minute
        if last_step == "right":
            await sending._write(json.dumps({"until_us": deadline_us}).encode())
            step("right")
        task = asyncio.create_task(sending.send(deadline_us))
        while sending.sent_us is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        step("sent")
        outcome = await task
        step("reported")
        assert isinstance(outcome, Answered)
        assert isinstance(outcome.received.body, bytearray)
        wipe(outcome.received.body)
    tell("done")
    signal.pause()


asyncio.run(main())
