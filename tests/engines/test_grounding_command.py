# SPDX-License-Identifier: Apache-2.0
"""From the command's options to rows, and from rows to a training run."""

import argparse
import ast
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from blip3.engines.grounding.boxes_file import FileBoxes
from blip3.engines.grounding.command import add_options, licence_of, plan, read_synonyms, read_thresholds, verify
from blip3.engines.stages import EnginePlan, Sample
from blip3.training.train import train
from blip3.world.tasks import rendered_records
from support import render_image
from support.detectors import WORDS, run_stages, write_grounding_dino
from support.training import make_small_model, share_of_loss_left, tiny_recipe

DOG = {"text": "dog", "bbox": [0.1, 0.2, 0.5, 0.6], "confidence": 0.8}
BALL = {"text": "ball", "bbox": [0.6, 0.7, 0.9, 0.95], "confidence": 0.6}


def options_of(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([str(word) for word in words])


def plan_of(*words: object) -> EnginePlan:
    return plan(options_of(*words))


def stages_of(made: EnginePlan) -> list[str]:
    return [spec.stage.__name__ for spec in made.stages]


def write_boxes(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ---------------------------------------------------------------------------------------------------- boxes of a file


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["boxes.parquet", "boxes.jsonl"])
def test_boxes_of_a_file(tmp_path, name, as_text):
    entries = [[DOG, BALL], [DOG], []]
    rows = [
        {"key": f"k{number}", "entries": json.dumps(its) if as_text else its} for number, its in enumerate(entries)
    ]
    stage = FileBoxes(str(write_boxes(tmp_path / name, rows)))
    values = stage([Sample(key, b"") for key in ("k1", "k0", "k2", "other")], [])
    assert values[:3] == [
        {"entries": [DOG], "tags": ["dog"]},
        {"entries": [DOG, BALL], "tags": ["dog", "ball"]},
        {"entries": [], "tags": []},
    ]
    assert values[3] == {"error": "The file of boxes has no row with the key 'other'."}


def test_boxes_in_pixels_of_images_by_uid(tmp_path):
    rows = [{"uid": "u", "entries": [{"text": "dog", "bbox": [10, 10, 50, 30]}]}]
    stage = FileBoxes(str(write_boxes(tmp_path / "boxes.jsonl", rows)), "uid", "pixels")
    assert stage.needs_images
    (values,) = stage([Sample("k", b"", uid="u")], [render_image(50, 100)])
    assert values["entries"] == [{"text": "dog", "bbox": [0.1, 0.2, 0.5, 0.6], "confidence": 1.0}]


@pytest.mark.parametrize("name", ["boxes.parquet", "boxes.jsonl"])
@pytest.mark.parametrize("kind", [int, float, str])
def test_names_are_compared_as_text(tmp_path, name, kind):
    rows = [{"key": kind(key), "entries": json.dumps([DOG])} for key in (7, 12)]
    values = FileBoxes(str(write_boxes(tmp_path / name, rows)))([Sample("12", b""), Sample("8", b"")], [])
    assert values[0] == {"entries": [DOG], "tags": ["dog"]}
    assert "no row with the key '8'" in values[1]["error"]


@pytest.mark.parametrize("name", ["boxes.parquet", "boxes.jsonl"])
def test_boxes_in_pixels_that_are_not_called_so_are_refused(tmp_path, name):
    rows = [{"key": str(number), "entries": [{"text": "dog", "bbox": [10, 10, 50, 30]}]} for number in range(3)]
    path = write_boxes(tmp_path / name, rows)
    with pytest.raises(ValueError, match=r"boxes such as \[10\.0, .*say so with --boxes-unit pixels"):
        plan_of("--boxes", path)
    assert plan_of("--boxes", path, "--boxes-unit", "pixels").stages
    fine = [{"key": key, "entries": [DOG]} for key in "abcd"]
    stage = FileBoxes(str(write_boxes(tmp_path / name, [*fine, *rows])))
    values = stage([Sample("a", b""), Sample("1", b"")], [])
    assert values[0]["entries"] == [DOG]
    assert "--boxes-unit pixels" in values[1]["error"]
    slight = write_boxes(tmp_path / name, [{"key": "a", "entries": [{**DOG, "bbox": [-0.1, 0, 1.2, 1]}]}])
    assert "error" not in FileBoxes(str(slight))([Sample("a", b"")], [])[0]


@pytest.mark.usefixtures("any_inflect")
def test_images_without_a_row_may_have_no_boxes(tmp_path):
    path = write_boxes(tmp_path / "boxes.jsonl", [{"key": "a", "entries": [DOG]}])
    made = plan_of("--boxes", path, "--boxes-missing", "none")
    rows = run_stages(made, [Sample("a", b""), Sample("b", b"")], [])
    assert "captions" in rows[0]
    assert (rows[1].get("error"), rows[1]["filtered_by"]) == (None, "no_box")
    assert made.settings != plan_of("--boxes", path).settings


@pytest.mark.usefixtures("any_inflect")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((), ["dog", "ball", "cat"]),
        (("--threshold", 0.7), ["dog", "cat"]),
        (("--tag-thresholds", "{limits}"), ["ball", "cat"]),
        (("--threshold", 0.85, "--tag-thresholds", "{limits}"), ["cat"]),
    ],
)
def test_thresholds_hold_for_boxes_of_a_file_where_they_have_a_confidence(tmp_path, given, kept):
    entries = [DOG, BALL, {"text": "cat", "bbox": [0, 0, 0.2, 0.2]}]
    path = write_boxes(tmp_path / "boxes.jsonl", [{"key": "a", "entries": entries}])
    (tmp_path / "limits.txt").write_text("Dog: 0.9\n")
    made = plan_of("--boxes", path, *(str(word).format(limits=tmp_path / "limits.txt") for word in given))
    (row,) = run_stages(made, [Sample("a", b"")], [])
    assert sorted(entry["text"] for entry in json.loads(row["metadata"])["entries"]) == sorted(kept)
    assert (made.settings == plan_of("--boxes", path).settings) == (not given)


