# SPDX-License-Identifier: Apache-2.0
"""Notes that are made once: by one of several processes, and anew where their subject or the cache is gone."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from blip3.data.cache import made_once


def note(made: Path) -> Path:
    def fill(folder: Path) -> None:
        (made / str(os.getpid())).touch()
        time.sleep(0.3)  # long enough for the others to come
        (folder / "a").write_text("b")

    return made_once("notes", "subject", fill)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_process_makes_notes_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP3_CACHE", str(tmp_path / "cache"))
    (tmp_path / "made").mkdir()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.map(note, [tmp_path / "made"] * 4, chunksize=1)
    assert len(set(folders)) == 1
    assert (folders[0] / "a").read_text() == "b"
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_what_could_not_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP3_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("It is damaged.")

    with pytest.raises(ValueError, match="damaged"):
        made_once("notes", "subject", fail)
    assert [path.name for path in (tmp_path / "notes").iterdir() if path.is_dir()] == []
    assert made_once("notes", "subject", lambda folder: None).is_dir()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLIP3_CACHE", str(tmp_path / "file"))
    folder = made_once("notes", "subject", lambda folder: (folder / "a").touch())
    assert (folder / "a").is_file()
    assert not folder.is_relative_to(tmp_path)
