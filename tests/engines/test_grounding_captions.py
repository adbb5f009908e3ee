# SPDX-License-Identifier: Apache-2.0
"""Boxes, the captions that hold them, and the rows as the readers get them."""

import ast
import json

import pytest

from blip3.data.formats import parse_boxes, place_name
from blip3.data.readers import read_grounding
from blip3.engines.grounding.boxes import TidyBoxes, overlap, suppress, usable
from blip3.engines.grounding.captions import WriteCaptions, drop_leaked, place_boxes, write_caption, write_list
from blip3.engines.grounding.phrases import Mention, PhraseFinder
from blip3.engines.grounding.verify import verify_rendered
from blip3.engines.stages import Sample

LEFT, RIGHT, LOW = [0.1, 0.4, 0.3, 0.6], [0.7, 0.4, 0.9, 0.6], [0.4, 0.8, 0.6, 1.0]


def entry(text: str, box: list[float], score: float = 0.5) -> dict:
    return {"text": text, "bbox": box, "confidence": score}


def write(caption: str | None, entries: list[dict], raw: str = "", **options: object) -> dict:
    sample = Sample("a", b"", caption=raw, values={"cogvlm_caption": caption, "entries": entries})
    (values,) = WriteCaptions(**{"caption_column": "cogvlm_caption", **options})([sample], [])
    return values


# ------------------------------------------------------------------------------------------------------------- boxes


def test_overlap_is_that_of_areas():
    assert overlap(LEFT, LEFT) == 1
    assert overlap(LEFT, RIGHT) == 0
    assert overlap([0, 0, 0.5, 1], [0.25, 0, 0.75, 1]) == pytest.approx(1 / 3)
    assert overlap([0.3, 0, 0.1, 1], LEFT) == 0
    assert overlap([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]) == 0


@pytest.mark.parametrize(
    "box",
    [
        [0.3, 0.1, 0.1, 0.3],
        [0.1, 0.3, 0.3, 0.1],
        [0.1, 0.1, 0.1, 0.5],
        [1.2, 0.1, 1.4, 0.3],
        [float("nan"), 0.1, 0.3, 0.5],
        [0, 0, float("inf"), 1],
    ],
)
def test_what_is_no_box_is_left_out(box):
    assert usable([entry("dog", box)]) == []


def test_boxes_are_clipped_and_may_be_too_large():
    assert usable([entry("dog", [-0.1, 0.2, 0.5, 1.3])]) == [entry("dog", [0, 0.2, 0.5, 1])]
    large = [entry("dog", [0, 0, 1, 0.95])]
    assert usable(large, 0.9) == []
    assert usable(large) == large


def test_the_best_of_nearly_equal_boxes_of_a_tag_stays():
    near = [0.1, 0.4, 0.3, 0.59]
    entries = [entry("dog", near, 0.4), entry("dog", LEFT, 0.6), entry("cat", near, 0.3), entry("dog", RIGHT, 0.2)]
    kept = [entry("dog", LEFT, 0.6), entry("cat", near, 0.3), entry("dog", RIGHT, 0.2)]
    assert suppress(entries, 0.5) == kept
    assert suppress(entries[::-1], 0.5) == kept
    assert len(suppress(entries, 0.99)) == 4
    assert suppress([entry("T-shirt", LEFT, 0.6), entry("t shirt", near, 0.4)], 0.5) == [entry("T-shirt", LEFT, 0.6)]


def test_a_box_that_is_too_large_hides_no_other():
    sample = Sample("a", b"", values={"entries": [entry("dog", [0, 0, 1, 1], 0.9), entry("dog", [0, 0, 1, 0.6], 0.5)]})
    (values,) = TidyBoxes(max_area=0.9, max_overlap=0.5)([sample], [])
    assert values == {"entries": [entry("dog", [0, 0, 1, 0.6], 0.5)]}


# ---------------------------------------------------------------------------------------------------------- captions


def mentions(caption: str, *tags: str) -> list[Mention]:
    return PhraseFinder(tags, lambda tag: f"{tag}s")(caption)


