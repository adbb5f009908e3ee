# SPDX-License-Identifier: Apache-2.0
"""Rows, files and images that are damaged or made to harm: one error names each, or they are skipped and counted."""

import copy
import io
import json
import pickle
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3.data.images import MAX_PIXELS, ImageSource, RecordError
from blip3.data.readers import (
    read_captions,
    read_coco,
    read_fusions,
    read_grounding,
    read_hallusionbench,
    read_interleaved,
    read_json_rows,
    read_llava_json,
    read_ocr,
    read_pope,
    read_preferences,
    read_rows,
    read_safety,
    read_vlguard,
    stream_rows,
)
from blip3.data.records import read_jsonl


def encoded(format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, format, **options)
    return buffer.getvalue()


RATINGS = {name: {"Rating": "5"} for name in ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")}
WORSE = {name: {"Rating": "1"} for name in RATINGS}
CAPTIONS = [["A cat.", 0, False], ["A cat (in the center)", 1, True]]
TURNS = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A cat."}]
ROWS = {
    "fusions": {"key": "k", "image": encoded(), "alt_text": "cat.jpg", "caption": "A cat."},
    "captions": {"uid": "a", "image": encoded(), "caption": "A cat."},
    "ocr": {"uid": "a", "key": "k", "image": {"bytes": encoded(), "path": None}, "captions": json.dumps(CAPTIONS)},
    "grounding": {"uid": "a", "image": "a.png", "captions": repr(CAPTIONS)},
    "aligned": {"id": "a", "images": [None, encoded()], "texts": ["One.", None]},
    "matched": {"text_list": ["One.", "Two."], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
    "preferences": {
        "id": "a",
        "prompt": "What?",
        "img_path": "a.png",
        "completions": [
            {"annotations": RATINGS, "model": "m", "response": "A cat."},
            {"annotations": WORSE, "model": "n", "response": "A dog."},
        ],
    },
    "safety": {
        "id": "a",
        "image": "a.png",
        "safe": True,
        "harmful_category": "privacy",
        "instr-resp": [{"safe_instruction": "What?", "response": "A cat."}],
    },
    "rows": {"id": "a", "kind": "instruction", "images": [encoded()], "turns": TURNS, "truth": '{"answer": 1}'},
    "llava": {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    "records": {"id": "a", "kind": "instruction", "images": ["a.png"], "turns": TURNS, "truth": {"answer": [1]}},
    "pope": {"question_id": 1, "image": "a.png", "text": "A cat?", "label": "yes"},
    "hallusionbench": {
        "category": "VD",
        "subcategory": "chart",
        "visual_input": "1",
        "set_id": "0",
        "figure_id": "1",
        "question_id": "2",
        "filename": "./a.png",
        "question": "Is it?",
        "gt_answer": "1",
        "gt_answer_details": "It is.",
    },
    "vlguard": {"id": "a", "image": "a.png", "safe": False, "instr-resp": [{"instruction": "Do.", "response": ""}]},
}


def in_file(name, make):
    """Read a row from a file that has it, as bytes of JSON."""

    def read(rows, folder, skip_faulty):
        path = folder / name
        path.write_bytes(make([json.dumps(row).encode("utf-8", "surrogatepass") for row in rows]))
        return path

    return read


def listed(lines):
    return b"[" + b",".join(lines) + b"]"


def in_memory(reader, **options):
    return lambda rows, folder, skip: reader(rows, skip_faulty=skip, **options)


def of_file(reader, name, make, *others):
    write = in_file(name, make)
    return lambda rows, folder, skip: reader(write(rows, folder, skip), *others, skip_faulty=skip)


def read_pope_rows(rows, folder, skip):
    in_file("coco_pope_random.json", b"\n".join)(rows, folder, skip)
    return read_pope(folder, "images", skip_faulty=skip)


READERS = {
    "captions": in_memory(read_captions),
    "fusions": in_memory(read_fusions),
    "ocr": in_memory(read_ocr, granularities=None),
    "grounding": in_memory(read_grounding),
    "aligned": in_memory(read_interleaved),
    "matched": in_memory(read_interleaved),
    "preferences": in_memory(read_preferences),
    "safety": in_memory(read_safety),
    "rows": in_memory(read_rows),
    "llava": of_file(read_llava_json, "a.json", listed),
    "records": of_file(read_jsonl, "a.jsonl", b"\n".join),
    "pope": read_pope_rows,
    "hallusionbench": of_file(read_hallusionbench, "h.json", listed, "images"),
    "vlguard": of_file(read_vlguard, "v.json", listed, "images"),
}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("\udc80\ud800"),
    st.just("<|end|>"), st.just("\0"), st.just(10**400), st.just("[" * 3000), st.builds(nested, st.just(60)),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside), max_leaves=4
)


def places_in(value, path=()):
    """Every place in a row, the row itself too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places_in(inside, (*path, key))


@st.composite
def mutated(choose, row):
    """A good row with one to three places removed, replaced, doubled or given another name."""
    row = copy.deepcopy(row)
    for _ in range(choose(st.integers(1, 3))):
        path = choose(st.sampled_from(list(places_in(row))))
        if not path:
            if choose(st.integers(0, 9)) == 0:
                return copy.deepcopy(choose(VALUES))
            continue
        holder = row
        for key in path[:-1]:
            holder = holder[key]
        change = choose(st.sampled_from(["remove", "replace", "rename", "wrap", "cut"]))
        value = holder[path[-1]]
        if change == "remove":
            del holder[path[-1]]
        elif change == "rename" and isinstance(holder, dict):
            holder["other"] = holder.pop(path[-1])
        elif change == "wrap":
            holder[path[-1]] = [value]
        elif change == "cut" and isinstance(value, str | bytes | list):
            holder[path[-1]] = value[: len(value) // 2]
        else:
            holder[path[-1]] = copy.deepcopy(choose(VALUES))
    return row


@pytest.mark.parametrize("form", READERS)
def test_a_good_row_of_every_form_is_read(form, tmp_path):
    assert [record.id for record in READERS[form]([ROWS[form]], tmp_path, False)]


def read_or_error(read, rows, folder):
    try:
        return list(read(rows, folder, False))
    except RecordError as error:
        return error


@pytest.mark.parametrize("form", READERS)
def test_a_mutated_row_is_read_or_named_and_skipped(form, tmp_path):
    good = len(list(READERS[form]([ROWS[form]], tmp_path, False)))

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(ROWS[form]))
    def check(row):
        found = read_or_error(READERS[form], [row, ROWS[form]], tmp_path)
        if isinstance(found, RecordError):
            assert found.field
            assert found.place in str(found)
        assert len(list(READERS[form]([row, ROWS[form]], tmp_path, True))) >= good

    check()


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("row", [None, 7, "text", [], [1], True, nested(5)], ids=str)
def test_what_is_no_row_is_named(form, row, tmp_path):
    with pytest.raises(RecordError, match=r"field \((whole (row|file|record)|entry)\)"):
        list(READERS[form]([row], tmp_path, False))
    assert list(READERS[form]([row, ROWS[form]], tmp_path, True))


@pytest.mark.parametrize(
    ("form", "field", "value"),
    [
        ("captions", "caption", 7),
        ("captions", "caption", b"\xff\xfe"),
        ("captions", "uid", {"a": 1}),
        ("fusions", "alt_text", ["cat"]),
        ("ocr", "captions", "[" * 5000),
        ("ocr", "captions", {"a": 1}),
        ("aligned", "images", 3),
        ("aligned", "texts[0]", [["nested"], None]),
        ("matched", "image_info[0]", [7]),
        ("preferences", "completions[0]", ["text"]),
        ("preferences", "completions", {"response": ["a", "b"], "annotations": [1]}),
        ("preferences", "completions[0].annotations", [{"response": "a", "annotations": 7}]),
        ("rows", "truth", "{"),
        ("rows", "images", 7),
        ("llava", "conversations", 7),
        ("llava", "conversations[0]", [7]),
        ("llava", "id", [1]),
        ("records", "id", ""),
        ("records", "turns[0].text", [{"role": "user", "text": "\ud800"}, TURNS[1]]),
        ("pope", "question_id", []),
        ("hallusionbench", "set_id", {}),
    ],
)
def test_the_field_at_fault_is_named(form, field, value, tmp_path):
    row = ROWS[form] | {field.partition("[")[0].partition(".")[0]: value}
    with pytest.raises(RecordError) as caught:
        list(READERS[form]([row], tmp_path, False))
    assert caught.value.field == field


def test_a_list_that_is_cut_keeps_what_stands_before(tmp_path, caplog):
    text = json.dumps([ROWS["llava"] | {"id": str(number)} for number in range(5)], indent=1)
    (tmp_path / "a.json").write_text(text[: len(text) * 7 // 10])
    with pytest.raises(RecordError, match=r"a\.json line \d+, field \(entry 4 and the rest\): it is no JSON"):
        list(read_llava_json(tmp_path / "a.json"))
    assert [record.id for record in read_llava_json(tmp_path / "a.json", skip_faulty=True)] == ["0", "1", "2"]
    assert "Skipped 1 faulty rows" in caplog.text


def test_bytes_that_are_no_text_are_named_by_field(tmp_path):
    line = json.dumps(ROWS["llava"]).encode()
    (tmp_path / "a.jsonl").write_bytes(line.replace(b"A cat", b"A c\xe9t") + b"\n" + line + b"\n{\xff\n")
    with pytest.raises(RecordError, match=r"entry 1 .*field turns\[1\]\.text.*no UTF-8|entry 1.*no UTF-8"):
        list(read_llava_json(tmp_path / "a.jsonl"))
    assert len(list(read_llava_json(tmp_path / "a.jsonl", skip_faulty=True))) == 1
    assert isinstance(read_json_rows(tmp_path / "a.jsonl")[2], RecordError)


def test_a_deep_row_is_no_crash(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n" + json.dumps(ROWS["records"]) + "\n")
    with pytest.raises(RecordError, match=r"a\.jsonl line 1"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert len(list(read_jsonl(tmp_path / "a.jsonl", skip_faulty=True))) == 1


def test_a_damaged_shard_is_named_and_the_next_one_follows(tmp_path):
    from datasets import Dataset

    for number in range(3):
        rows = [{"uid": f"{number}-{row}", "image": encoded(), "caption": "A cat."} for row in range(4)]
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{number}.parquet"))
    whole = (tmp_path / "1.parquet").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>", whole[:60] + bytes(200) + whole[260:]):
        (tmp_path / "1.parquet").write_bytes(damaged)
        with pytest.raises(RecordError, match=r"1\.parquet row 1, field"):
            list(read_captions(stream_rows(str(tmp_path / "*.parquet"))))
        ids = [r.id for r in read_captions(stream_rows(str(tmp_path / "*.parquet")), skip_faulty=True)]
        others = [each for each in ids if not each.startswith("1-")]
        assert others == [f"{number}-{row}" for number in (0, 2) for row in range(4)]


def coco_files(folder, **changes):
    marked = {"categories": [{"id": 1, "name": "cat"}], "annotations": [{"image_id": 5, "category_id": 1}]}
    described = {"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [{"image_id": 5, "caption": "A cat."}]}
    (folder / "i.json").write_text(json.dumps(marked | changes.get("marked", {})))
    (folder / "c.json").write_text(json.dumps(described | changes.get("described", {})))
    return folder / "i.json", folder / "c.json", "images"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"marked": {"categories": 7}}, "categories"),
        ({"marked": {"categories": [{"id": [1], "name": "cat"}]}}, "id"),
        ({"marked": {"annotations": [{"image_id": 5, "category_id": {}}]}}, "category_id"),
        ({"marked": {"annotations": [{"image_id": 5, "category_id": 9}]}}, "category_id"),
        ({"described": {"images": [{"id": 5, "file_name": 7}]}}, "file_name"),
        ({"described": {"annotations": ["text"]}}, "(whole row)"),
    ],
    ids=str,
)
def test_coco_files_name_row_and_field(changes, field, tmp_path):
    with pytest.raises(RecordError) as caught:
        list(read_coco(*coco_files(tmp_path, **changes)))
    assert caught.value.field == field
    assert len(list(read_coco(*coco_files(tmp_path)))) == 1
    if field != "categories":
        list(read_coco(*coco_files(tmp_path, **changes), skip_faulty=True))


# ------------------------------------------------------------------------------------------------------------ images


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b""
    for name, data in chunks:
        body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + body


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
BAD_IMAGES = {
    "cut": encoded("JPEG")[:300],
    "cut png": encoded()[:60],
    "page": b"<!DOCTYPE html><html>404</html>",
    "bomb": png_of_size(50_000, 50_000),
    "large": png_of_size(2**14, 2**13 + 1),
    "no rows": png_of_size(0, 10),
    "program": POSTSCRIPT,
    "icon": encoded("ICO"),
    "damaged header": encoded("TIFF")[:8] + b"\xff" * 40,
    "damaged gif": b"GIF89a" + b"\xff" * 30,
    "damaged webp": encoded("WEBP")[:20] + b"\0" * 30,
    "nothing": b" ",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_raise_one_error(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(BAD_IMAGES[name])
    for image in (ImageSource(data=BAD_IMAGES[name]), ImageSource("a.jpg")):
        with pytest.raises(RecordError, match=r"cannot be decoded: .* It was probably cut off") as caught:
            image.open(tmp_path)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.field) == (str(caught.value), "images")


def test_what_is_no_file_raises_the_same_error(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "x" * 5000, "a\0b", "gone.png", "\udcff.png"):
        with pytest.raises(RecordError, match="The image"):
            ImageSource(name).open(tmp_path)
        with pytest.raises(RecordError, match="The image"):
            ImageSource(name).size(tmp_path)


@pytest.mark.parametrize("format", ["AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_what_data_sets_hold_opens(format):
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow cannot write AVIF")
    assert ImageSource(data=encoded(format)).open().size == (40, 30)


def test_the_bound_is_of_pixels():
    assert MAX_PIXELS > 100e6
    assert ImageSource(data=png_of_size(2**14, 2**13)).size() == (2**13, 2**14)


@pytest.mark.parametrize(
    "change",
    [
        {"size": [10**9, 10]},
        {"size": [True, 10]},
        {"size": 7},
        {"background": ["plain", 7]},
        {"background": [["plain"], "#ffffff"]},
        {"marks": [["shape", "circle", "#ff0000", [0, 0], 10**9]]},
        {"marks": [["shape", ["circle"], "#ff0000", [0, 0], 10]]},
        {"marks": [["text", "A", "Aileron", 10**7, "#000000", [0, 0]]]},
        {"marks": [["box", [0, 0, 1], "#000000"]]},
        {"marks": [[["box"]]]},
        {"marks": 7},
        {"marks": [[]]},
    ],
    ids=str,
)
def test_drawings_that_cannot_be_are_named(change, tmp_path):
    drawing = {"size": [20, 20], "background": ["plain", "#ffffff"], "marks": []} | change
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS["records"] | {"images": [{"drawing": drawing}]}))
    with pytest.raises(RecordError, match=r"a\.jsonl line 1, field images\[0\]\.drawing"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_a_drawing_with_no_colour_is_named_when_it_is_painted(tmp_path):
    drawing = {"size": [20, 20], "background": ["plain", "no colour"], "marks": []}
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS["records"] | {"images": [{"drawing": drawing}]}))
    (record,) = read_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match="cannot be painted"):
        record.images[0].open()
