# SPDX-License-Identifier: Apache-2.0
"""Files that are complete or absent, and JSON lines that survive a kill.

    writing(path) --> a temporary file beside it, of this process alone --> flushed to disk --> renamed to path

    JsonLines     --> lines appended by one process at a time, each on disk before the next begins;
                      a line that a kill left half written is cut off when the file is continued

Whoever reads `path` sees the earlier file or the whole new one. A kill may leave the temporary file
(`.NAME.PROCESS-NUMBER.unfinished`), which nobody reads and `remove_unfinished` removes.

    only_writer(output)       one process at a time writes an output; a second one is refused
    only_writer_in(folder)    the same for a folder that is written in place
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` at the end; after an error nothing is left.

    Args:
        path: of a file in a folder that is there; replaced if it is there itself.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on disk; on Windows, which cannot, do nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes left in a folder and below; only where no other process is writing."""
    for path in Path(folder).rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all."""
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    r"""Write a value as JSON: characters as they are, or escapes where a text (a file's name) is no Unicode.

    >>> print(to_json("é"), to_json("\udcff"))
    "é" "\udcff"
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_json(path: str | Path, value: Any) -> None:
    """Write an indented JSON file, complete or not at all."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_json_lines(path: str | Path, values: Iterable[Any]) -> int:
    """Write a line for each value and return how many; the file appears complete or not at all."""
    count = 0
    with writing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(to_json(value) + "\n")
            count += 1
    return count


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a UTF-8 file; only a line feed ends a line, with or without a carriage return before it.

    `str.splitlines` would also cut at characters that a text or a file's name may hold, such as U+2028.
    """
    lines = Path(path).read_bytes().decode("utf-8").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_json_lines(path: str | Path, keys: tuple[str, ...], what: str, remedy: str) -> Iterator[dict[str, Any]]:
    """Read the complete lines of a file, one at a time; only a line feed ends a line.

    Args:
        path: of the file.
        keys: that every line has.
        what: a line is, for the error.
        remedy: what to do about a damaged line, for the error.

    Raises:
        ValueError: for a line that is no object with these keys.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
                reason = "" if isinstance(value, dict) and set(keys) <= value.keys() else "it has other content"
            except ValueError as error:
                reason = str(error)
            if reason:
                raise ValueError(
                    f"Line {number} of {path} is {line[:40]!r} but {what} as JSON is expected, an object with "
                    f"{' and '.join(keys)} ({reason}). It was probably edited or damaged: {remedy}."
                )
            yield value


class JsonLines:
    """JSON lines that a run appends to and a later run continues; one process at a time.

    Args:
        path: of the file, made if need be, its folder too.
        keys: that every line has.
        what: a line is, for errors.
        remedy: what to do about a damaged line, for errors.

    Raises:
        ValueError: if another process is writing the file.
    """

    def __init__(
        self,
        path: str | Path,
        keys: tuple[str, ...] = (),
        what: str = "an object",
        remedy: str = "remove the line, what it stands for is then done again",
    ):
        self.path, self.keys, self.what, self.remedy = Path(path), keys, what, remedy
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._is_cut = False
        try:
            lock(self._file, self.path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the lines that are complete.

        Raises:
            ValueError: for a damaged line.
        """
        return read_json_lines(self.path, self.keys, self.what, self.remedy)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, lines: Iterable[str]) -> None:
        """Write lines of JSON, and wait until they are on the disk."""
        if not self._is_cut:
            _cut_half_line(self._file)
            self._is_cut = True
        self._file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the next process have the file."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file, whose lines stand elsewhere now."""
        self.path.unlink(missing_ok=True)
        self.close()


def _cut_half_line(file: BinaryIO) -> None:
    """Shorten a file to its last line feed."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            file.truncate(start + found + 1)
            return
        end = start
    file.truncate(0)


@contextlib.contextmanager
def only_writer(output: str | Path) -> Iterator[None]:
    """Be the only process that writes an output, a file or a folder, for as long as the block takes.

    The lock is a hidden file beside the output (`.NAME.lock`), which is removed at the end. The system lets go of it
    however this process ends, so a file that a kill left behind locks nothing.

    Raises:
        ValueError: if another process is writing it.
    """
    output = Path(output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    file = _lock_file(path, output)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows, where no open file is removed
            path.unlink()  # while it is still ours
        file.close()


@contextlib.contextmanager
def only_writer_in(folder: str | Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if need be and not replaced meanwhile.

    A folder that was made and is empty at the end, because something was refused, is removed again.

    Raises:
        ValueError: if another process is writing into it.
    """
    folder = Path(folder).absolute()
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if os.name != "nt":  # where folders cannot be opened, nor locked
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(_let_go, descriptor)
            _held.add(descriptor)
            lock(descriptor, folder)
        if not was_there:
            stack.callback(_remove_if_empty, folder)
        yield


_held: set[int] = set()


def _let_go(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _let_go_in_child() -> None:
    """Leave a lock to the process that took it: its workers may live a few seconds longer when it is killed."""
    _let_go(*_held)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _lock_file(path: Path, output: Path) -> BinaryIO:
    """Open and lock a file that its earlier owner may remove at any time."""
    while True:
        file = path.open("a+b")
        try:
            lock(file, output)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # removed between the two calls: another one holds the place now, or nobody
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: BinaryIO | int, path: Path) -> None:
    """Keep other processes from writing an open file, or into an open folder, until it is closed.

    The system closes it however this process ends.

    On Windows, which has no such lock, the file is not locked.

    Raises:
        ValueError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path} is being written by another process, but one run at a time may write it. The same command is "
            "probably still running: wait for it, or name another output."
        ) from None
