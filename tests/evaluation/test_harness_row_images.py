# SPDX-License-Identifier: Apache-2.0
"""Images that rows name by URL: opened, and copied into the rows for a machine without network."""

from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from blip3.evaluation.harness import row_images
from blip3.evaluation.harness.few_shot import Place
from blip3.evaluation.harness.row_images import check_has_images, copy_with_images, image_of

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


@pytest.fixture
def named(tmp_path, monkeypatch) -> Path:
    """A folder whose rows name images: as files by their URL, and one by its path."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    urls = []
    for number, colour in enumerate(COLOURS):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (6, 4), colour).save(path)
        urls.append(path.as_uri() if number else str(path))
    folder = tmp_path / "named"
    folder.mkdir()
    rows = {"url": urls, "sentences": [["a"], ["b"], ["c"]], "imgid": [1, 2, 3]}
    Dataset.from_dict(rows).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return folder


def test_an_image_is_opened_where_the_row_has_it_or_names_it(named):
    rows = load_dataset(str(named), split="test")
    assert [image_of(row).getpixel((0, 0)) for row in rows] == COLOURS
    own = Image.new("RGB", (1, 1), "white")
    assert image_of({"image": own, "url": "nowhere"}) is own


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": None, "imgid": 1}, "has the columns image, imgid but no image and no url"),
        ({"url": "file:///no/such.png"}, "file:///no/such.png is named by a row but cannot be read .*row_images"),
        ({"url": "no-such.png"}, "The image no-such.png is named by a row but cannot be read"),
    ],
)
def test_an_image_that_is_not_there_is_named(row, message):
    with pytest.raises((ValueError, OSError), match=message):
        image_of(row)


def test_a_data_set_without_images_is_refused():
    with pytest.raises(ValueError, match=r"here has the columns question but neither image nor url"):
        check_has_images(Dataset.from_dict({"question": ["a"]}), Place("here", "test"))


def test_a_copy_holds_the_images_and_the_other_columns(named, tmp_path, monkeypatch):
    output = tmp_path / "owner" / "copy"
    written = copy_with_images(Place(str(named), "test"), output, rows_of_a_file=2)
    assert [path.name for path in written] == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    rows = load_dataset("owner/copy", split="test")
    assert [image_of(row).getpixel((0, 0)) for row in rows] == COLOURS
    assert rows["sentences"] == [["a"], ["b"], ["c"]]
    assert rows["imgid"] == [1, 2, 3]


def test_a_copy_goes_on_after_an_interruption(named, tmp_path, capsys):
    line = [str(named), "--split", "test", "--output", str(tmp_path / "copy")]
    assert row_images.main(line) == 0
    (path,) = (tmp_path / "copy").glob("*.parquet")
    before = path.stat().st_mtime_ns
    for image in tmp_path.glob("*.png"):
        image.unlink()
    assert row_images.main(line) == 0  # nothing is fetched again
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert row_images.main(line) == 1
    assert "0.png is named by a row but cannot be read" in capsys.readouterr().err
    assert not list((tmp_path / "copy").glob("*.parquet"))


def write_named(folder: Path, image: Path, captions: list[str]) -> Place:
    """Rows that all name one image."""
    rows = [
        {"imgid": row, "url": image.as_uri(), "score": float("nan"), "sentences": [caption]}
        for row, caption in enumerate(captions)
    ]
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return Place(str(folder), "test")


@pytest.mark.parametrize(
    "captions", [list("abcde"), list("ab"), list("abx"), ["x", "b", "c"]], ids=["more", "fewer", "last", "first"]
)
def test_rows_of_another_source_are_not_mixed_with_those_of_the_folder(captions, named, tmp_path):
    """Parts of another number of files would be read, too; and parts of as many rows would be kept as they are."""
    first = write_named(tmp_path / "first", tmp_path / "1.png", list("abc"))
    other = write_named(tmp_path / "other", tmp_path / "1.png", captions)
    before = {path: path.read_bytes() for path in copy_with_images(first, tmp_path / "copy", 2)}
    with pytest.raises(ValueError, match=r"is in the folder, but .*other has other rows for the split test \("):
        copy_with_images(other, tmp_path / "copy", 2)
    assert {path: path.read_bytes() for path in (tmp_path / "copy").glob("*.parquet")} == before
    assert copy_with_images(first, tmp_path / "copy", 2) == list(before)  # the same rows go on


def test_other_splits_stay_where_they_are(named, tmp_path):
    """One of a name that begins alike, too."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "test-large-00000-of-00009.parquet").write_bytes(b"")
    assert len(copy_with_images(Place(str(named), "test"), tmp_path / "copy")) == 1


def test_a_page_in_the_place_of_an_image_is_refused(named, tmp_path):
    (tmp_path / "1.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"1.png has 22 bytes that are no image.*probably sent a page"):
        copy_with_images(Place(str(named), "test"), tmp_path / "copy")


def test_a_data_set_that_holds_its_images_needs_no_copy(named, tmp_path):
    copy_with_images(Place(str(named), "test"), tmp_path / "copy")
    with pytest.raises(ValueError, match="It probably holds its images already: fetch it with hf download"):
        copy_with_images(Place(str(tmp_path / "copy"), "test"), tmp_path / "again")
