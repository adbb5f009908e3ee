# SPDX-License-Identifier: Apache-2.0
"""One shard through an engine, in this process: its rows, its file, its line, and a folder of one kind."""

import doctest
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blip3.data.readers import read_ocr, stream_rows
from blip3.data.records import RecordError
from blip3.data.shards import images_beside
from blip3.engines import run, show, texts, writer
from blip3.engines.filters.images import Sides
from blip3.engines.run import EngineSummary, RunSettings, open_output, summarize
from blip3.engines.stages import EnginePlan, StageSpec
from blip3.engines.writer import ShardWriter, WriterSettings, pools_of, steps_of
from blip3.jobs.inputs import plan_shards
from blip3.jobs.pools import DeadlyItem
from blip3.jobs.ray_run import Summary
from support import render_image, write_tar
from support.engine import SCHEMA, plan

pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="parquet: pip install pyarrow")

COLUMNS = ["uid", "url", "key", *SCHEMA, "error", "filtered_by"]


def encode(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    render_image(height, width, seed=height).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path) -> Path:
    """A tar of twelve samples; the fourth is broken, the sixth has a short caption, the last is cut off."""
    samples = {}
    for index in range(12):
        metadata = {"url": f"http://a/{index}", "uid": f"{index:032x}", "width": 9999, "status": "success"}
        image = encode(20 + index, 30) if index != 3 else b"broken"
        caption = b"a" if index == 5 else b"a caption"
        samples[f"{index:08}"] = {"jpg": image, "txt": caption, "json": json.dumps(metadata).encode()}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "00000.tar"
    write_tar(path, samples)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"00000011.txt")])
    return path


def write(source: Path, output: Path, made: EnginePlan | None = None, slice_size: int = 5, **options) -> tuple:
    """Write every shard of an input; gives the lines and the rows."""
    settings = RunSettings(source, output, slice_size=slice_size, **options)
    columns = {name: settings.text_columns.get(name, name) for name in run.TEXT_COLUMNS}
    work = ShardWriter(WriterSettings(output, made or plan(), slice_size, columns))
    lines = [work(json.loads(json.dumps(unit))) for unit in plan_shards(source, (), settings.columns).units]
    return lines, [row for line in lines for row in parquet.read_table(output / line["file"]).to_pylist()]


