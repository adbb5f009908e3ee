# SPDX-License-Identifier: Apache-2.0
"""How many requests are inside a server at once, and how many bytes they hold together; more are refused as busy."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Room:
    """Counts requests and their bytes, whichever thread they come in.

    Args:
        max_requests: inside at once.
        max_bytes: held by all of them.
    """

    def __init__(self, max_requests: int, max_bytes: int):
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self.num_requests = self.num_bytes = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def enter(self) -> Iterator["Guest"]:
        """Let one request in until the block ends, whatever it holds then.

        Raises:
            ValueError: if the room is full.
        """
        with self._lock:
            if self.num_requests >= self.max_requests:
                raise ValueError(busy(f"{self.num_requests} requests are being answered or wait"))
            self.num_requests += 1
        guest = Guest(self)
        try:
            yield guest
        finally:
            guest.hold(-guest.num_bytes)
            with self._lock:
                self.num_requests -= 1

    def take(self, num_bytes: int) -> None:
        """Count bytes of a request, fewer where negative.

        Raises:
            ValueError: if all requests together would hold too many.
        """
        with self._lock:
            if num_bytes > 0 and self.num_bytes + num_bytes > self.max_bytes:
                raise ValueError(busy(f"its requests hold {self.num_bytes} of {self.max_bytes} bytes"))
            self.num_bytes += num_bytes


class Guest:
    """One request inside a room.

    Args:
        room: it is in.
    """

    def __init__(self, room: Room):
        self.room, self.num_bytes = room, 0

    def hold(self, num_bytes: int) -> None:
        """Hold more bytes, fewer where negative.

        Raises:
            ValueError: if all requests together would hold too many.
        """
        self.room.take(num_bytes)
        self.num_bytes += num_bytes


def busy(why: str) -> str:
    """Say that a server takes no more for now."""
    return f"The server is busy: {why}. There are probably many clients at once: try again in a few seconds."


def bytes_of(body: Any) -> int:
    """Bytes that a parsed JSON body holds, texts and containers; of images that a server opened, their files."""
    total, left = 0, [body]
    while left:
        value = left.pop()
        total += sys.getsizeof(value)
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value
        elif getattr(getattr(value, "fp", None), "getbuffer", None) is not None:
            total += value.fp.getbuffer().nbytes
    return total
