# SPDX-License-Identifier: Apache-2.0
"""Which words of a caption name a tag."""

import re
import sys
import time
from pathlib import Path

import pytest

from blip3.engines.grounding.phrases import PhraseFinder, english_plural, names_a_thing
from blip3.engines.grounding.tags import read_list

HARD = Path(__file__).parent / "hard_captions"


def with_s(tag: str) -> str:
    return f"{tag}s"


def marked(caption: str, *vocabulary: str, **options: object) -> str:
    """The caption with what was found in square brackets."""
    text, end = "", 0
    for mention in PhraseFinder(vocabulary, with_s, **options)(caption):
        text += f"{caption[end : mention.start]}[{caption[mention.start : mention.end]}]"
        end = mention.end
    return text + caption[end:]


def hard_captions() -> list[str]:
    return read_list(HARD / "captions.txt")


def test_there_are_many_hard_captions():
    assert len(hard_captions()) >= 120
    assert sum(line.count("[") for line in hard_captions()) >= 280


def test_nothing_else_is_found_in_hard_captions():
    pytest.importorskip("inflect")
    finder = PhraseFinder(read_list(HARD / "vocabulary.txt"), english_plural())
    for line in hard_captions():
        caption = re.sub(r"[\[\]]", "", line)
        found = finder(caption)
        for mention in reversed(found):
            caption = f"{caption[: mention.start]}[{caption[mention.start : mention.end]}]{caption[mention.end :]}"
        assert caption == line


@pytest.mark.parametrize("synonym", [{}, {"bike": "bicycle", "two-wheeler": "bicycle"}])
def test_synonyms_are_those_of_the_file(synonym):
    finder = PhraseFinder(["bicycle"], with_s, synonym)
    found = [mention.tag for mention in finder("A bike, two bikes, a two-wheeler and a bicycle.")]
    assert found == ["bicycle"] * (4 if synonym else 1)


def test_a_longer_tag_keeps_its_parts():
    assert marked("A hot dog and a dog.", "dog", "hot dog") == "A [hot dog] and a [dog]."
    assert marked("A red dog and a red cat.", "dog", "red cat") == "A red [dog] and a [red cat]."
    assert marked("A golden retriever puppy.", "retriever", "puppy") == "A golden retriever [puppy]."
    assert marked("A carpet.", "car", "pet") == "A carpet."


def test_a_tag_that_another_is_the_plural_of_is_itself():
    (mention,) = PhraseFinder(["spectacle", "spectacles"], with_s)("It has spectacles.")
    assert mention.tag == "spectacles"


def test_more_tags_give_what_all_would():
    known, more = ["dog", "ball", "cream"], ["hot dog", "Dog", "balls"]
    finder = PhraseFinder(known, with_s)
    caption = "Hot dogs, a dog, a ball, balls and ice cream."
    together = finder.with_tags(more)
    assert together(caption) == PhraseFinder([*more, *known], with_s)(caption)
    assert [mention.tag for mention in together(caption)] == ["hot dog", "dog", "ball", "balls"]
    assert [mention.tag for mention in finder(caption)] == ["dog", "ball", "ball"]  # as it was


def test_places_are_of_the_caption_as_given():
    caption = "The \u201cbig\u201d dog\u2019s ball \u2013 a Caf\u00e9 dog."
    found = PhraseFinder(["dog", "ball"])(caption)
    assert [caption[mention.start : mention.end] for mention in found] == ["ball", "dog"]


@pytest.mark.parametrize("caption", ["", " ", "...", "\u4f60\u597d", "\U0001f600 dog\n", "a" * 5000])
def test_any_text_is_read(caption):
    assert len(PhraseFinder(["dog"])(caption)) == caption.count("dog")


def test_a_long_vocabulary_is_fast():
    """Thousands of tags cost a look-up a word, so no automaton is needed."""
    finder = PhraseFinder([f"thing{number} part{number % 7}" for number in range(5000)] + ["dog"], with_s)
    caption = " ".join(["A dog near thing7 part0 and thing9 part3."] * 10)
    start = time.process_time()
    assert len(finder(caption)) == 20
    assert time.process_time() - start < 0.5


def test_tags_that_no_box_belongs_to():
    for tag in ("photo", "pictures", "close-up", "sit", "surfing", "red", "left", "background", "", "."):
        assert not names_a_thing(tag), tag
    for tag in ("dog", "painting", "building", "orange", "glass", "close-up lens"):
        assert names_a_thing(tag), tag


def test_without_inflect_the_error_names_the_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "inflect", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[engines\]'"):
        english_plural()
