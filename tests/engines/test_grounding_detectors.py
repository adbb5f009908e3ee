# SPDX-License-Identifier: Apache-2.0
"""Detectors with random weights: prompts that fit, scores of each tag's own tokens, batches that change nothing."""

import itertools
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

from blip3.engines.grounding.boxes import best_first
from blip3.engines.grounding.detectors import DetectTags, GroundingDinoScorer, Owlv2Scorer, kind_of
from blip3.engines.stages import Sample
from support import render_image
from support.detectors import WORDS, write_grounding_dino, write_owlv2

SIZES = [(60, 80), (80, 60), (60, 80), (64, 64), (30, 40), (80, 60), (60, 80)]  # height, width


@pytest.fixture(scope="module", params=["GroundingDino", "MMGroundingDino"])
def grounding(request, tmp_path_factory):
    return str(write_grounding_dino(tmp_path_factory.mktemp("detector"), request.param))


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    pytest.importorskip("scipy", reason="OWLv2's image processor resizes with it")
    return str(write_owlv2(tmp_path_factory.mktemp("owl")))


def samples_of(tags: list[list[str]]) -> list[Sample]:
    return [Sample(str(number), b"", values={"tags": its}) for number, its in enumerate(tags)]


def some_images() -> list:
    return [render_image(*size, seed=number) for number, size in enumerate(SIZES)]


def assert_same(one: list[dict], other: list[dict]) -> None:
    """The same boxes; what lies within rounding of each other may stand in another order."""
    assert len(one) == len(other)
    assert sorted(entry["text"] for entry in one) == sorted(entry["text"] for entry in other)
    left = list(other)
    for entry in one:
        near = [
            place
            for place, its in enumerate(left)
            if its["text"] == entry["text"]
            and its["confidence"] == pytest.approx(entry["confidence"], abs=2e-4)
            and its["bbox"] == pytest.approx(entry["bbox"], abs=1e-3)
        ]
        assert near, (entry, [its for its in left if its["text"] == entry["text"]])
        left.pop(near[0])


# ----------------------------------------------------------------------------------------------------- Grounding DINO


def scorer_of(folder: str) -> GroundingDinoScorer:
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    return GroundingDinoScorer(model, AutoTokenizer.from_pretrained(folder))


def test_prompts_fit_and_lose_no_tag(grounding):
    scorer = scorer_of(grounding)
    tags = [f"{word} w1" if number % 3 else word for number, word in enumerate(WORDS[:300])]
    prompts = scorer.prompts(tags)
    assert [tag for prompt in prompts for tag in prompt.tags] == tags
    sizes = [len(scorer.tokenizer(". ".join(prompt.tags) + ".").input_ids) for prompt in prompts]
    assert max(sizes) <= 256
    assert min(sizes[:-1]) > 250  # filled
    assert scorer.prompts([]) == []


def test_a_prompt_is_read_as_the_text_would_be(grounding):
    """The ids are those of `a. b c. d.`, and each tag's score is the best of its own tokens."""
    scorer, tags = scorer_of(grounding), ["w1", "w2 w3", "W4"]
    (prompt,) = scorer.prompts(tags)
    text = scorer.tokenizer("w1. w2 w3. w4.", return_tensors="pt")
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ((scores, boxes),) = scorer(pixels, [prompt], [(128, 96)])
        outputs = scorer.model(pixel_values=pixels, **{**text, "token_type_ids": torch.zeros_like(text.input_ids)})
    expected = outputs.logits[0].sigmoid()  # [CLS] w1 . w2 w3 . w4 . [SEP]
    torch.testing.assert_close(scores[:, 0], expected[:, 1])
    torch.testing.assert_close(scores[:, 1], expected[:, 3:5].amax(dim=1))
    torch.testing.assert_close(scores[:, 2], expected[:, 6])
    assert scores.std() > 0.01
    torch.testing.assert_close(boxes[:, :2] + boxes[:, 2:], 2 * outputs.pred_boxes[0, :, :2])
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], outputs.pred_boxes[0, :, 2:])


