# SPDX-License-Identifier: Apache-2.0
"""Files are complete or absent, and lines survive a kill."""

import doctest
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip3 import files
from blip3.files import (
    JsonLines,
    read_json_lines,
    read_lines,
    remove_unfinished,
    write_json,
    write_json_lines,
    write_text,
    writing,
)

KILLED = """
import os, signal, sys
from blip3.files import writing
with writing(sys.argv[1]) as unfinished:
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
HOLDS_THE_FILE = """
import sys
from blip3.files import JsonLines
with JsonLines(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def interrupted() -> Iterator[dict]:
        yield {"id": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, interrupted())
    assert path.read_text() == "before"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_earlier_file_and_what_can_be_removed(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    (left,) = [name for name in names_in(tmp_path) if name != "a.txt"]
    assert left.startswith(".a.txt.")
    assert left.endswith(".unfinished")
    (tmp_path / "answers.jsonl.unfinished").write_text("kept: the user's next run continues it")
    remove_unfinished(tmp_path)
    assert names_in(tmp_path) == ["a.txt", "answers.jsonl.unfinished"]


def test_writers_of_one_path_never_share_a_file(tmp_path):
    """Each writes its own whole file; the last one to end stays."""
    path, texts = tmp_path / "a.txt", [character * 200_000 for character in "abcdefgh"]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    with writing(path) as first, writing(path) as second:
        assert first != second
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert path.read_text() in texts
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert names_in(tmp_path) == ["a.txt"]


def test_json_is_written_as_utf8_unless_it_cannot_be(tmp_path):
    write_json(tmp_path / "a.json", {"word": "Là"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "word": "Là"\n}\n'.encode()
    values = [{"id": "\udce9.jpg"}, {"id": "a\u2028b\x85c\r\n"}, {"id": "Là"}]
    assert write_json_lines(tmp_path / "a.jsonl", values) == 3
    assert list(read_json_lines(tmp_path / "a.jsonl", ("id",), "a record", "remove it")) == values
    assert "Là".encode() in (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.parametrize("half", [b"", b'{"id": "ha', b'{"id": "' + b"x" * 200_000])
def test_a_half_line_is_not_read_and_cut_off_before_the_next(tmp_path, half):
    path = tmp_path / "below" / "a.jsonl"
    with JsonLines(path, ("id",)) as lines:
        assert list(lines) == []
        lines.append(['{"id": 1}', '{"id": 2}'])
        assert [line["id"] for line in lines] == [1, 2]
    with path.open("ab") as file:
        file.write(half)
    with JsonLines(path, ("id",)) as lines:
        assert [line["id"] for line in lines] == [1, 2]
        assert path.read_bytes().endswith(half)  # reading changes nothing
        lines.append(['{"id": 3}'])
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_a_file_that_is_one_half_line_begins_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id')
    with JsonLines(tmp_path / "a.jsonl") as lines:
        lines.append(['{"id": 3}'])
        assert lines.num_bytes == 10
        lines.remove()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("damage", ['{"answer": 2}', "nonsense", "[1]", "3", ""])
def test_damaged_lines_are_named(tmp_path, damage):
    (tmp_path / "a.jsonl").write_text(f'{{"id": 1}}\n{damage}\n', encoding="utf-8")
    message = r"^Line 2 of .* an answer as JSON is expected.* probably .*: remove the line\.$"
    lines = JsonLines(tmp_path / "a.jsonl", ("id",), "an answer", "remove the line")
    with lines, pytest.raises(ValueError, match=message):
        list(lines)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    command = [sys.executable, "-c", HOLDS_THE_FILE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match=r"another process, but .* probably .*: wait"):
            JsonLines(path)
        other.kill()
    with JsonLines(path) as lines:  # the system let go of it
        lines.append([json.dumps({"id": 1})])


def test_doctests():
    result = doctest.testmod(files)
    assert result.attempted
    assert not result.failed


HOLDS_AN_OUTPUT = """
import sys
from blip3 import files
with getattr(files, sys.argv[2])(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["only_writer", "only_writer_in"])
def test_a_second_writer_of_an_output_is_refused(tmp_path, name):
    output, hold = tmp_path / "deep" / "out", getattr(files, name)
    command = [sys.executable, "-c", HOLDS_AN_OUTPUT, str(output), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="is being written by another process"), hold(output):
            pytest.fail("two writers")
        other.kill()  # whatever it leaves behind locks nothing
    with hold(output):
        pass
    assert not any(path.is_file() for path in output.parent.rglob("*"))


def test_many_writers_take_turns(tmp_path):
    """Each waits until the file of the lock, which its owners remove, is free: never are two of them inside."""
    inside, seen = 0, []

    def write(number: int) -> None:
        nonlocal inside
        done = 0
        while done < 50:
            try:
                with files.only_writer(tmp_path / "out"):
                    inside += 1
                    seen.append(inside)
                    inside -= 1
                    done += 1
            except ValueError:
                continue

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert seen == [1] * 200
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(tmp_path, end):
    lines = ["a\u2028b\u2029c", "", "d\x85e\x0bf\x0cg\x1ch", "i\rj"]
    (tmp_path / "lines.txt").write_bytes(("\n".join(lines) + end).encode())
    assert read_lines(tmp_path / "lines.txt") == lines
    (tmp_path / "lines.txt").write_bytes("\r\n".join(lines).encode())
    assert read_lines(tmp_path / "lines.txt") == lines
    (tmp_path / "lines.txt").write_bytes(b"")
    assert read_lines(tmp_path / "lines.txt") == []
