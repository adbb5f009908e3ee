# SPDX-License-Identifier: Apache-2.0
"""Published files of POPE, HallusionBench, VLGuard and COCO: read in their exact form, refused when malformed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from blip3.data.images import RecordError
from blip3.data.readers import read_coco, read_hallusionbench, read_pope, read_vlguard
from blip3.world import build
from blip3.world.settings import WorldSettings
from blip3.world.splits import split_of

WORLD = WorldSettings(sides=(60, 120), document_sides=(160, 200), fonts=("Aileron",))
COUNT = 8


@pytest.fixture(scope="module")
def look_alikes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each layout."""
    folders = {}
    for name, write in build.LAYOUTS.items():
        if name in ("pope", "hallusionbench", "vlguard"):
            folders[name] = tmp_path_factory.mktemp(name)
            write(folders[name], COUNT, 0, WORLD)
    return folders


# ------------------------------------------------------------------------------------------------------------ POPE


def test_pope_files_have_the_published_form(look_alikes):
    """Six questions an image, present and absent in turn; numbers, names and words as in the files of the authors."""
    for probe in ("random", "popular", "adversarial"):
        lines = (look_alikes["pope"] / f"coco_pope_{probe}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["question_id"] for row in rows] == list(range(1, 6 * COUNT + 1))
        assert {tuple(row) for row in rows} == {("question_id", "image", "text", "label")}
        assert [row["label"] for row in rows] == ["yes", "no"] * 3 * COUNT
        assert Counter(row["image"] for row in rows) == {
            f"COCO_val2014_{number:012d}.jpg": 6 for number in range(1, COUNT + 1)
        }
        assert all(row["text"].startswith(("Is there a ", "Is there an ")) for row in rows)
        for start in range(0, len(rows), 6):
            texts = [row["text"] for row in rows[start : start + 6]]
            assert len(set(texts)) == 6


def test_popular_negatives_are_the_most_frequent_absent_things(look_alikes):
    rows = [json.loads(line) for line in (look_alikes["pope"] / "coco_pope_popular.json").read_text().splitlines()]
    negatives = Counter(row["text"] for row in rows if row["label"] == "no")
    assert len(negatives) < len({row["text"] for row in rows if row["label"] == "yes"})


def test_pope_is_read(look_alikes):
    folder = look_alikes["pope"]
    records = list(read_pope(folder, folder / "val2014"))
    assert len(records) == 3 * 6 * COUNT
    assert len({record.id for record in records}) == len(records)
    first = records[0]
    assert first.turns[0].text.startswith("<image>\nIs there a")
    assert first.turns[1].text == first.annotations["label"] == "yes"
    assert first.annotations["probe"] == "random"
    assert first.images[0].open().size == first.images[0].size()[::-1]


def test_one_pope_file_is_enough_and_none_is_not(tmp_path):
    row = {"question_id": 7, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"}
    (tmp_path / "coco_pope_popular.json").write_text(json.dumps(row) + "\n\n")
    (record,) = read_pope(tmp_path, "images")
    assert (record.id, record.images[0].path) == ("popular-7", str(Path("images", "a.jpg")))
    with pytest.raises(FileNotFoundError, match=r"coco_pope_random\.json"):
        list(read_pope(tmp_path / "empty", "images"))


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "(whole row)"),
        ("[1]", "(whole row)"),
        ('{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "maybe"}', "label"),
        ('{"question_id": 1, "image": "a.jpg", "text": "Is it?"}', "label"),
        ('{"question_id": 1, "image": "", "text": "Is it?", "label": "yes"}', "image"),
        ('{"question_id": 1, "image": "a.jpg", "text": 3, "label": "yes"}', "text"),
        ('{"image": "a.jpg", "text": "Is it?", "label": "yes"}', "question_id"),
    ],
)
def test_a_malformed_pope_row_is_named(tmp_path, line, field):
    path = tmp_path / "coco_pope_random.json"
    good = '{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(RecordError) as caught:
        list(read_pope(tmp_path, "images"))
    assert caught.value.place == f"{path} row 2"
    assert caught.value.field == field
    assert len(list(read_pope(tmp_path, "images", skip_faulty=True))) == 1


# -------------------------------------------------------------------------------------------------- HallusionBench


def test_hallusionbench_is_read(look_alikes):
    """Half of the sets have an unseen figure 0 besides two seen ones; two questions each."""
    folder = look_alikes["hallusionbench"]
    records = list(read_hallusionbench(folder / "HallusionBench.json", folder))
    assert len(records) == COUNT // 2 * (2 + 3) * 2
    assert len({record.id for record in records}) == len(records)
    without = [record for record in records if not record.images]
    assert len(without) == COUNT // 2 * 2
    assert {(record.annotations["category"], record.annotations["figure_id"]) for record in without} == {("VS", "0")}
    assert all("<image>" not in record.turns[0].text for record in without)
    assert all(record.images[0].open() for record in records if record.images)
    assert Counter(record.turns[1].text for record in records) == {"yes": len(records) // 2, "no": len(records) // 2}


def test_figures_of_a_set_contradict_each_other(look_alikes):
    rows = json.loads((look_alikes["hallusionbench"] / "HallusionBench.json").read_text())
    answers: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["visual_input"] != "0":
            key = tuple(row[name] for name in ("category", "set_id", "question_id"))
            answers.setdefault(key, set()).add(row["gt_answer"])
    assert set(map(frozenset, answers.values())) == {frozenset("01")}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gt_answer": "2"}, "gt_answer"),
        ({"visual_input": None}, "visual_input"),
        ({"category": "XX"}, "category"),
        ({"filename": None}, "filename"),
        ({"figure_id": None}, "figure_id"),
        ({"question": ""}, "question"),
        ({"question": "Is it <image>?"}, "images"),
    ],
)
def test_a_malformed_hallusionbench_row_is_named(tmp_path, look_alikes, change, field):
    row = json.loads((look_alikes["hallusionbench"] / "HallusionBench.json").read_text())[0]
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps([row, row | change]))
    with pytest.raises(RecordError) as caught:
        list(read_hallusionbench(path, tmp_path))
    assert (caught.value.place, caught.value.field) == (f"{path} row 2", field)


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON"])
def test_a_file_that_is_no_list_is_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    for read in (read_hallusionbench, read_vlguard):
        with pytest.raises(RecordError, match="list of objects") as caught:
            list(read(path, tmp_path))
        assert caught.value.place == str(path)


