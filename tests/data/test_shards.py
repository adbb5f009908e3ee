# SPDX-License-Identifier: Apache-2.0
"""Shards here and in an object store: any row by its number, and images out of tars."""

import json
import os

import pytest

from blip3.data import shards
from blip3.data.images import RecordError
from blip3.data.readers import read_captions, read_ocr, stream_rows
from blip3.data.shards import ImageShard, ShardError, ShardReader, count_rows, find_shards, index_of, read_image
from blip3.world import build
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_record
from support import object_store, write_tar
from support.training import WORLD


@pytest.fixture(scope="module")
def image() -> bytes:
    return build.encode(rendered_record("caption", settings=settings_from(WORLD)).images[0], "png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image):
    """Two tars of three samples and two parquet files of five rows in groups of two."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        samples = {
            f"{shard}{number}": {"png": image, "txt": f"Text {number}".encode(), "json": b'{"uid": "u"}'}
            for number in range(3)
        }
        write_tar(folder / f"{shard}.tar", samples)
        rows = [{"uid": f"{shard}{n}", "image": {"bytes": image, "path": None}, "caption": "A."} for n in range(5)]
        Dataset.from_list(rows).to_parquet(str(folder / f"{shard}.parquet"), batch_size=2)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_rows_are_those_of_datasets(folder, kind):
    """The library that the published data sets are read with."""
    from datasets import load_dataset

    name = {"tar": "webdataset"}.get(kind, kind)
    files = sorted(map(str, folder.glob(f"*.{kind}")))
    expected = list(load_dataset(name, data_files=files, split="train", streaming=True).decode(False))
    found = list(stream_rows(str(folder / f"*.{kind}")))
    assert len(found) == len(expected) == sum(count_rows(files))
    for row, other in zip(found, expected, strict=True):
        assert row["__url__"] in files
        for column in other.keys() - {"__url__", "png"}:
            assert row[column] == other[column]
        if kind == "tar":
            assert row["png"] == other["png"]["bytes"]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_an_object_store_gives_the_same_rows_and_is_looked_through_once(folder, kind):
    with object_store(folder) as (url, asked):
        urls = find_shards(f"{url}/*.{kind}")
        assert urls == [f"{url}/{shard}.{kind}" for shard in range(2)]
        assert count_rows(urls) == count_rows(sorted(map(str, folder.glob(f"*.{kind}"))))
        assert set(asked) == {f"0.{kind}", f"1.{kind}"}
        asked.clear()
        index_of.cache_clear()
        assert count_rows(urls) == count_rows(urls)
        assert not asked, "the cache folder has it"
        row = ShardReader(urls[1]).row(2)
        assert set(asked) == {f"1.{kind}"}, "no other shard is read for one row"
        local = ShardReader(str(folder / f"1.{kind}")).row(2)
        assert {**row, "__url__": ""} == {**local, "__url__": ""}


def test_a_changed_shard_is_looked_through_again(tmp_path, image):
    path = tmp_path / "a.tar"
    for count in (2, 3):
        write_tar(path, {str(number): {"png": image} for number in range(count)})
        os.utime(path, (count, count))
        assert count_rows([str(path)]) == [count]
        index_of.cache_clear()


def test_a_tar_that_is_cut_gives_what_stands_before(folder, tmp_path):
    whole = (folder / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    index = index_of(str(tmp_path / "cut.tar"))
    assert index.damage
    reader = ShardReader(str(tmp_path / "cut.tar"))
    with pytest.raises(ShardError):
        reader.row(index.count - 1)
    assert reader.row(0)["__key__"] == "00"
    with pytest.raises(RecordError, match=r"cut\.tar row \d, field \(whole row\): it cannot be read"):
        list(read_captions(stream_rows(str(tmp_path / "cut.tar")), "txt"))
    assert next(read_captions(stream_rows(str(tmp_path / "cut.tar")), "txt", skip_faulty=True)).id == "00"


# -- what data engines write ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_output(folder, tmp_path_factory):
    """Rows of an engine about the tars, in a folder below: no images, one row without a result."""
    from datasets import Dataset

    output = tmp_path_factory.mktemp("engine") / "ocr"
    output.mkdir()
    for shard in range(2):
        rows = [
            {"uid": None, "url": None, "key": f"{shard}{n}", "captions": json.dumps([[f"text {n}", 0, False]]),
             "error": None, "filtered_by": "safety" if n == 1 else None}
            for n in range(3)
        ]  # fmt: skip
        Dataset.from_list(rows).to_parquet(str(output / f"{shard}.parquet"))
    return output


def test_images_of_an_engines_rows_come_out_of_the_tars(engine_output, folder, image):
    records = list(read_ocr(stream_rows(str(engine_output / "*.parquet")), image_folder=str(folder)))
    assert [record.id for record in records] == ["00", "02", "10", "12"]
    assert records[2].images[0].shard == ImageShard(f"{folder}/1.tar")
    assert (
        records[2].images[0].open().size
        == rendered_record("caption", settings=settings_from(WORLD)).images[0].open().size
    )
    with object_store(folder) as (url, asked):
        records = list(read_ocr(stream_rows(str(engine_output / "1.parquet")), image_folder=url))
        assert records[0].images[0].size() == records[1].images[0].size()
        assert set(asked) == {"1.tar"}


def test_tars_in_folders_are_found_by_as_much_of_the_path_as_fits(tmp_path, image):
    for name in ("00.tar", "a/00.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, {name[0]: {"png": image}})
    assert shards.images_beside(str(tmp_path), "out/a/00.parquet") == ImageShard(f"{tmp_path}/a/00.tar")
    assert shards.images_beside(str(tmp_path), "out/00.parquet") == ImageShard(f"{tmp_path}/00.tar")
    assert shards.images_beside(str(tmp_path), "out/01.parquet") is None


def test_an_image_that_is_not_in_its_tar_is_named(engine_output, folder):
    record = next(read_ocr(stream_rows(str(engine_output / "0.parquet")), image_folder=str(folder)))
    missing = type(record.images[0])(path="99", shard=record.images[0].shard)
    with pytest.raises(RecordError, match=r"The image '99' in .*0\.tar.* does not exist"):
        missing.open()
    with pytest.raises(ValueError, match=r"An image in .*0\.tar has no JSON form"):
        missing.to_json()


def test_the_image_itself_goes_before_others_of_its_key(tmp_path, image):
    write_tar(tmp_path / "a.tar", {"0": {"seg.png": b"mask", "png": image, "txt": b"text"}})
    tar = ImageShard(str(tmp_path / "a.tar"))
    assert read_image(tar, "0") == read_image(tar, "0.png") == image
    assert read_image(tar, "0.seg.png") == b"mask"
    with pytest.raises(FileNotFoundError):
        read_image(tar, "0.txt")
