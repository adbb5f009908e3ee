# SPDX-License-Identifier: Apache-2.0
"""Where tags come from: a list, a column, a RAM++ export."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3.engines.grounding.tags import ColumnTags, ListTags, RamFiles, RamTags, clean_tags, read_list
from blip3.engines.stages import Sample
from support.onnx_file import write_tagger

TAGS = ["tomato", "leaf", "sea", "photo"]
COLOURS = {"tomato": "#ff0000", "leaf": "#00ff00", "sea": "#0000ff"}
WEIGHTS = np.concatenate([2 * np.eye(3), np.ones((3, 1))], axis=1)


def samples(count: int, **values: object) -> list[Sample]:
    return [Sample(str(number), b"", values=values) for number in range(count)]


def write_export(
    folder: Path, shape: list, last: str = "Identity", thresholds: str | None = "0.5\n0.5\n0.5\n0.5\n"
) -> Path:
    folder.mkdir(exist_ok=True)
    write_tagger(folder / "ram_plus.onnx", WEIGHTS, shape, last, bias=-2.0)
    (folder / "ram_tag_list.txt").write_text("\n".join(TAGS) + "\n")
    (folder / "ram_tag_list_chinese.txt").write_text("\n".join("abcd"))
    if thresholds is not None:
        (folder / "ram_tag_list_threshold.txt").write_text(thresholds)
    return folder


# ------------------------------------------------------------------------------------------------- lists and columns


def test_a_list_is_the_same_for_all(tmp_path):
    (tmp_path / "tags.txt").write_text("# what we look for\nDog\n\ndog\nhot  dog \nsit\nphoto\n")
    stage = ListTags(read_list(tmp_path / "tags.txt"))
    assert stage(samples(2), []) == [{"tags": ["Dog", "hot dog"]}] * 2
    with pytest.raises(ValueError, match="The list has 2 tags but at least one must name a thing"):
        ListTags(["sit", "red"])


@pytest.mark.parametrize(
    "value", [["dog", "hot dog", "dog"], '["dog", "hot dog"]', "dog | hot dog", "dog, hot dog", ("dog", "hot dog.")]
)
def test_a_column_in_any_form(value):
    assert ColumnTags("tags")(samples(1, tags=value), []) == [{"tags": ["dog", "hot dog"]}]


def test_a_column_may_be_empty_but_not_missing():
    assert ColumnTags("tags")(samples(1, tags=[]), []) == [{"tags": []}]
    assert ColumnTags("tags")(samples(1), []) == [{"error": "The column 'tags' has no tags here."}]
    assert ColumnTags("tags")(samples(1, tags="7"), []) == [{"error": "The column 'tags' holds int instead of tags."}]


def test_tags_end_no_prompt():
    assert clean_tags(["st. bernard", "what?", "a, b", None]) == ["st bernard", "what", "a b", "None"]


# -------------------------------------------------------------------------------------------------------------- RAM++


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.new("RGB", (40, 20), colour) for colour in COLOURS.values()]


@pytest.mark.parametrize("last", ["Identity", "Sigmoid"])
@pytest.mark.parametrize("shape", [["n", 3, 16, 16], ["n", 3, "h", "w"], [2, 3, 16, 16], [1, 3, 16, 16]])
def test_any_export_is_read(tmp_path, images, shape, last):
    pytest.importorskip("onnxruntime")
    stage = RamTags(str(write_export(tmp_path, shape, last)))
    assert stage.gives_logits == (last == "Identity")
    assert stage.size == ((16, 16) if shape[2] == 16 else (384, 384))
    assert stage(samples(3), images) == [{"tags": [tag]} for tag in COLOURS]
    assert stage(samples(1), images[1:2]) == [{"tags": ["leaf"]}]


def test_scores_are_sigmoids_of_normalised_colours(tmp_path):
    pytest.importorskip("onnxruntime")
    stage = RamTags(str(write_export(tmp_path, ["n", 3, 16, 16])))
    pixels = np.stack([np.full((16, 16), value, np.float32) for value in (0.5, -1.0, 2.0)])
    logits = np.array([2 * 0.5, 2 * -1.0, 2 * 2.0, 0.5 - 1 + 2]) - 2
    np.testing.assert_allclose(stage.scores([pixels])[0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_each_tag_has_its_threshold(tmp_path, images):
    pytest.importorskip("onnxruntime")
    export = write_export(tmp_path, ["n", 3, 16, 16], thresholds="0.999\n0.5\n0.5\n0.5\n")
    assert RamTags(str(export))(samples(3), images)[0] == {"tags": []}
    assert RamTags(str(export / "ram_plus.onnx"), threshold=0.5)(samples(3), images)[0] == {"tags": ["tomato"]}
    assert RamTags(str(export), threshold=0.0)(samples(1), images)[0] == {"tags": TAGS[:3]}  # a photo is no thing


def test_one_at_a_time_gives_the_same(tmp_path, images):
    pytest.importorskip("onnxruntime")
    export = str(write_export(tmp_path, ["n", 3, 16, 16]))
    many, one = RamTags(export, batch_size=8), RamTags(export, batch_size=1)
    assert many(samples(3), images) == one(samples(3), images)


def test_a_list_of_another_model_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    export = write_export(tmp_path, ["n", 3, 16, 16], thresholds="0.5\n" * 5)
    (export / "ram_tag_list.txt").write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(ValueError, match=r"gives the shapes \(1, 4\) but one of \(images, 5\) is needed"):
        RamTags(str(export))


def test_a_card_that_is_not_there_is_refused(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"onnxruntime offers .* install onnxruntime-gpu"):
        RamTags(str(write_export(tmp_path, ["n", 3, 16, 16])), use_gpu=True)


def test_what_a_folder_lacks_is_named(tmp_path):
    export = write_export(tmp_path, ["n", 3, 16, 16])
    files = RamFiles(export)
    assert (files.tags, files.thresholds) == (TAGS, [0.5] * 4)
    (export / "ram_plus_int8.onnx").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"2 files that may be the model, \*\.onnx: ram_plus\.onnx, ram_plus_int8\.onnx"
    ):
        RamFiles(export)
    assert RamFiles(export / "ram_plus.onnx").model.name == "ram_plus.onnx"
    (export / "ram_tag_list_threshold.txt").write_text("0.5\n")
    with pytest.raises(ValueError, match="4 tags but 1 thresholds"):
        RamFiles(export / "ram_plus.onnx")
    (export / "ram_tag_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no list of tags, \*tag\*\.txt"):
        RamFiles(export / "ram_plus.onnx")


def test_thresholds_may_be_given_instead(tmp_path, images):
    pytest.importorskip("onnxruntime")
    export = write_export(tmp_path, ["n", 3, 16, 16], thresholds=None)
    with pytest.raises(ValueError, match="has no thresholds"):
        RamTags(str(export))
    assert RamTags(str(export), threshold=0.5)(samples(3), images) == [{"tags": [tag]} for tag in COLOURS]


def test_without_onnxruntime_the_error_names_the_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[engines\]'"):
        RamTags(str(write_export(tmp_path, ["n", 3, 16, 16])))
