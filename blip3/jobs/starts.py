# SPDX-License-Identifier: Apache-2.0
"""Marks on disk of what a worker is about to open, so that an image that kills its worker is found and left out.

    first time   the mark says which slice was begun; the worker dies
    second time  that slice goes one image at a time, each with a mark of its own; the worker dies
    third time   the same image is tried once more; the worker dies
    fourth time  the image is an error of its row, and never opened again

A worker that is killed for other reasons leaves marks, too: two deaths at the same image alone are held against it. An
exception is no death: it takes the mark back, so a run that a fault ended is continued as if nothing had been begun.
A mark is a file of a few bytes for each unit in hand, removed when the unit is done. Workers on several machines need
a file system that they share.
"""

import collections
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

MOST_DEATHS = 2  # of workers at one image alone
FOLDER = ".starts"

_Result = TypeVar("_Result")


class Starts:
    """What was begun of one unit, by this process and by those before it that died.

    Args:
        folder: of the marks, made if need be.
        unit: names what is worked on.
    """

    def __init__(self, folder: Path, unit: str):
        self.path = folder / hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        self._deaths = collections.Counter(_last_begun(self.path))
        self._write(None)

    def deaths(self, name: str) -> int:
        """How many processes died while this was the last that they had begun."""
        return self._deaths[name]

    def begin(self, name: str) -> None:
        """Mark what is opened next; a crash of the process keeps the mark, a crash of the machine may lose it."""
        self._write(name)

    def end(self) -> None:
        """Take the mark back: what was begun is over, and whatever ends the process now is not its doing."""
        self._write(False)

    def report(self, num_rows: int) -> None:
        """Say how many rows of the unit are through, for `rows_in_hand`; nothing may be begun meanwhile."""
        self._write(num_rows)

    def remove(self) -> None:
        """The unit is done."""
        self.path.unlink(missing_ok=True)

    def _write(self, name: str | bool | int | None) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(name).encode() + b"\n")
            file.flush()


def _last_begun(path: Path) -> Iterator[str]:
    """Yield what each process had begun last and not ended; each wrote null first, and false where something ended."""
    last = None
    for name in [*_read(path), None]:
        if name is None and isinstance(last, str):
            yield last
        last = name


def _read(path: Path) -> Iterator[str | bool | int | None]:
    """Yield what was written to a mark."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # not there, or no longer
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # half written
            continue


def rows_in_hand(folder: Path) -> int:
    """Count the rows that are through of units that are not done, as workers `report` them.

    Args:
        folder: of the marks.
    """
    return sum(_last_report(path) for path in folder.glob("*"))


def _last_report(path: Path) -> int:
    last = 0
    for value in _read(path):
        if value is None:  # the process before died: the unit is done again
            last = 0
        elif type(value) is int:
            last = value
    return last


def survive(
    starts: Starts, place: str, count: int, work: Callable[[int, int], list[_Result]], refuse: Callable[[int], _Result]
) -> list[_Result]:
    """Work on a slice at once, or one image at a time where it killed a process before.

    An exception of `work` leaves no mark behind, and goes on to the caller.

    Args:
        starts: of the unit.
        place: names the slice in it.
        count: images in the slice.
        work: first, end -> a result for each image of that range.
        refuse: index -> the result of an image that killed its workers.

    Returns:
        a result for each image.
    """
    names = [f"{place}:{index}" for index in range(count)]
    if not any(map(starts.deaths, [place, *names])):
        return _marked(starts, place, lambda: work(0, count))
    results = []
    for index, name in enumerate(names):
        if starts.deaths(name) >= MOST_DEATHS:
            results.append(refuse(index))
            continue
        results += _marked(starts, name, functools.partial(work, index, index + 1))
    return results


def _marked(starts: Starts, name: str, work: Callable[[], list[_Result]]) -> list[_Result]:
    """Work with a mark that stays only if the process dies."""
    starts.begin(name)
    try:
        results = work()
    except Exception:
        starts.end()
        raise
    starts.end()
    return results


def killed_its_worker() -> str:
    """Say in one sentence why an image was left out."""
    return f"The image ended the process that opened it, {MOST_DEATHS} times."


def folder_of(output: Path) -> Path:
    """Give the folder of the marks of a job that writes to `output`."""
    return Path(os.path.abspath(output), FOLDER)


def remove_all(output: Path) -> None:
    """Remove what is left of marks when a job is done."""
    shutil.rmtree(folder_of(output), ignore_errors=True)
