# SPDX-License-Identifier: Apache-2.0
"""Tars of webdataset: every sample once and in order, and what is damaged is said in one row."""

import doctest
import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from blip3.jobs import tars
from blip3.jobs.inputs import Columns, plan_rows, plan_shards, read_image, read_unit
from blip3.jobs.tars import REST, list_tar, read_tar

pytest.importorskip("pyarrow", reason="tables: pip install pyarrow")

SUFFIXES = (".jpg", ".png")
NAMES = [f"0000000{index}" for index in range(5)]


def write(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path) -> Path:
    """Five samples as img2dataset writes them."""
    files = []
    for index, name in enumerate(NAMES):
        metadata = {"url": f"http://a/{index}", "caption": f"caption {index}", "key": name, "width": 10 + index}
        files += [(f"{name}.jpg", b"image %d" % index * 200), (f"{name}.json", json.dumps(metadata).encode())]
        files.append((f"{name}.txt", b"text %d" % index))
    return write(path, files)


def keys_of(path: Path) -> list[str]:
    """Read a tar; what is only listed must be the same."""
    keys = [sample.key for sample in read_tar(path, SUFFIXES, 10_000)]
    assert list(list_tar(path, SUFFIXES)) == keys
    return keys


def test_files_of_a_key_are_a_sample(tmp_path):
    path = shard(tmp_path / "0.tar")
    samples = list(read_tar(path, SUFFIXES, 10_000))
    assert keys_of(path) == NAMES
    assert samples[3].image == b"image 3" * 200
    assert samples[3].metadata() == {"url": "http://a/3", "caption": "caption 3", "key": NAMES[3], "width": 13}
    assert all(sample.error is None for sample in samples)


def test_a_caption_may_be_in_the_text_alone(tmp_path):
    path = write(
        tmp_path / "0.tar", [("a.txt", "été".encode()), ("a.cls", b"7"), ("a.PNG", b"x"), ("sub/a.png", b"y")]
    )
    first, second = read_tar(path, SUFFIXES, 10)
    assert (first.key, first.image, first.metadata()) == ("a", b"x", {"caption": "été"})
    assert (second.key, second.image, second.metadata()) == ("sub/a", b"y", {})


def test_every_cut_of_a_tar_keeps_what_is_before_it(tmp_path):
    whole = shard(tmp_path / "0.tar").read_bytes()
    content = len(whole) - len(whole) % 512
    while whole[content - 512 : content] == bytes(512):
        content -= 512
    for end in (*range(512, content + 1, 512), *range(700, content, 1100)):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:end])
        samples = list(read_tar(path, SUFFIXES, 10_000))
        assert keys_of(path) == [*NAMES[: len(samples) - 1], REST]
        complete = [sample for sample in samples if sample.error is None]
        assert [sample.image for sample in complete] == [b"image %d" % i * 200 for i in range(len(complete))]
        assert samples[-1].error.startswith(f"The tar cut.tar is damaged after {len(samples) - 1} samples (")
    path.write_bytes(whole[: content + 512])  # an end mark of one block is enough
    assert keys_of(path) == NAMES