@pytest.mark.parametrize("line", ['{"key": "b", "entries": [', "[1, 2]", "7"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "boxes.jsonl"
    path.write_text('{"key": "a", "entries": []}\n\n' + line)
    with pytest.raises(ValueError, match=r"boxes\.jsonl has in line 3 .*each line is a JSON object"):
        FileBoxes(str(path))


def test_only_a_line_feed_ends_a_line_of_boxes(tmp_path):
    entry = {**DOG, "text": "dog\u2028of Ana"}
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps({"key": "a\u2028b", "entries": [entry]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert FileBoxes(str(path))([Sample("a\u2028b", b"")], []) == [{"entries": [entry], "tags": ["dog\u2028of Ana"]}]


@pytest.mark.parametrize("entries", ['"text"', "{", [{"text": "dog", "bbox": [0, 0, 1]}], [{"bbox": [0, 0, 1, 1]}], 7])
def test_damaged_entries_are_an_error_of_their_image(tmp_path, entries):
    rows = [{"key": "a", "entries": entries}, {"key": "b", "entries": [DOG]}]
    values = FileBoxes(str(write_boxes(tmp_path / "boxes.jsonl", rows)))([Sample("a", b""), Sample("b", b"")], [])
    assert "are no list of text, bbox of four numbers, confidence" in values[0]["error"]
    assert values[1]["entries"] == [DOG]


@pytest.mark.parametrize("name", ["boxes.parquet", "boxes.jsonl"])
def test_files_that_are_none_are_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="is not there"):
        FileBoxes(str(tmp_path / name))
    twice = write_boxes(tmp_path / name, [{"key": "a", "entries": "[]"}, {"key": "a", "entries": "[]"}])
    with pytest.raises(ValueError, match="has the key 'a' twice"):
        FileBoxes(str(twice))([Sample("a", b"")], [])
    other = write_boxes(tmp_path / name, [{"id": "a", "boxes": "[]"}])
    with pytest.raises(ValueError, match="has the columns id, boxes but needs key and entries"):
        FileBoxes(str(other))


# ----------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = write_grounding_dino(tmp_path_factory.mktemp("detector"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: []\n---\n# A model\n")
    return folder


def test_a_detector_with_a_list_of_tags(detector, tmp_path):
    (tmp_path / "tags.txt").write_text("w1\nw2\nsit\n")
    (tmp_path / "thresholds.txt").write_text("W1: 0.4\n")
    given = ("--detector", detector, "--tags", tmp_path / "tags.txt", "--tag-thresholds", tmp_path / "thresholds.txt")
    made = plan_of(*given, "--detector-gpus", 0.5)
    assert stages_of(made) == ["ListTags", "DetectTags", "TidyBoxes", "WriteCaptions"]
    assert made.stages[1].num_gpus == 0.5
    assert made.stages[1].options["device"] == "cuda"
    assert made.stages[1].options["threshold"] == 0.25
    assert made.stages[3].options["vocabulary"] == ["w1", "w2"]
    assert list(made.schema) == ["cogvlm_caption", "captions", "metadata"]
    assert made.made_with["detector"] == {
        "model": str(detector),
        "kind": "grounding-dino",
        "licence": "apache-2.0",
    }
    assert json.loads(json.dumps(made.settings)) == made.settings
    for spec in made.stages:
        assert json.loads(json.dumps(spec.options)) == spec.options


def test_what_rows_depend_on_is_in_the_settings(detector, tmp_path):
    (tmp_path / "tags.txt").write_text("w1\n")
    given = ("--detector", detector, "--tags", tmp_path / "tags.txt")
    before = plan_of(*given).settings
    assert plan_of(*given, "--detector-batch", 9, "--detector-gpus", 1).settings == before
    for more in (("--threshold", 0.3), ("--max-area", 1), ("--as-published",), ("--base-caption", "caption")):
        assert plan_of(*given, *more).settings != before, more
    (tmp_path / "tags.txt").write_text("w2\n")
    assert plan_of(*given).settings != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "0 of --detector and --boxes are given"),
        (("--detector", "a", "--boxes", "b"), "2 of --detector and --boxes are given"),
        (("--detector", "a"), "none is given, but a detector needs the tags of exactly one"),
        (("--detector", "a", "--tags", "b", "--ram", "c"), "--ram, --tags is given, but a detector needs"),
        (("--boxes", "a", "--tags", "b"), "--tags is given, but a file of boxes has its own tags"),
        (("--boxes", "a", "--max-area", 90), r"--max-area is 90\.0 but must be 0 to 1"),
        (("--boxes", "a", "--ram-threshold", 0.7), r"--ram-threshold is 0\.7 but .* an option of --ram alone"),
        (("--boxes", "a", "--detector-gpus", 1), r"--detector-gpus is 1\.0 but .* an option of --detector alone"),
        (("--boxes", "a", "--detector-batch", 8), "--detector-batch is 8 but"),
        (("--boxes", "a", "--detector-dtype", "float16"), "--detector-dtype is 'float16' but"),
        (("--detector", "a", "--tags", "b", "--ram-gpus", 1), r"--ram-gpus is 1\.0 but"),
        (("--detector", "a", "--ram", "b", "--boxes-unit", "pixels"), "--boxes-unit is 'pixels' but"),
        (("--boxes", "a", "--only-lists", "--synonyms", "b"), "--synonyms is 'b' but .*--only-lists looks for no"),
        (("--boxes", "a", "--threshold", -1), r"--threshold is -1\.0 but must be 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        plan_of(*words)


def test_files_of_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# ours\nbicycle: bike, push bike\n\ncat:kitten\n")
    assert read_synonyms(path) == {"bike": "bicycle", "push bike": "bicycle", "kitten": "cat"}
    path.write_text("Dog: 0.3\n")
    assert read_thresholds(path) == {"dog": 0.3}
    path.write_text("dog 0.3\n")
    with pytest.raises(ValueError, match=r"has the line 'dog 0\.3' but each line is a tag, a colon"):
        read_thresholds(path)
    path.write_text("dog: 30\n")
    with pytest.raises(ValueError, match="has the threshold '30' for 'dog' but it must be 0 to 1"):
        read_thresholds(path)


def test_a_licence_is_that_of_the_card(tmp_path):
    assert licence_of(tmp_path).startswith("not stated")
    (tmp_path / "README.md").write_text("# A model\n\nThe license: see below.\n")
    assert licence_of(tmp_path).startswith("not stated")


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.usefixtures("any_inflect")
def test_from_tags_of_a_column_to_captions(detector):
    made = plan_of("--detector", detector, "--tags-column", "found", "--threshold", 0.3, "--base-caption", "caption")
    tags = [[WORDS[1], WORDS[2]], [], [" ".join(["w1"] * 300)], None]
    samples = [
        Sample(str(number), b"", caption="A w1.", values={} if its is None else {"found": its})
        for number, its in enumerate(tags)
    ]
    rows = run_stages(made, samples, [render_image(60, 80, seed=number) for number in range(4)])
    first, *_ = ast.literal_eval(rows[0]["captions"])
    assert first[0].startswith("A w1 (")
    assert json.loads(rows[0]["metadata"])["length"] > 1
    assert rows[1]["filtered_by"] == "no_box"
    assert "has 300 tokens" in rows[2]["error"]
    assert rows[3]["error"] == "The column 'found' has no tags here."


@pytest.mark.usefixtures("any_inflect")
def test_figures_of_the_verification():
    figures = verify(options_of("--as-published"))
    assert figures["right"] == figures["levels_agree"] == 1
    assert figures["wrong"] == 0


@pytest.mark.usefixtures("any_inflect")
def test_rows_of_the_engine_train_a_model(tmp_path):
    """Rendered images with captions and boxes of a file -> rows -> a recipe whose loss falls."""
    records = list(rendered_records("caption", "train", 0, 6))
    (tmp_path / "images").mkdir()
    samples, boxes = [], []
    for number, record in enumerate(records):
        key = f"{number:09d}"
        record.images[0].open().save(tmp_path / "images" / f"{key}.jpg")
        objects = record.annotations["pictures"][0]["objects"]
        names = [f"{item['colour']} {item['thing']}" for item in objects]
        entries = [
            {"text": name, "bbox": item["box"], "confidence": 0.9} for name, item in zip(names, objects, strict=True)
        ]
        boxes.append({"key": key, "entries": entries})
        samples.append(Sample(key, b"", uid=f"u{key}", values={"cogvlm_caption": record.annotations["answer"]}))
    made = plan_of("--boxes", write_boxes(tmp_path / "boxes.parquet", boxes[:-1]))  # the last has no row
    values = run_stages(made, samples, [])
    rows = [
        {"uid": sample.uid, "url": "", "key": sample.key}
        | {name: its.get(name) for name in (*made.schema, "error", "filtered_by")}
        for sample, its in zip(samples, values, strict=True)
    ]
    assert [row["error"] is None for row in rows] == [True] * 5 + [False]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    stream = {
        "stream": str(tmp_path / "rows.parquet"),
        "reader": "grounding",
        "images": str(tmp_path / "images"),
        "options": {"granularities": [0, 2]},
    }
    model = make_small_model(tmp_path)
    recipe = tiny_recipe(tmp_path / "run.yaml", model, mixture=[stream], max_steps=20, save_every=20, max_length=1024)
    train(recipe)
    assert share_of_loss_left(tmp_path / "run", 20) < 0.9
