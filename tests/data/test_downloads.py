# SPDX-License-Identifier: Apache-2.0
"""Images by URL in what img2dataset writes, and the documents whose images are named so or lie in a TIFF."""

import io
import json

import pytest
from PIL import Image

from blip3.data.downloads import downloads_in, identity_of_downloads
from blip3.data.images import RecordError
from blip3.data.readers import read_captions, read_interleaved, read_llava_json, stream_rows
from blip3.data.records import to_pretraining_text
from blip3.data.shards import ImageShard
from blip3.training.mixture import Mixture
from support import object_store, write_tar

SIDES = {"https://a.b/c.jpg": 21, "https://a.b/d.jpg?size=2&x=é": 22, "http://e.f/g": 23}
GONE = "https://a.b/gone.jpg"
FORMS = ("tar", "tar alone", "files", "parquet", "in folders")


def encoded(side: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, format)
    return buffer.getvalue()


def download(folder, form: str) -> str:
    """Write what img2dataset writes of the URLs above, two to a shard, the second shard with one that was gone."""
    from datasets import Dataset

    urls = [*SIDES, GONE]
    for shard in range(2):
        below = folder / f"part-{shard}" if form == "in folders" else folder
        below.mkdir(exist_ok=True)
        rows, samples = [], {}
        for number, url in enumerate(urls[2 * shard : 2 * shard + 2]):
            key = f"{shard:05}{number:04}"
            image = None if url == GONE else encoded(SIDES[url])
            row = {"url": url, "key": key, "status": "success" if image else "failed_to_download", "caption": "A."}
            rows.append(row | ({"jpg": image} if form == "parquet" else {}))
            if image:
                samples[key] = {"jpg": image, "json": json.dumps(row).encode(), "txt": b"A."}
        if form != "tar alone":
            Dataset.from_list(rows).to_parquet(str(below / f"{shard:05}.parquet"))
        if form == "files":
            (folder / f"{shard:05}").mkdir()
            for key, files in samples.items():
                (folder / f"{shard:05}" / f"{key}.jpg").write_bytes(files["jpg"])
        elif form != "parquet":
            write_tar(below / f"{shard:05}.tar", samples)
    return str(folder)


@pytest.mark.parametrize("form", FORMS)
def test_images_are_found_by_their_url(form, tmp_path):
    folder = download(tmp_path, form)
    assert len(downloads_in(folder)) == 3
    row = {"images": [*SIDES, None], "texts": [None, None, None, "Three of them."], "metadata": "[]"}
    (record,) = read_interleaved([row], image_folder=folder)
    assert [image.open().width for image in record.images] == list(SIDES.values())
    (record,) = read_captions([{"url": "http://e.f/g", "key": "x", "caption": "A."}], image_folder=folder)
    assert record.images[0].open().width == 23
    with pytest.raises(RecordError, match=r"field url: it is .*gone.* not among the 3 that img2dataset downloaded"):
        list(read_captions([{"url": GONE, "key": "x", "caption": "A."}], image_folder=folder))


def test_downloads_in_an_object_store_are_looked_through_once(tmp_path):
    download(tmp_path, "tar")
    with object_store(tmp_path) as (url, asked):
        found = downloads_in(url)
        assert found.find("http://e.f/g") == ("000010000", ImageShard(f"{url}/00001.tar"))
        asked.clear()
        assert downloads_in(url) is found
        assert not asked


def test_what_was_added_is_found(tmp_path):
    download(tmp_path, "tar")
    before = identity_of_downloads(str(tmp_path))
    write_tar(tmp_path / "00001.tar", {})
    identity_of_downloads.cache_clear()
    assert identity_of_downloads(str(tmp_path)) == before, "the parquet files say what there is"
    (tmp_path / "00001.parquet").unlink()
    identity_of_downloads.cache_clear()
    assert len(downloads_in(str(tmp_path))) == 2


def test_a_document_keeps_the_images_that_could_be_downloaded(tmp_path):
    folder = download(tmp_path, "tar")
    row = {"images": [GONE, None, "http://e.f/g", None], "texts": [None, "One.", None, "Two."]}
    (record,) = read_interleaved([row], image_folder=folder)
    assert to_pretraining_text(record) == "One.<|endofchunk|><image>Two.<|endofchunk|>"
    with pytest.raises(RecordError, match=r"images\[0\]: it is .*gone.*not among the 3"):
        list(read_interleaved([{"images": [GONE, None], "texts": [None, "One."]}], image_folder=folder))


def test_images_that_were_never_downloaded_are_named(tmp_path):
    row = {"images": ["https://a.b/c.jpg", None], "texts": [None, "One."]}
    with pytest.raises(RecordError, match=r"img2dataset wrote nothing into .*Download the images"):
        list(read_interleaved([row], image_folder=str(tmp_path)))
    with pytest.raises(RecordError, match="no folder of images is named"):
        list(read_interleaved([row]))


