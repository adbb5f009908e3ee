# SPDX-License-Identifier: Apache-2.0
"""What a job reads: every row once, and only those that are missing."""

import doctest
import json
import os
from pathlib import Path

import pytest

from blip3.jobs import inputs
from blip3.jobs.inputs import Columns, describe_input, plan_rows, plan_shards, read_image, read_unit

pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="parquet: pip install pyarrow")


def write_shards(folder: Path) -> list[dict]:
    """Two parquet files of bytes and of structs as `datasets` writes them, with row groups of three."""
    rows = [{"key": 100 + index, "image": b"%d" % index, "ask": f"What is {index}?"} for index in range(9)]
    rows[1]["ask"] = rows[7]["image"] = None
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:5]), folder / "a.parquet", row_group_size=3)
    structs = [{**row, "image": {"bytes": row["image"], "path": "unused.jpg"}} for row in rows[5:]]
    structs[2]["image"] = None
    (folder / "below").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(structs), folder / "below" / "b.parquet", row_group_size=3)
    return rows


def rows_of(units: list[dict], batch_size: int) -> list[dict]:
    """Read units as a task does, which gets them as JSON."""
    tables = [table for unit in units for table in read_unit(json.loads(json.dumps(unit)), batch_size)]
    assert all(0 < table.num_rows <= batch_size for table in tables)
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_only_missing_rows_are_read(tmp_path, batch_size):
    expected = write_shards(tmp_path / "rows")
    columns = Columns(id="key", values={"question": "ask"})
    plan = plan_rows(tmp_path / "rows", {"100", "101", "102", "104", "106"}, columns)
    assert (plan.num_rows, plan.num_missing) == (9, 4)
    rows = rows_of(plan.units, batch_size)
    assert [row["id"] for row in rows] == ["103", "105", "107", "108"]
    assert [json.loads(row["question"]) for row in rows] == [expected[int(row["id"]) - 100]["ask"] for row in rows]
    assert rows[1]["image"] == expected[5]["image"]
    assert rows[2]["kind"] == "none"


def test_rows_without_an_id_are_numbered(tmp_path):
    write_shards(tmp_path / "rows")
    plan = plan_rows(tmp_path / "rows", {'"a.parquet:4"'})
    assert [json.loads(row["id"]) for row in rows_of(plan.units, 8)] == [
        *(f"a.parquet:{index}" for index in range(4)),
        *(f"below/b.parquet:{index}" for index in range(4)),
    ]


def test_a_shard_is_a_unit_and_is_read_whole(tmp_path):
    expected = write_shards(tmp_path / "rows")
    columns = Columns(id="key", values={"caption": "ask"})
    plan = plan_shards(tmp_path / "rows", {'"a.parquet"'}, columns)
    assert (plan.num_rows, plan.num_missing, [unit["id"] for unit in plan.units]) == (2, 1, ["below/b.parquet"])
    rows = rows_of(plan_shards(tmp_path / "rows", (), columns).units, 2)
    assert [json.loads(row["id"]) for row in rows] == [row["key"] for row in expected]
    assert [row["image"] or None for row in rows] == [row["image"] for row in expected]
    assert [json.loads(row["caption"]) for row in rows] == [row["ask"] for row in expected]
    assert plan_shards(tmp_path / "rows" / "a.parquet", ()).units[0]["id"] == "a.parquet"


