"""What `holdoff run` runs in a chaos run: notes that it lives, with the standard library alone."""

import json
import os
import sys
import time


def main() -> None:
    """Note the lease that was handed in, and each tenth of a second that this process lived."""
    path, who, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(what: str, **facts: object) -> None:
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        line = {"at": at, "who": who, "what": what, "id": os.environ["HOLDOFF_LEASE"], **facts}
        os.write(file, (json.dumps(line) + "\n").encode())

    token = os.environ["HOLDOFF_TOKEN"]
    note("granted", token=token, fencing=int(os.environ["HOLDOFF_FENCING_TOKEN"]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        note("work")
        time.sleep(0.1)
    note("done")


if __name__ == "__main__":
    main()
