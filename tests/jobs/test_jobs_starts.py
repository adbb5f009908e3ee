# SPDX-License-Identifier: Apache-2.0
"""Marks of what was begun: an image that kills its worker is found in three deaths, and no other is left out."""

from pathlib import Path

import pytest

from blip3.jobs.starts import Starts, folder_of, killed_its_worker, remove_all, rows_in_hand, survive


class Killed(BaseException):
    """Stands for the end of a process."""


def attempt(folder: Path, deadly: set[int], opened: list[int], first: int = 0, count: int = 6) -> list:
    """Work on a slice as a worker does."""

    def work(begin: int, end: int) -> list[str]:
        found = []
        for index in range(begin, end):
            opened.append(index)
            if index in deadly:
                raise Killed
            found.append(f"row {index}")
        return found

    starts = Starts(folder, "shard")
    result = survive(starts, f"0:{first}", count, work, lambda index: f"refused {index}")
    starts.remove()
    return result


def run(folder: Path, deadly: set[int], most: int) -> tuple[list, int, list[int]]:
    """Start workers until one comes through; gives its result, how many died, and what was opened."""
    opened: list[int] = []
    for deaths in range(most + 1):
        try:
            return attempt(folder, deadly, opened), deaths, opened
        except Killed:
            continue
    raise AssertionError(f"{most + 1} workers died")


@pytest.mark.parametrize("deadly", [{0}, {3}, {5}])
def test_an_image_that_kills_costs_three_workers(tmp_path, deadly):
    result, deaths, opened = run(tmp_path, deadly, most=3)
    (guilty,) = deadly
    assert result == [f"refused {index}" if index == guilty else f"row {index}" for index in range(6)]
    assert deaths == 3
    assert opened.count(guilty) == 3
    assert list(tmp_path.iterdir()) == []  # marks are gone when a unit is done


def test_each_further_one_costs_two(tmp_path):
    result, deaths, _ = run(tmp_path, {1, 4}, most=5)
    assert [text for text in result if text.startswith("refused")] == ["refused 1", "refused 4"]
    assert deaths == 5


def test_a_worker_killed_from_outside_leaves_no_image_out(tmp_path):
    for times in range(1, 4):  # at one place each time
        with pytest.raises(Killed):
            attempt(tmp_path, {2 if times == 1 else times}, [])
    result, deaths, opened = run(tmp_path, set(), most=0)
    assert result == [f"row {index}" for index in range(6)]
    assert (deaths, opened) == (0, list(range(6)))


def test_an_exception_is_no_death_however_often_it_comes(tmp_path):
    """As when a server is down: the run ends, the same command goes on, and slices stay whole."""

    def fail(first: int, end: int) -> list[str]:
        raise RuntimeError("nobody listens")

    for _ in range(4):
        with pytest.raises(RuntimeError, match="nobody listens"):
            survive(Starts(tmp_path, "shard"), "0:0", 6, fail, lambda index: f"refused {index}")
    pieces = []
    begun = Starts(tmp_path, "shard")
    result = survive(begun, "0:0", 6, lambda first, end: pieces.append((first, end)) or ["row"] * 6, str)
    assert (result, pieces) == (["row"] * 6, [(0, 6)])


def test_what_is_over_is_not_held_against_anyone(tmp_path):
    """A process that dies between two slices, as while it reads, leaves no image out."""
    for _ in range(3):
        begun = Starts(tmp_path, "shard")
        assert survive(begun, "0:0", 2, lambda first, end: ["row"] * (end - first), str) == ["row"] * 2
        begun = Starts(tmp_path, "shard")  # the process died; the next begins
        assert (begun.deaths("0:0"), begun.deaths("0:0:1")) == (0, 0)


def test_deaths_count_where_they_happened(tmp_path):
    with pytest.raises(Killed):
        attempt(tmp_path, {2}, [], first=6)
    starts = Starts(tmp_path, "shard")
    assert (starts.deaths("0:6"), starts.deaths("0:0")) == (1, 0)
    assert Starts(tmp_path, "another shard").deaths("0:6") == 0


def test_rows_in_hand_are_those_of_the_last_attempt_at_each_unit(tmp_path):
    assert rows_in_hand(tmp_path / "nothing") == 0
    for unit, reports in (("a", (8, 16)), ("b", (8,))):
        begun = Starts(tmp_path, unit)
        for rows in reports:
            begun.report(rows)
    begun.begin("0:8")
    assert rows_in_hand(tmp_path) == 24
    begun = Starts(tmp_path, "b")  # done again, as its worker died
    assert begun.deaths("0:8") == 1
    assert rows_in_hand(tmp_path) == 16
    begun.remove()
    assert rows_in_hand(tmp_path) == 16


def test_a_mark_that_was_half_written_is_left_out(tmp_path):
    Starts(tmp_path, "shard").begin("0:0")
    (mark,) = tmp_path.iterdir()
    mark.write_bytes(mark.read_bytes() + b'"0:')
    starts = Starts(tmp_path, "shard")
    assert (starts.deaths("0:0"), starts.deaths("0:")) == (1, 0)


def test_names_that_are_no_text_and_what_is_left(tmp_path):
    Starts(folder_of(tmp_path), "a\udcff").begin("0:0")
    assert folder_of(tmp_path).is_dir()
    remove_all(tmp_path)
    remove_all(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert killed_its_worker().endswith(".")