def test_batches_of_mixed_sizes_equal_one_by_one(grounding):
    tags = [[f"w{number + step}" for step in range(3 + 4 * number)] for number in range(len(SIZES))]
    tags[3] = []
    samples, images = samples_of(tags), some_images()
    together = DetectTags(grounding, 0.5, batch_size=3)(samples, images)
    alone = DetectTags(grounding, 0.5, batch_size=1)
    for sample, image, values in zip(samples, images, together, strict=True):
        (expected,) = alone([sample], [image])
        assert_same(values["entries"], expected["entries"])
    assert together[3] == {"entries": []}
    assert sum(len(values["entries"]) for values in together) > 40


def test_three_hundred_tags_equal_their_prompts_alone(grounding):
    tags = [f"{word} w1" if number % 3 == 0 else word for number, word in enumerate(WORDS[:300])]
    stage, image = DetectTags(grounding, 0.6), render_image(60, 80)
    (together,) = stage(samples_of([tags]), [image])
    prompts = scorer_of(grounding).prompts(tags)
    assert len(prompts) == 3
    alone = stage(samples_of([list(prompt.tags) for prompt in prompts]), [image] * 3)
    assert_same(together["entries"], [entry for values in alone for entry in values["entries"]])
    found = {entry["text"] for entry in together["entries"]}
    assert any(found & set(prompt.tags) for prompt in prompts[1:])


def test_thresholds_of_all_and_of_single_tags(grounding):
    samples, images = samples_of([["w1", "W2", "w3"]]), some_images()[:1]
    (everything,) = DetectTags(grounding, 0.0)(samples, images)
    assert len(everything["entries"]) == 36
    scores = sorted(entry["confidence"] for entry in everything["entries"])
    low, high = max(itertools.pairwise(scores[3:-3]), key=lambda pair: pair[1] - pair[0])
    threshold = (low + high) / 2  # scores are rounded: between two that are apart
    (some,) = DetectTags(grounding, threshold)(samples, images)
    assert some["entries"] == [entry for entry in everything["entries"] if entry["confidence"] > threshold]
    assert 0 < len(some["entries"]) < 36
    (one,) = DetectTags(grounding, 1.0, tag_thresholds={"w2": 0.0})(samples, images)
    assert {entry["text"] for entry in one["entries"]} == {"W2"}
    assert len(one["entries"]) == 12
    (many,) = DetectTags(grounding, 1.0, tag_thresholds={"W1-w2": 0.0})(samples_of([["w1 w2", "w1"]]), images)
    assert {entry["text"] for entry in many["entries"]} == {"w1 w2"}


def test_a_tag_too_long_for_any_prompt_is_an_error_of_its_image(grounding):
    long, fine = " ".join(["w1"] * 260), ["w1"]
    values = DetectTags(grounding, 0.0)(samples_of([fine, [long], fine]), some_images()[:3])
    assert "has 260 tokens but a prompt holds 253." in values[1]["error"]
    assert values[0]["entries"]
    assert values[2]["entries"]


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (64, 40_000)])
def test_an_elongated_image_is_an_error_of_its_row(grounding, size):
    images = [some_images()[0], Image.new("RGB", size), some_images()[0]]
    values = DetectTags(grounding, 0.0)(samples_of([["w1"]] * 3), images)
    width, height = size
    assert values[1] == {
        "error": f"The image has {width} x {height} pixels, too elongated for the detector's image processor."
    }
    assert values[0]["entries"] == values[2]["entries"] != []


def test_a_processor_that_can_resize_nothing_is_no_fault_of_an_image(grounding, tmp_path):
    folder = shutil.copytree(grounding, tmp_path / "detector")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5]}))
    with pytest.raises(ValueError, match="mean"):
        DetectTags(str(folder), 0.3)


# -------------------------------------------------------------------------------------------------------------- OWLv2


