# SPDX-License-Identifier: Apache-2.0
"""What a job writes: nothing is mixed, nothing that is done is done again."""

import json
from pathlib import Path

import pytest

from blip3.jobs.output import MANIFEST, Output, check_settings

SETTINGS = {"question": "Où?", "sizes": (1, 2), "input": "a\udcff"}


def open_output(folder: Path, settings: dict | None = None, **options: object) -> Output:
    return Output(folder, "rows.jsonl", settings or SETTINGS, {"ray": "2"}, what="answers", **options)


def write_one(folder: Path, settings: dict | None = None) -> None:
    with open_output(folder, settings) as output:
        output.append(['{"id": 1}'])


def test_lines_stay_and_are_done(tmp_path):
    with open_output(tmp_path / "out") as output:
        assert output.done == set()
        output.append(['{"id": 1}', '{"id": "1"}'])
    with open_output(tmp_path / "out") as output:
        assert output.done == {"1", '"1"'}
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest == {"settings": SETTINGS | {"sizes": [1, 2]}, "made_with": {"ray": "2"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Why?"}, 'answers with question = "Où\\?", but this run has "Why\\?".*Answers of two kinds'),
        ({"sizes": (1, 3)}, r"sizes = \[1, 2\]"),
        ({"new": 1}, "new = null, but this run has 1"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    write_one(tmp_path)
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message):
        open_output(tmp_path, SETTINGS | change)
    assert (tmp_path / MANIFEST).read_bytes() == before
    open_output(tmp_path).__exit__()  # the refused run let go of the folder


def test_a_run_that_failed_before_its_first_result_binds_nobody(tmp_path):
    open_output(tmp_path).__exit__()
    with open_output(tmp_path, SETTINGS | {"question": "Why?"}):
        pass
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["settings"]["question"] == "Why?"
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "00000.parquet").write_bytes(b"whose line was lost")
    with pytest.raises(ValueError, match='question = "Why'):
        open_output(tmp_path)


def test_what_earlier_versions_wrote_is_accepted(tmp_path):
    write_one(tmp_path, SETTINGS | {"model": "old"})
    ours = SETTINGS | {"model": "new"}
    open_output(tmp_path, ours, former={"model": lambda: "old"}).__exit__()
    with pytest.raises(ValueError, match='model = "old", but this run has "new"'):
        open_output(tmp_path, ours, former={"model": lambda: "another"})


def test_lines_in_use_damaged_or_without_a_manifest_are_refused(tmp_path):
    with open_output(tmp_path) as output:
        with pytest.raises(ValueError, match="another process"):
            open_output(tmp_path)
        output.append(['{"id": 1}', '{"answer": 2}'])
    with pytest.raises(ValueError, match="Line 2 of"):
        open_output(tmp_path)
    for text in ("no JSON", "[]", '{"settings": 3}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="not as a run writes it"):
            open_output(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"holds answers but there is no manifest\.json"):
        open_output(tmp_path)


def test_a_line_that_lost_its_file_is_not_done(tmp_path):
    def is_there(line: dict) -> bool:
        return (tmp_path / line["id"]).is_file()

    with open_output(tmp_path) as output:
        output.append(['{"id": "a.parquet"}', '{"id": "b.parquet"}'])
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / ".c.parquet.7-ab.unfinished").write_bytes(b"left by a kill")
    with open_output(tmp_path, is_there=is_there) as output:
        assert output.done == {'"b.parquet"'}
        assert not list(tmp_path.glob(".*.unfinished"))
        (tmp_path / ".d.parquet.8-cd.unfinished").write_bytes(b"of a worker that outlived its driver for a moment")
    assert not list(tmp_path.glob(".*"))


def test_long_settings_are_shortened_in_the_error():
    with pytest.raises(ValueError, match=r"holds results with settings text = \"x{199}\.\.\., but") as caught:
        check_settings(Path("out"), {"text": "x" * 500}, {"text": "y"}, section="settings")
    assert len(str(caught.value)) < 500
