# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a job: units that are done, and meanwhile the rows of those in hand.

A shard of ten thousand images takes a worker an hour. The bar, which counts shards, would stand still for as long. So
a thread looks every few seconds at how many rows the workers have reported (`starts.rows_in_hand`).
"""

import threading
from pathlib import Path
from typing import Any

from . import starts

SECONDS = 2.0  # between two looks


class Watch:
    """Keeps a bar up to date until the block ends.

    Args:
        bar: of tqdm.
        description: once something is done.
        marks: folder of the marks that workers write.
        seconds: between two looks at them.
    """

    def __init__(self, bar: Any, description: str, marks: Path, seconds: float = SECONDS):
        self.bar, self.description, self.marks, self.seconds = bar, description, marks, seconds
        self._num_errors = self._in_hand = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def show(self, num_done: int, num_errors: int) -> None:
        """Move the bar by units that are done, and give the errors in all so far."""
        with self._lock:
            self._num_errors = num_errors
            self._set()
            self.bar.update(num_done)

    def look(self) -> None:
        """Show the rows in hand, if they changed."""
        in_hand = starts.rows_in_hand(self.marks)
        with self._lock:
            if in_hand != self._in_hand:
                self._in_hand = in_hand
                self._set()
                self.bar.refresh()

    def _set(self) -> None:
        in_hand = {"rows_in_hand": self._in_hand} if self._in_hand else {}
        self.bar.set_description(self.description, refresh=False)
        self.bar.set_postfix({"errors": self._num_errors, **in_hand}, refresh=False)

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(self.seconds):
            self.look()