def test_each_mention_has_the_best_box_that_is_left():
    entries = [entry("dog", LEFT, 0.3), entry("dog", RIGHT, 0.9), entry("cat", LOW, 0.4)]
    found = mentions("A dog, a dog, a dog and a cat.", "dog", "cat")
    assert [pair["bbox"] for _, pair in place_boxes(found, entries)] == [RIGHT, LEFT, LOW]
    assert [mention.start for mention, _ in place_boxes(found, entries)] == [2, 9, 26]


@pytest.mark.usefixtures("any_inflect")
@pytest.mark.parametrize(
    ("tag", "caption", "options"),
    [
        ("Dog", "A dog runs.", {"vocabulary": ["dog"]}),
        ("dog", "A dog runs.", {"vocabulary": ["Dog"]}),
        ("bicycle", "A bike stands.", {"synonyms": {"bike": "Bicycle"}}),
        ("bicycle", "A bike stands.", {"vocabulary": ["Bicycle"], "synonyms": {"Bike": "bicycle"}}),
        ("bike", "A bike stands.", {"vocabulary": ["bicycle"], "synonyms": {"bike": "bicycle"}}),
        ("Bike", "A bicycle stands.", {"vocabulary": ["bicycle"], "synonyms": {"bike": "bicycle"}}),
        ("t shirt", "A T-shirt hangs.", {"vocabulary": ["t-shirt"]}),
        ("T-Shirt", "A t shirt hangs.", {"vocabulary": ["t shirt"]}),
    ],
)
def test_tag_synonym_and_box_may_differ_in_case_and_hyphen(tag, caption, options):
    captions = ast.literal_eval(write(caption, [entry(tag, LEFT)], **options)["captions"])
    assert captions[0][0].replace(f" ({place_name(LEFT)})", "") == caption
    assert captions[0][0] != caption


def test_a_text_says_no_place_twice():
    near = [0.1, 0.4, 0.3, 0.601]
    found = mentions("A man is a person.", "man", "person")
    entries = [entry("person", near, 0.9), entry("man", LEFT, 0.3)]
    assert [mention.tag for mention, _ in place_boxes(found, entries)] == ["man"]
    assert len(place_boxes(found, entries, max_overlap=1)) == 2
    assert write_list(entries, 0) == f"The image contains person ({place_name(near)})."


def test_three_granularities():
    caption = "Two dogs chase a ball."
    placed = place_boxes(mentions(caption, "dog", "ball"), [entry("dog", LEFT), entry("ball", LOW)])
    assert [write_caption(caption, placed, level) for level in range(3)] == [
        f"Two dogs ({place_name(LEFT)}) chase a ball ({place_name(LOW)}).",
        "Two dogs (starts at [0.1, 0.4] and extends up to [0.3, 0.6]) chase a ball (starts at [0.4, 0.8] and extends "
        "up to [0.6, 1.0]).",
        "Two <object>dogs</object><bbox>[0.1, 0.4][0.3, 0.6]</bbox> chase a "
        "<object>ball</object><bbox>[0.4, 0.8][0.6, 1.0]</bbox>.",
    ]
    assert parse_boxes(write_caption(caption, placed, 1, as_published=True)) == [tuple(LEFT), tuple(LOW)]


@pytest.mark.usefixtures("any_inflect")
def test_the_row_is_as_published():
    values = write("A dog chases a ball.", [entry("dog", LEFT, 0.61239), entry("cat", RIGHT)], raw="pets for sale")
    captions = ast.literal_eval(values["captions"])
    assert [caption[1:] for caption in captions] == [
        [0, False],
        [1, False],
        [2, False],
        [0, True],
        [1, True],
        [2, True],
    ]
    assert captions[0][0] == f"A dog ({place_name(LEFT)}) chases a ball."
    assert captions[5][0] == f"pets for sale {captions[2][0]}"
    assert values["cogvlm_caption"] == "A dog chases a ball."
    cat = {"text": "cat", "bbox": RIGHT, "confidence": 0.5}
    dog = {"text": "dog", "bbox": LEFT, "confidence": 0.6124}
    assert json.loads(values["metadata"]) == {"length": 2, "entries": [dog, cat]}


