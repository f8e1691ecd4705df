"""A command that writes all values of a byte, and much that is random, in pieces of all sizes.

It does so as often as its first argument says, to both of its streams, and then writes the hashes
of both to the file that the second one names.
"""

import hashlib
import os
import random
import sys

chance = random.Random(4)  # noqa: S311 - to be repeated
hashes = [hashlib.sha256(), hashlib.sha256()]
for _ in range(int(sys.argv[1])):
    for fd in (1, 2):
        data = bytes(range(256)) + chance.randbytes(chance.choice([0, 1, 4096, 65536, 300_000]))
        hashes[fd - 1].update(data)
        while data:
            data = data[os.write(fd, data) :]
with open(sys.argv[2], "w") as file:  # noqa: PTH123 - pathlib loads slowly
    file.write(" ".join(each.hexdigest() for each in hashes))