def test_shards_that_cannot_be_read_are_refused(tmp_path):
    write_shards(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"a\.parquet has the columns .* but caption_column is 'text'"):
        plan_shards(tmp_path / "rows", (), Columns(values={"caption": "text"}))
    (tmp_path / "rows" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 1 images, 2 parquet files and 0 tars, but one of the three"):
        plan_shards(tmp_path / "rows", ())


def test_a_folder_of_images_is_cut_into_shards_of_a_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PATHS_PER_SHARD", 2)
    for name in ("a.png", "b.png", "c.png", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    plan = plan_shards(tmp_path, {'"images-00000"'}, Columns(rest=True))
    assert (plan.num_rows, plan.num_missing, plan.num_skipped_files) == (2, 1, 1)
    assert [unit["id"] for unit in plan.units] == ["images-00001"]
    (row,) = rows_of(plan.units, 8)
    assert (json.loads(row["id"]), json.loads(row["rest"])) == ("c.png", {})


def test_an_input_is_known_by_the_names_and_sizes_of_its_files(tmp_path):
    write_shards(tmp_path / "rows")
    before = describe_input(tmp_path / "rows")
    assert (before["kind"], before["files"]) == ("parquet files", 2)
    assert before["bytes"] == sum(path.stat().st_size for path in (tmp_path / "rows").rglob("*.parquet"))
    (tmp_path / "rows").rename(tmp_path / "moved")
    assert describe_input(tmp_path / "moved") == before
    (tmp_path / "moved" / "a.parquet").rename(tmp_path / "moved" / "c.parquet")
    assert describe_input(tmp_path / "moved") != before


def test_all_other_columns_of_parquet_come_as_one(tmp_path):
    row = {"key": "k", "image": b"x", "thumbnail": b"y", "url": "u", "ask": "Why?", "boxes": [[1, 2]], "size": None}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    columns = Columns(values={"question": "ask"}, ids=("key", "id"), rest=True)
    (read,) = rows_of(plan_shards(tmp_path, (), columns).units, 8)
    assert json.loads(read["id"]) == "k"
    assert json.loads(read["question"]) == "Why?"
    assert json.loads(read["rest"]) == {"url": "u", "boxes": [[1, 2]], "size": None}


def test_a_damaged_parquet_shard_is_one_row_in_error(tmp_path):
    write_shards(tmp_path / "rows")
    plan = plan_shards(tmp_path / "rows", (), Columns(id="key"))
    path = tmp_path / "rows" / "a.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\xff" * 40 + data[48:])
    rows = rows_of(plan.units, 8)
    assert [row["kind"] for row in rows] == ["error", "bytes", "bytes", "none", "bytes"]
    assert json.loads(rows[0]["id"]) == "a.parquet: the rest"
    with pytest.raises(ValueError, match=r"^The file a\.parquet is damaged, and its other rows are lost \("):
        read_image(rows[0]["kind"], rows[0]["image"])


def test_a_folder_of_images_is_read_by_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PATHS_PER_UNIT", 2)
    names = ["a.png", "b.JPG", "below/c.webp", "below/d.png"]
    for name in (*names, "notes.txt", ".hidden/e.png", ".f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    plan = plan_rows(tmp_path, {'"b.JPG"'})
    assert (plan.num_rows, plan.num_missing, plan.num_skipped_files) == (4, 3, 1)
    assert [len(unit["paths"]) for unit in plan.units] == [2, 1]
    rows = rows_of(plan.units, 8)
    assert [json.loads(row["id"]) for row in rows] == ["a.png", "below/c.webp", "below/d.png"]
    assert [read_image(row["kind"], row["image"]).decode() for row in rows] == ["a.png", "below/c.webp", "below/d.png"]
    assert list(rows[0]) == ["id", "kind", "image"]


def test_paths_in_parquet_are_beside_it(tmp_path):
    (tmp_path / "a.png").write_bytes(b"there")
    table = pyarrow.Table.from_pylist([{"image": "a.png"}, {"image": "gone.jpg"}, {"image": None}])
    parquet.write_table(table, tmp_path / "paths.parquet")
    first, second, third = rows_of(plan_rows(tmp_path / "paths.parquet", ()).units, 8)
    assert read_image(first["kind"], first["image"]) == b"there"
    with pytest.raises(ValueError, match=r"^The file 'gone\.jpg' could not be read \(no such file\)\.$"):
        read_image(second["kind"], second["image"])
    with pytest.raises(ValueError, match="no image"):
        read_image(third["kind"], third["image"])


def test_images_that_are_too_large_or_no_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_IMAGE_BYTES", 10_000)
    (tmp_path / "a.png").write_bytes(b"x" * 10_001)
    for kind, data in (("bytes", b"x" * 10_001), ("path", os.fsencode(tmp_path / "a.png"))):
        with pytest.raises(ValueError, match="10001 bytes but at most 10000"):
            read_image(kind, data)
    for path in (b"a\x00b", os.fsencode(tmp_path)):
        with pytest.raises(ValueError, match="could not be read"):
            read_image("path", path)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"id": 1, "image": b""}, {"id": 1, "image": b""}], Columns(), "for the second time"),
        ([{"id": 1.5, "image": b""}], Columns(), "of the type float"),
        ([{"id": 1, "photo": b""}], Columns(), "image_column is 'image'"),
        ([{"id": 1, "image": b""}], Columns(values={"question": "ask"}), "question_column is 'ask'"),
    ],
)
def test_parquet_that_cannot_be_resumed_or_read_is_refused(tmp_path, rows, columns, message):
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        plan_rows(tmp_path / "rows.parquet", (), columns)


def test_inputs_that_are_neither_images_nor_parquet_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        "missing": "no such file",
        "missing.parquet": "no such file",
        "empty": "0 images, 0 parquet files and 0 tars",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            plan_rows(tmp_path / name, ())
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a folder of images, but a folder without a question_column"):
        plan_rows(tmp_path, (), Columns(values={"question": "ask"}))
    with pytest.raises(ValueError, match=r"is a file of images, but a folder of them"):
        plan_rows(tmp_path / "a.png", ())


def test_errors_become_one_sentence():
    assert inputs.one_sentence(OSError()) == "OSError."  # some libraries raise without a word
    assert inputs.one_sentence(ValueError("cannot identify <_io.BytesIO object at 0x7f>")) == "Cannot identify."
    assert len(inputs.one_sentence(ValueError("x" * 1000))) == 301


def test_doctests():
    result = doctest.testmod(inputs)
    assert result.attempted
    assert not result.failed
