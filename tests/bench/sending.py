"""What it costs that a request to a token URL is sent from a process of its own.

Beside it the same request by `http.client` in this process. Both do TLS with a server in a thread,
and trust one authority. Prints numbers with the machine's facts; asserts nothing. Run it with
`make bench`.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import platform
import resource
import ssl
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import trustme

from holdoff_coordinator.custody.outcomes import Answered, boottime_us
from holdoff_coordinator.custody.sending import Connected, Reach, Sending
from holdoff_coordinator.custody.spool import Spooling
from tests.token_urls import PATIENT, SECOND, a_request, token_url

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS = 30
BODY = b'{"access_token":"%s","refresh_token":"%s"}' % (b"a" * 900, b"r" * 100)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def serve(authority: trustme.CA, urls: list[str], ready: threading.Event) -> None:
    """Serve answers for ever."""

    async def main() -> None:
        async with token_url(ANSWER, authority, "127.0.0.1") as served:
            urls.append(served.url)
            ready.set()
            await asyncio.Event().wait()

    asyncio.run(main())


def direct(url: str, ca_file: str) -> float:
    """Send the request from this process."""
    start = time.perf_counter()
    context = ssl.create_default_context(cafile=ca_file)
    connection = http.client.HTTPSConnection(url.split("/")[2], context=context)
    body = "grant_type=refresh_token&refresh_token=old&client_id=client-1&client_secret=secret"
    connection.request("POST", "/token", body)
    assert connection.getresponse().read() == BODY
    connection.close()
    return time.perf_counter() - start


async def sent(url: str, ca_file: str, folder: str | None) -> tuple[float, float]:
    """Send it from a process of its own; return the seconds of each step."""
    reach = Reach(networks=("127.0.0.0/8",), ca_files=(ca_file,), system_roots=False)
    spooling = None
    if folder is not None:
        path = f"{folder}/{uuid.uuid4()}"
        spooling = Spooling(path, bytearray(os.urandom(32)), b"wrapped")
    start = time.perf_counter()
    async with Sending(a_request(url), reach=reach, limits=PATIENT, spooling=spooling) as sending:
        assert isinstance(await sending.connect(), Connected)
        connected = time.perf_counter()
        outcome = await sending.send(boottime_us() + 60 * SECOND)
        answered = time.perf_counter()
        assert isinstance(outcome, Answered)
    assert sending._sender is not None
    sending._sender.wait()
    return connected - start, answered - connected


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")


def tell(what: str, seconds: Sequence[float]) -> None:
    """Print the median and the extremes."""
    milliseconds = sorted(1000 * one for one in seconds)
    middle = statistics.median(milliseconds)
    say(f"{what:46} {middle:7.1f} ms  ({milliseconds[0]:.1f} to {milliseconds[-1]:.1f})")


def processor() -> float:
    """Return the processor time of the processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure."""
    say(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    authority, urls, ready = trustme.CA(), list[str](), threading.Event()
    threading.Thread(target=serve, args=(authority, urls, ready), daemon=True).start()
    ready.wait()
    with tempfile.TemporaryDirectory() as folder:
        ca_file = str(Path(folder) / "ca.pem")
        authority.cert_pem.write_to_path(ca_file)
        tell("http.client in this process", [direct(urls[0], ca_file) for _ in range(RUNS)])
        for how, spool in ("without a spool", None), ("with a spool", folder):
            before = processor()
            steps = [asyncio.run(sent(urls[0], ca_file, spool)) for _ in range(RUNS)]
            names = ("from start to connection", "from the right to the answer")
            for name, seconds in zip(names, zip(*steps, strict=True), strict=True):
                tell(f"{how}: {name}", seconds)
            tell(f"{how}: all", [sum(one) for one in steps])
            used = (processor() - before) / RUNS
            say(f"{how}: {used * 1000:.0f} ms of processor time for each")


if __name__ == "__main__":
    main()