def test_a_source_without_its_images_ends_the_run_whatever_the_others_do(tmp_path):
    """OBELICS and captions with their images: nobody notices that there are no documents."""
    from datasets import Dataset

    rows = [{"images": [f"https://a.b/{n}.jpg", None], "texts": [None, f"Text {n}."]} for n in range(60)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "obelics.parquet"))
    captions = [{"key": str(n), "image": {"bytes": encoded(20), "path": None}, "caption": "A."} for n in range(60)]
    Dataset.from_list(captions).to_parquet(str(tmp_path / "captions.parquet"))
    documents = {"stream": str(tmp_path / "obelics.parquet"), "reader": "interleaved", "images": str(tmp_path)}
    entries = [documents, {"stream": str(tmp_path / "captions.parquet"), "reader": "captions"}]
    mixture = Mixture(entries, 100, 0, {}, skip_faulty=True)
    with pytest.raises(ValueError, match=r"Of 50 samples of .*obelics.parquet 50 cannot be used.*Download the images"):
        mixture.count_streams()


# -- documents with their images in a TIFF ----------------------------------------------------------------------------


def tiff(*sides: int) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.new("RGB", (side, side)) for side in sides]
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    return buffer.getvalue()


def document(names: list, xrefs: list[int]) -> bytes:
    metadata = [{"page": 0, "xref": xref, "width": 9, "height": 9, "sha256": "0"} for xref in xrefs]
    texts = [None if name else "Text." for name in names]
    return json.dumps({"texts": texts, "images": names, "image_metadata": metadata, "pdf_name": "a"}).encode()


def test_documents_of_pdf_files_are_read_from_webdataset(tmp_path):
    """The frames of the TIFF lie in the order of `image_metadata`."""
    names = [None, "page_0_image_7", None, "page_0_image_5", None]
    samples = {
        "aa": {"json": document(names, [5, 7]), "tiff": tiff(25, 27)},
        "bb": {"json": document(names, []), "tiff": tiff(31, 32)},
        "cc": {"json": document([None], []), "tiff": tiff(31)},
        "dd": {"json": document(names, [5, 7]), "tiff": tiff(25, 27, 29)},
    }
    write_tar(tmp_path / "a.tar", samples)
    records = list(read_interleaved(stream_rows(str(tmp_path / "a.tar"))))
    assert [record.id for record in records] == ["aa", "bb", "dd"]
    assert to_pretraining_text(records[0]) == "Text.<|endofchunk|><image>Text.<|endofchunk|><image>Text.<|endofchunk|>"
    assert [[image.open().width for image in record.images] for record in records[:2]] == [[27, 25], [31, 32]]
    assert records[0].images[0].size() == (27, 27)
    with pytest.raises(RecordError, match="it has 3 images, but its document names 2"):
        records[2].images[0].open()
    write_tar(tmp_path / "b.tar", {"aa": {"json": document(names, [5, 7])}})
    with pytest.raises(RecordError, match="field tiff: it is missing"):
        list(read_interleaved(stream_rows(str(tmp_path / "b.tar"))))


# -- what is no record ------------------------------------------------------------------------------------------------


def test_documents_with_nothing_to_learn_are_no_records(tmp_path):
    """img2dataset writes an empty file where a URL has no caption."""
    write_tar(tmp_path / "a.tar", {str(n): {"jpg": encoded(20), "txt": b" \n" if n else b"A."} for n in range(2)})
    assert [each.id for each in read_captions(stream_rows(str(tmp_path / "a.tar")), "txt", skip_faulty=True)] == ["0"]
    with pytest.raises(RecordError, match=r"row 2.*field turns: their only text is <image>.*was probably empty"):
        list(read_captions(stream_rows(str(tmp_path / "a.tar")), "txt"))
    with pytest.raises(RecordError, match="their only text is <image>"):
        list(read_interleaved([{"images": [encoded(20)], "texts": [None]}]))


def test_conversations_of_mmdu(tmp_path):
    """They write another placeholder, and paths with a slash in front."""
    turns = [
        {"from": "user", "value": "Image1: <ImageHere>\nImage2: <ImageHere>\nCompare them."},
        {"from": "assistant", "value": "They differ."},
    ]
    paths = ["/mmdu-45k_pics/a.jpg", "/mmdu-45k_pics/b.jpg"]
    (tmp_path / "mmdu.json").write_text(json.dumps([{"id": 1, "image": paths, "conversations": turns}]))
    (record,) = read_llava_json(tmp_path / "mmdu.json", "images/mmdu")
    assert record.turns[0].text == "Image1: <image>\nImage2: <image>\nCompare them."
    assert [image.path for image in record.images] == [f"images/mmdu{path}" for path in paths]
    (tmp_path / "mmdu.json").write_text(
        json.dumps([{"id": 1, "image": [str(tmp_path / "mmdu.json")] * 2, "conversations": turns}])
    )
    (record,) = read_llava_json(tmp_path / "mmdu.json", "images/mmdu")
    assert record.images[0].path == str(tmp_path / "mmdu.json"), "a file that is there keeps its place"