# --------------------------------------------------------------------------------------------------------- VLGuard


def test_vlguard_is_read_in_its_three_subsets(look_alikes):
    folder = look_alikes["vlguard"]
    records = list(read_vlguard(folder / "test.json", folder / "test"))
    subsets = Counter(record.annotations["subset"] for record in records)
    assert subsets == {"unsafes": COUNT // 2, "safe_unsafes": COUNT // 2, "safe_safes": COUNT // 2}
    for record in records:
        assert record.annotations["is_unsafe"] == (record.annotations["subset"] != "safe_safes")
        assert (record.annotations["category"] is None) == (record.annotations["subset"] != "unsafes")
        assert record.images[0].open()


def test_a_safe_question_without_a_response_is_asked_all_the_same(tmp_path):
    """As 17 of the published test file are."""
    path = tmp_path / "test.json"
    pairs = [{"safe_instruction": "What is it?", "response": ""}, {"unsafe_instruction": "Do.", "response": "No."}]
    path.write_text(json.dumps([{"id": "a", "image": "a.png", "safe": True, "instr-resp": pairs}]))
    records = list(read_vlguard(path, tmp_path))
    assert [record.annotations["has_reference"] for record in records] == [False, True]
    assert [record.annotations["subset"] for record in records] == ["safe_safes", "safe_unsafes"]


@pytest.mark.parametrize("pairs", [[{"response": "no"}], [{"instruction": 3, "response": "no"}], ["text"], "text"])
def test_a_malformed_vlguard_row_is_named(tmp_path, pairs):
    path = tmp_path / "test.json"
    good = {"id": "a", "image": "a.png", "safe": False, "instr-resp": [{"instruction": "Do.", "response": "No."}]}
    path.write_text(json.dumps([good, good | {"instr-resp": pairs}]))
    with pytest.raises(RecordError) as caught:
        list(read_vlguard(path, tmp_path))
    assert caught.value.place == f"{path} row 2"
    assert caught.value.field == "instr-resp[0]"


# ------------------------------------------------------------------------------------------------------------ COCO


def write_coco(folder: Path) -> tuple[Path, Path]:
    """Two images, one of them without a caption."""
    instances = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 3},
        ],
    }
    captions = {
        "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "two.jpg"}],
        "annotations": [{"image_id": 1, "caption": "A dog. "}, {"image_id": 1, "caption": "A puppy and a bench."}],
    }
    paths = folder / "instances.json", folder / "captions.json"
    for path, values in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(values))
    return paths


def test_coco_is_read(tmp_path):
    (record,) = read_coco(*write_coco(tmp_path), tmp_path)
    assert record.annotations == {
        "image": "one.jpg",
        "objects": ["dog", "car"],
        "captions": ["A dog.", "A puppy and a bench."],
    }
    assert record.turns[1].text == "A dog."


def test_a_malformed_coco_row_is_named(tmp_path):
    instances, captions = write_coco(tmp_path)
    values = json.loads(instances.read_text())
    instances.write_text(json.dumps(values | {"annotations": [{"image_id": 1, "category_id": 99}]}))
    with pytest.raises(RecordError) as caught:
        list(read_coco(instances, captions, tmp_path))
    assert (caught.value.place, caught.value.field) == (f"{instances} annotations row 1", "category_id")
    instances.write_text(json.dumps({"annotations": []}))
    with pytest.raises(RecordError, match="categories"):
        list(read_coco(instances, captions, tmp_path))


# --------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["pope", "hallusionbench", "vlguard"])
def test_a_layout_follows_from_the_seed(name, look_alikes, tmp_path):
    files = build.LAYOUTS[name](tmp_path, COUNT, 0, WORLD)
    for path in files:
        assert path.read_bytes() == (look_alikes[name] / path.name).read_bytes()
    build.LAYOUTS[name](tmp_path / "other", COUNT, 1, WORLD)
    assert any(path.read_bytes() != (tmp_path / "other" / path.name).read_bytes() for path in files)


def test_codes_on_cards_are_held_out(look_alikes):
    cards = list(read_vlguard(look_alikes["vlguard"] / "test.json", look_alikes["vlguard"] / "test"))
    for record in cards:
        if record.annotations["subset"] == "safe_safes":
            assert split_of(f"string:{record.turns[1].text.casefold()}") == "held_out"


def test_the_command_writes_a_layout(tmp_path, capsys):
    assert build.main(["--layout", "pope", "--count", "2", "--output", str(tmp_path)]) == 0
    assert len(list(read_pope(tmp_path, tmp_path / "val2014"))) == 36
    with Image.open(tmp_path / "val2014" / "COCO_val2014_000000000002.jpg") as image:
        assert image.format == "JPEG"
    assert build.main(["--layout", "pope", "--count", "0", "--output", str(tmp_path)]) == 1
    assert "count is 0" in capsys.readouterr().err