def test_owl_batches_equal_one_by_one(owl):
    tags = [["cat", "dog", "ox", "ant"][: number % 4 + 1] for number in range(len(SIZES))]
    samples, images = samples_of(tags), some_images()
    together = DetectTags(owl, 0.3, batch_size=3)(samples, images)
    alone = DetectTags(owl, 0.3, batch_size=1)
    for sample, image, values in zip(samples, images, together, strict=True):
        (expected,) = alone([sample], [image])
        assert_same(values["entries"], expected["entries"])
    assert sum(len(values["entries"]) for values in together) > 40


def test_owl_is_shown_no_image_whose_square_is_too_large(owl):
    images = [some_images()[0], Image.new("RGB", (10_001, 2)), Image.new("RGB", (2, 40_000))]
    values = DetectTags(owl, 0.0)(samples_of([["cat"]] * 3), images)
    assert values[0]["entries"]
    wanted = "The image has 10001 x 2 pixels and would be padded to a square of 100,020,001 but at most 100,000,000"
    assert values[1]["error"].startswith(wanted)
    assert "1,600,000,000" in values[2]["error"]


def test_owl_scores_a_tag_among_many_as_alone(owl):
    many = [f"{first}{second}" for first in "abcdefghij" for second in "abcdefghij"]
    stage, image = DetectTags(owl, 0.0), some_images()[0]
    (together,) = stage(samples_of([many]), [image])
    (alone,) = stage(samples_of([["jj"]]), [image])
    assert len({entry["text"] for entry in together["entries"]}) == 100
    assert_same([entry for entry in together["entries"] if entry["text"] == "jj"], alone["entries"])


def test_owl_boxes_are_of_the_image_and_not_of_its_square(owl):
    """A wide image fills the upper half of the square that the model sees."""
    model = AutoModelForZeroShotObjectDetection.from_pretrained(owl, dtype=torch.float32).eval()
    scorer = Owlv2Scorer(model, AutoTokenizer.from_pretrained(owl))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))[:1].repeat(2, 1, 1, 1)
    prompts = scorer.prompts(["cat"]) * 2
    with torch.inference_mode():
        (_, square), (_, wide) = scorer(pixels, prompts, [(100, 100), (100, 50)])
    torch.testing.assert_close(wide, square * torch.tensor([1, 2, 1, 2]))


def test_owl_reads_sixteen_tokens(owl):
    stage = DetectTags(owl, 0.0)
    values = stage(samples_of([["catss"], ["catsss"]]), some_images()[:2])
    assert values[0]["entries"]  # two ends, ten of the prompt, four of the tag: exactly sixteen
    assert values[1]["error"] == "The tag 'catsss' has 17 tokens as a prompt but 16 are read."


# --------------------------------------------------------------------------------------------------------- refusals


def test_another_model_is_refused(tmp_path, tiny_repo):
    with pytest.raises(ValueError, match=r"The detector is of the kind 'blip3' but it must be one of grounding-dino"):
        kind_of(str(tiny_repo))
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        DetectTags(str(tmp_path / "nowhere"), 0.3)


def test_owl_without_scipy_names_the_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "owlv2"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scipy, which is not installed.*pip install -e '\.\[engines\]'"):
        DetectTags(str(tmp_path), 0.3)


def test_numbers_are_checked(grounding):
    with pytest.raises(ValueError, match="batch size of the detector is 0"):
        DetectTags(grounding, 0.3, batch_size=0)
    with pytest.raises(ValueError, match="dtype of the detector is 'float'"):
        DetectTags(grounding, 0.3, dtype="float")


def test_the_best_come_first():
    entries = [
        {"text": "b", "bbox": [0, 0, 1, 1], "confidence": 0.5},
        {"text": "a", "bbox": [0, 0, 1, 1], "confidence": 0.5},
        {"text": "c", "bbox": [0, 0, 1, 1], "confidence": 0.7},
    ]
    assert [entry["text"] for entry in best_first(entries)] == ["c", "a", "b"]
    assert "torchvision" not in sys.modules
