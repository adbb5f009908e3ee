# SPDX-License-Identifier: Apache-2.0
"""A process that keeps a core busy while it is told to by bytes on its standard input; `busy.py` starts it."""

import os
import select
import sys

SPIN, WAIT = b"1", b"0"
READY = b"."


def spin_as_told(source: int) -> None:
    """Count while the last byte read from a file descriptor is `SPIN`; return where it ends."""
    is_spinning = False
    while True:
        readable, _, _ = select.select([source], [], [], 0 if is_spinning else None)
        word = os.read(source, 1) if readable else b""
        if readable and not word:
            return
        is_spinning = word == SPIN if word else is_spinning
        for _ in range(10_000 * is_spinning):
            pass


if __name__ == "__main__":
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    spin_as_told(sys.stdin.fileno())