def test_a_damaged_header_is_no_end(tmp_path):
    path = shard(tmp_path / "0.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember(f"{NAMES[3]}.jpg").offset
    data[start : start + 512] = b"\x55" * 512
    path.write_bytes(data)
    assert keys_of(path) == [*NAMES[:2], REST]  # the third was not known to be complete
    *_, rest = read_tar(path, SUFFIXES, 10_000)
    assert rest.error == "The tar 0.tar is damaged after 2 samples (a header is damaged, or the end is missing)."


@pytest.mark.parametrize("content", [b"", b"<html>", b"x" * 5000])
def test_what_is_no_tar_is_one_error(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    assert keys_of(tmp_path / "0.tar") == [REST]
    (sample,) = read_tar(tmp_path / "0.tar", SUFFIXES, 10)
    assert "is damaged after 0 samples" in sample.error
    assert "\n" not in sample.error


def test_an_empty_tar_has_no_samples(tmp_path):
    assert keys_of(write(tmp_path / "0.tar", [])) == []


def test_compressed_tars_are_read_and_their_damage_is_found(tmp_path):
    data = gzip.compress(shard(tmp_path / "plain.tar").read_bytes())
    (tmp_path / "0.tar").write_bytes(data)
    assert keys_of(tmp_path / "0.tar") == NAMES
    (tmp_path / "0.tar").write_bytes(data[: len(data) // 2])
    *_, rest = read_tar(tmp_path / "0.tar", SUFFIXES, 10_000)
    assert rest.key == REST


def test_faults_of_one_sample_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_TEXT_BYTES", 20)
    files = [("large.jpg", b"x" * 101), ("none.txt", b"a"), ("long.jpg", b"x"), ("long.json", b" " * 21)]
    files += [
        ("www.a_1.jpg", b"x"),
        ("www.a_2.jpg", b"y"),
        ("list.jpg", b"x"),
        ("list.json", b"[1]"),
        ("good.jpg", b"x"),
    ]
    path = write(tmp_path / "0.tar", [*files, ("seg.mask.png", b"mask"), ("seg.png", b"image")])
    (unit,) = plan_shards(path, ()).units
    (table,) = read_unit(unit, 100)
    found = {}
    for row in table.to_pylist():
        try:
            found[json.loads(row["id"])] = read_image(row["kind"], row["image"])
        except ValueError as error:
            found[json.loads(row["id"])] = str(error)
    assert found["large"] == b"x" * 101  # the limit of a job is larger
    assert found["none"] == "The row has no image."
    assert found["long"] == "The file long.json has 21 bytes but at most 20 are read."
    assert found["www"] == "The sample has two images, a_1.jpg and a_2.jpg, and a key stands for one."
    assert found["list"] == "The file list.json of 3 bytes is no JSON object of at most 64 levels."
    assert (found["good"], found["seg"]) == (b"x", b"image")
    first, *_ = read_tar(path, SUFFIXES, 100)
    assert first.error == "The image has 101 bytes but at most 100 are read."


def test_rows_of_tars_are_asked_for_once(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "00000.tar")
    shard(folder / "00001.tar")
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[:6000])
    (folder / "00000.parquet").write_bytes(b"what img2dataset lists of the tar")
    (folder / "00000_stats.json").write_bytes(b"{}")
    columns = Columns(values={"question": "caption"})
    plan = plan_rows(folder, {f'"00000.tar:{NAMES[1]}"'}, columns)
    rows = [row for unit in plan.units for table in read_unit(unit, 2) for row in table.to_pylist()]
    ids = [json.loads(row["id"]) for row in rows]
    assert (plan.num_rows, plan.num_missing) == (len(rows) + 1, len(rows))
    assert ids == [f"00000.tar:{name}" for name in NAMES if name != NAMES[1]] + [
        f"00001.tar:{NAMES[0]}",
        "00001.tar:the rest",
    ]
    assert json.loads(rows[1]["question"]) == "caption 2"
    assert rows[-1]["kind"] == "error"


def test_a_tar_is_a_shard_whose_ids_are_its_keys(tmp_path):
    shard(tmp_path / "0.tar")
    (unit,) = plan_shards(tmp_path, (), Columns(rest=True)).units
    assert unit["id"] == "0.tar"
    rows = [row for table in read_unit(json.loads(json.dumps(unit)), 2) for row in table.to_pylist()]
    assert [json.loads(row["id"]) for row in rows] == NAMES
    assert json.loads(rows[2]["rest"])["url"] == "http://a/2"


def test_keys_that_come_twice_are_refused_where_rows_are_resumed(tmp_path):
    write(tmp_path / "0.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"x")])
    with pytest.raises(ValueError, match="has the id 'a' for the second time"):
        plan_rows(tmp_path, ())


def test_doctests():
    result = doctest.testmod(tars)
    assert result.attempted
    assert not result.failed