@pytest.mark.parametrize("slice_size", [1, 5, 64])
def test_rows_are_those_of_the_shard_in_its_order(shard, tmp_path, slice_size, monkeypatch):
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 4)
    (line,), rows = write(shard, tmp_path / "out", slice_size=slice_size)
    assert {name: line[name] for name in ("id", "file", "rows", "errors", "filtered")} == {
        "id": "00000.tar",
        "file": "00000.parquet",
        "rows": 12,
        "errors": 2,
        "filtered": {"short_caption": 1},
    }
    assert list(rows[0]) == COLUMNS
    assert [row["key"] for row in rows] == [*(f"{index:08}" for index in range(11)), "00000.tar: the rest"]
    for index, row in enumerate(rows[:11]):
        assert (row["url"], row["uid"]) == (f"http://a/{index}", f"{index:032x}")
        if index not in (3, 5):
            assert (row["height"], row["width"], row["error"], row["filtered_by"]) == (20 + index, 30, None, None)
    assert rows[3]["error"].startswith("Its 6 bytes are not the beginning")
    assert (rows[5]["filtered_by"], rows[5]["height"], rows[5]["caption_length"]) == ("short_caption", None, 1)
    assert rows[11]["error"].startswith("The tar 00000.tar is damaged after 11 samples (")
    file = parquet.ParquetFile(tmp_path / "out" / "00000.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [4, 4, 4]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["00000.parquet"]


def test_parquet_and_folders_are_shards_too(tmp_path):
    (tmp_path / "rows" / "below").mkdir(parents=True)
    rows = [{"photo": encode(20, 30 + i), "id": i, "alt": f"text {i}", "url": None, "error": "old"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "below" / "a.parquet")
    options = {"image_column": "photo", "text_columns": {"caption": "alt"}}
    (line,), found = write(tmp_path / "rows", tmp_path / "one", **options)
    assert line["file"] == "below/a.parquet"
    assert [(row["key"], row["width"], row["url"], row["error"]) for row in found] == [
        (str(i), 30 + i, "", None) for i in range(3)
    ]
    assert [row["caption_length"] for row in found] == [6, 6, 6]
    with pytest.raises(ValueError, match="caption_column is 'none'"):
        write(tmp_path / "rows", tmp_path / "two", **options | {"text_columns": {"caption": "none"}})

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(20, 30))
    (tmp_path / "images" / "b.jpg").write_bytes(b"")
    (line,), found = write(tmp_path / "images", tmp_path / "three", plan(least=0))
    assert line["file"] == "images-00000.parquet"
    assert [(row["key"], row["height"]) for row in found] == [("a.png", 20), ("b.jpg", None)]


def test_texts_that_are_no_unicode_and_names_that_are_none_end_no_run(tmp_path):
    """Half characters in JSON, bytes of other encodings in names, JSON that is too deep, beside a good sample."""
    good = {"url": "http://a", "uid": "1", "caption": "a caption"}
    jsons = {
        "good": json.dumps(good).encode(),
        "url": json.dumps(good | {"url": "http://a/\ud800", "uid": "\udfff", "caption": "half \ud83d"}).encode(),
        "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "less_deep": b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}",
        "markers": json.dumps(good | {"caption": "an <image> of <|endofchunk|>text"}).encode(),
    }
    samples = {key: {"jpg": encode(20, 30), "json": text} for key, text in jsons.items()}
    samples["caf\udce9"] = {"jpg": encode(20, 30), "txt": b"a caption"}
    write_tar(tmp_path / "a.tar", samples)
    made = replace(plan(), schema={**SCHEMA, "alt": "string"}, stages=(StageSpec(TakeAltText), *plan().stages))
    (line,), rows = write(tmp_path / "a.tar", tmp_path / "out", made, slice_size=4)
    by_key = {row["key"]: row for row in rows}
    assert (line["rows"], line["errors"]) == (6, 3)
    assert (by_key["url"]["url"], by_key["url"]["uid"]) == ("http://a/\ufffd", "\ufffd")
    assert by_key["markers"]["alt"] == "an  of text"
    assert by_key["url"]["alt"] == "half \ufffd"
    assert [key for key, row in by_key.items() if row["error"] is None] == ["good", "url", "markers"]
    for key in ("deep", "less_deep"):
        assert "is no JSON object of at most 64 levels" in by_key[key]["error"]
    assert "'caf\ufffd' is no Unicode" in by_key["caf\ufffd"]["error"]

    (tmp_path / "images").mkdir()
    for name in (b"caf\xe9.png", b"good.png"):
        Path(tmp_path / "images", os.fsdecode(name)).write_bytes(encode(20, 30))
    (line,), rows = write(tmp_path / "images", tmp_path / "two", plan(least=0))
    assert [(row["key"], row["error"] is None) for row in rows] == [("caf\ufffd.png", False), ("good.png", True)]


class TakeAltText:
    """Writes the alt-text, and something that only a stage could bring."""

    needs_images = False

    def __call__(self, samples: list, images: list) -> list[dict]:
        """Add `alt`, and a colour that is no Unicode."""
        return [{"alt": sample.caption, "colour": "\udcff<ima<image>ge>"} for sample in samples]


def test_what_a_stage_writes_is_cleaned_too(tmp_path):
    write_tar(tmp_path / "a.tar", {"a": {"jpg": encode(20, 30)}})
    made = EnginePlan("alt", (StageSpec(TakeAltText),), {"colour": "string"}, {})
    _, (row,) = write(tmp_path / "a.tar", tmp_path / "out", made)
    assert row["colour"] == "\ufffd"


class Spell:
    """Writes the size of an image as OCR writes its texts."""

    needs_images = True

    def __call__(self, samples: list, images: list) -> list[dict]:
        """Add `captions`."""
        return [{"captions": json.dumps([[f"{image.height} x {image.width}", 0, False]])} for image in images]


@pytest.mark.parametrize("own", [{"captions": '["of the shard"]'}, {"captions": ["a", "b"]}, {"captions": {"k": 1}}])
def test_columns_that_the_engine_did_not_write_are_empty_whatever_the_shard_has(tmp_path, own):
    """A kept, a filtered and a broken row of a shard whose own column is called as the engine's."""
    images = {"kept": encode(20, 30), "small": encode(8, 30), "broken": b"broken"}
    write_tar(tmp_path / "a.tar", {key: {"jpg": it, "json": json.dumps(own).encode()} for key, it in images.items()})
    stages = (StageSpec(Sides, {"least": 16}), StageSpec(Spell))
    made = EnginePlan("spell", stages, {"captions": "string"}, {})
    (line,), rows = write(tmp_path / "a.tar", tmp_path / "out", made)
    assert (line["rows"], line["errors"], line["filtered"]) == (3, 1, {"sides": 1})
    assert {row["key"]: row["captions"] for row in rows} == {
        "kept": '[["20 x 30", 0, false]]',
        "small": None,
        "broken": None,
    }


@pytest.mark.parametrize(
    ("key", "image", "as_struct"),
    [("key", "image", False), ("id", "image", True), (None, "image", False), ("name", "photo", False)],
)
def test_rows_about_parquet_are_trained_on(tmp_path, key, image, as_struct):
    """Parquet with images -> an engine -> the reader of its rows, which finds each image by its key."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    rows = []
    for number in range(5):
        data = encode(20, 30 + number) if number != 2 else b"broken"
        named = {key: f"k{number}"} if key else {}
        rows.append({image: {"bytes": data, "path": None} if as_struct else data, **named})
    path = tmp_path / "in" / "below" / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    made = EnginePlan("spell", (StageSpec(Spell),), {"captions": "string"}, {})
    options = {"image_column": image, "key_column": key if key == "name" else None}
    with open_output(RunSettings(tmp_path / "in", tmp_path / "out", **options), made) as output:
        (line,), _ = write(tmp_path / "in", tmp_path / "out", made, **options)
        output.append([json.dumps(line)])
    found = list(
        read_ocr(stream_rows(str(tmp_path / "out" / "below" / "*.parquet")), image_folder=str(tmp_path / "in"))
    )
    assert [record.turns[-1].text for record in found] == [f"<image>20 x {30 + number}" for number in (0, 1, 3, 4)]
    assert [record.images[0].size() for record in found] == [(20, 30 + number) for number in (0, 1, 3, 4)]
    with pytest.raises(RecordError, match=r"The image 'k9' in .*a\.parquet.* does not exist"):
        replace(found[0].images[0], path="k9").open()


def test_images_that_parquet_names_by_their_path_are_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lies.png").write_bytes(encode(20, 77))
    parquet.write_table(pyarrow.table({"image": ["lies.png"], "key": ["k"]}), tmp_path / "in" / "a.parquet")
    made = EnginePlan("spell", (StageSpec(Spell),), {"captions": "string"}, {})
    write(tmp_path / "in" / "a.parquet", tmp_path / "out", made)
    (record,) = read_ocr(stream_rows(str(tmp_path / "out" / "a.parquet")), image_folder=str(tmp_path / "in"))
    assert record.images[0].size() == (20, 77)
    assert images_beside(str(tmp_path / "out"), str(tmp_path / "out" / "a.parquet")) is None  # rows, not images


class Lines:
    """Drops lines, of one sample all."""

    needs_images = False

    def __call__(self, samples: list, images: list) -> list[dict]:
        """Add what OCR and its filters add."""
        kept = {"dropped_entries": {"confidence": 2, "letters": 1}}
        return [kept | ({"filtered_by": "confidence"} if sample.key == "b" else {}) for sample in samples]


def test_lines_that_were_dropped_are_counted(tmp_path):
    write_tar(tmp_path / "a.tar", {key: {"jpg": encode(20, 30)} for key in "abc"})
    made = EnginePlan("lines", (StageSpec(Lines),), {}, {})
    (line,), _ = write(tmp_path / "a.tar", tmp_path / "out", made)
    assert (line["filtered"], line["dropped_lines"]) == ({"confidence": 1}, {"confidence": 6, "letters": 3})


class FakePool:
    """Stands for processes elsewhere."""

    def __init__(self, work, deadly: str):
        self.work, self.deadly = work, deadly

    def stream(self, batches: Iterable) -> Iterator:
        """Give results, one batch behind, as a pool does."""
        waiting = []
        for about, items in batches:
            waiting.append((about, [self._one(item) for item in items]))
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting

    def _one(self, sample):
        assert sample.image
        return DeadlyItem("It died.") if sample.key == self.deadly else self.work([sample])[0]


def test_a_stage_may_have_processes_of_its_own(shard, tmp_path, monkeypatch):
    made = plan(pooled=True)
    assert [is_pooled for is_pooled, _ in steps_of(made)] == [False, True]
    (spec,) = pools_of(made)
    assert (spec.workers, spec.num_gpus) == (2, 0)
    monkeypatch.setattr(writer, "Pool", FakePool)
    pool = FakePool(spec.work(*spec.arguments), deadly="00000002")
    columns = {name: name for name in run.TEXT_COLUMNS}
    work = ShardWriter(WriterSettings(tmp_path / "out", made, 5, columns), [pool])
    (unit,) = plan_shards(shard, (), RunSettings(shard, tmp_path).columns).units
    line = work(unit)
    assert (line["rows"], line["errors"]) == (12, 3)
    rows = parquet.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    _, alone = write(shard, tmp_path / "alone")
    for row, other in zip(rows, alone, strict=True):
        if row["key"] == "00000002":
            assert (row["error"], row["height"], row["caption_length"]) == ("It died.", None, 9)
        else:
            assert row == other


def test_stages_that_need_more_than_a_cpu_have_processes_of_their_own():
    measure = plan().stages[1]
    for change, workers in (({"num_gpus": 0.5}, 1), ({"num_cpus": 4}, 1), ({"workers": 3}, 3)):
        changed = replace(plan(), stages=(replace(measure, **change), measure, measure))
        assert [(is_pooled, len(specs)) for is_pooled, specs in steps_of(changed)] == [(True, 1), (False, 2)]
        assert [spec.workers for spec in pools_of(changed)] == [workers]


def test_rows_of_two_kinds_are_not_mixed(shard, tmp_path):
    settings = RunSettings(shard.parent, tmp_path / "out")
    with open_output(settings, plan()) as output:
        output.append(['{"id": "00000.tar", "file": "00000.parquet"}'])
    open_output(replace(settings, workers=7, slice_size=3), plan(burn=1.0)).__exit__()  # the rows are the same
    for other, made, message in (
        (settings, plan(least=4), r"holds rows with measure\.least = 3, but this run has 4"),
        (settings, replace(plan(), name="ocr"), 'engine = "measure", but this run has "ocr"'),
        (settings, replace(plan(), schema={"a": "string"}), "schema = "),
        (replace(settings, image_column="photo"), plan(), "columns = "),
    ):
        with pytest.raises(ValueError, match=message):
            open_output(other, made)
    (shard.parent / "00001.tar").write_bytes(b"new")
    with pytest.raises(ValueError, match=r'input = {"kind": "tars", "files": 1,'):
        open_output(settings, plan())


def test_shards_of_one_name_are_refused(tmp_path):
    for name in ("a.tar", "a.TAR"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 shards would be written to a\.parquet"):
        run.check_names(plan_shards(tmp_path, ()))
    (tmp_path / "a.TAR").rename(tmp_path / os.fsdecode(b"caf\xe9.tar"))
    with pytest.raises(ValueError, match="A shard's name is 'caf\ufffd\\.tar'"):
        run.check_names(plan_shards(tmp_path, ()))


def test_counts_are_added_up_over_runs(tmp_path):
    lines = [
        {"id": "a", "rows": 10, "errors": 1, "filtered": {"small": 2, "faces": 1}},
        {"id": "b", "rows": 10, "errors": 0, "filtered": {"small": 3}, "dropped_lines": {"letters": 4}},
        {"id": "a", "rows": 10, "errors": 2, "filtered": {"small": 2}},  # made again after its file was removed
    ]
    (tmp_path / "shards.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    summary = summarize(tmp_path, Summary(2, 1, 2, 1, 0, 2.0, tmp_path / "shards.jsonl", "shard"))
    assert (summary.rows, summary.errors, summary.filtered) == (20, 2, {"small": 5})
    assert str(summary).splitlines()[1:] == [
        "In all 20 rows: 13 kept, 2 in error, the rest filtered out.",
        "  small  5",
        "Lines of text that were dropped: 4.",
        "  letters  4",
    ]
    assert isinstance(summary, EngineSummary)


@pytest.mark.parametrize("change", [{"workers": 0}, {"slice_size": 0}])
def test_settings_that_cannot_work_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="must be a positive integer"):
        RunSettings(tmp_path, tmp_path, **change)


@pytest.mark.parametrize(
    ("source", "output", "place"),
    [
        ("in", "in", "the input itself"),
        ("in", "in/below/out", "inside it"),
        ("in", "else/../in/out", "inside it"),
        ("in", "link/out", "inside it"),
        ("in/a.parquet", "in", "its folder"),
    ],
)
def test_an_output_in_the_input_is_refused_before_anything_is_written(tmp_path, source, output, place):
    """Rows would be the next run's input, or in the place of a file of the input."""
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"image": [b"i"], "key": ["k"]}), tmp_path / "in" / "a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match=f"and the output .* is {place}, but the two are expected apart"):
        RunSettings(tmp_path / source, tmp_path / output)
    with pytest.raises(ValueError, match="but the two are expected apart"):
        show.make_sheet(tmp_path, tmp_path / "in", tmp_path / "in" / "sheet.png")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.parquet"]
    for apart in ("out", "input", "link_to"):
        assert RunSettings(tmp_path / "in", tmp_path / apart)
    assert RunSettings(tmp_path / "in" / "a.parquet", tmp_path / "in" / "below")


@pytest.mark.parametrize("module", [writer, texts])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