@pytest.mark.usefixtures("any_inflect")
@pytest.mark.parametrize(
    ("caption", "options"), [(None, {}), ("", {}), ("A fine day.", {}), ("A dog.", {"only_lists": True})]
)
def test_things_are_listed_where_a_caption_names_none(caption, options):
    values = write(caption, [entry("dog", LEFT, 0.4), entry("dog", RIGHT, 0.9)], **options)
    first, *_, last = ast.literal_eval(values["captions"])
    assert first[0] == f"The image contains dog ({place_name(RIGHT)}), dog ({place_name(LEFT)})."
    assert last[1:] == [2, False]
    assert values["cogvlm_caption"] == (caption or None)


@pytest.mark.usefixtures("any_inflect")
def test_an_image_without_a_box_is_counted_as_filtered():
    values = write("A dog.", [])
    assert values["filtered_by"] == "no_box"
    assert "captions" not in values
    assert json.loads(values["metadata"]) == {"length": 0, "entries": []}


@pytest.mark.usefixtures("any_inflect")
def test_the_caption_may_be_the_raw_one_and_the_vocabulary_larger():
    values = write(
        "A cat.", [entry("dog", LEFT)], raw="A hot dog, a dog", caption_column="caption", vocabulary=["hot dog"]
    )
    first = ast.literal_eval(values["captions"])[0][0]
    assert first == f"A hot dog, a dog ({place_name(LEFT)})"


@pytest.mark.parametrize(
    "sentence",
    [
        "This sentence describes a dog.",
        "The detailed description mentions a ball.",
        "Sentence 1 has real-world details.",
        "I kept the sentence structure.",
    ],
)
def test_sentences_about_the_prompt_are_left_out(sentence):
    assert drop_leaked(f"A dog runs. {sentence} It is brown!") == "A dog runs. It is brown!"
    assert drop_leaked(sentence) == ""


def test_sentences_about_the_image_stay():
    caption = "The image contains a dog. Although it rains, a sign with a sentence hangs there. Despite this, it runs."
    assert drop_leaked(caption) == caption


# ------------------------------------------------------------------------------------------------------------ readers


@pytest.mark.usefixtures("any_inflect")
def test_rows_are_read_back():
    """Quotes and line breaks survive the Python literal; rows that failed give nothing."""
    caption = 'A dog\'s "big" day:\na dog (brown) runs.'
    values = write(caption, [entry("dog", LEFT)], raw="it's \\ raw")
    row = {"uid": "u", "url": "", "key": "k", **values, "error": None, "filtered_by": None, "image": b"\x89PNG"}
    texts = {}
    for level in range(3):
        for with_caption in (False, True):
            (record,) = read_grounding([row], [level], with_caption)
            assert record.kind == "grounding"
            assert record.annotations == {"granularity": level, "include_datacomp_raw_cap": with_caption}
            texts[level, with_caption] = record.turns[0].text
    assert texts[0, False] == f"<image>{caption}".replace("a dog (", f"a dog ({place_name(LEFT)}) (")
    assert texts[2, True].startswith("<image>it's \\ raw A dog")
    failed = [
        {**row, "captions": None, "error": "The image is cut off."},
        {**row, "captions": None, "filtered_by": "no_box"},
    ]
    assert list(read_grounding(failed)) == []


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.usefixtures("any_inflect")
def test_rendered_captions_are_grounded_rightly():
    figures = verify_rendered(1000)
    assert figures["captions"] == 1000
    assert figures["expected"] > 1800
    assert figures["right"] == 1
    assert figures["wrong"] == 0
    assert figures["mean_iou"] > 0.98
    assert figures["kept"] == figures["levels_agree"] == 1


@pytest.mark.usefixtures("any_inflect")
def test_verification_sees_a_fault(monkeypatch):
    monkeypatch.setattr(TidyBoxes, "__call__", lambda self, samples, images: [{} for _ in samples])
    figures = verify_rendered(50)
    assert figures["right"] < 0.5
    assert figures["wrong"] >= 40
