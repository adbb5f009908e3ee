# SPDX-License-Identifier: Apache-2.0
"""Captions that say where things are, in the three granularities of BLIP3-GROUNDING.

    A dog (in the center) chases a ball (at the bottom right corner).                                      coarse
    A dog (starts at [0.3, 0.2] and extends up to [0.7, 0.8]) chases ...                                   middle
    A <object>dog</object><bbox>[0.3, 0.2][0.7, 0.8]</bbox> chases ...                                     fine

A box stands at one mention and each mention has one box, the best that is left. Where there is no caption, or it names
none of the things, the text lists them: "The image contains dog (in the center), ball (...)."
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ...data.formats import GROUNDING_GRANULARITIES, ground
from ..leaks import speaks_of_task, without_preface
from ..stages import Sample, Values
from .boxes import Entry, best_first, overlap
from .phrases import Form, Mention, PhraseFinder, english_plural, split_form

LIST_BEGINS = "The image contains"

Grounded = list[tuple[Mention, Entry]]


def place_boxes(
    mentions: Iterable[Mention],
    entries: Iterable[Entry],
    max_overlap: float = 0.9,
    form_of: Callable[[str], Form] = split_form,
) -> Grounded:
    """Give each mention, from left to right, the best box of its tag that is left.

    Args:
        mentions: of a caption.
        entries: boxes of the image.
        max_overlap: intersection over union with a box that has its mention; a nearer one says the same twice.
        form_of: a box belongs to a tag of the same form; with `PhraseFinder.form_of` also one named by a synonym.
    """
    waiting: dict[Form, list[Entry]] = {}
    for entry in best_first(entries):
        waiting.setdefault(form_of(entry["text"]), []).append(entry)
    placed: Grounded = []
    for mention in mentions:
        left = waiting.get(form_of(mention.tag), [])
        for entry in left:
            if all(overlap(entry["bbox"], other["bbox"]) <= max_overlap for _, other in placed):
                placed.append((mention, entry))
                left.remove(entry)
                break
    return placed


def write_caption(caption: str, placed: Grounded, granularity: int, as_published: bool = False) -> str:
    """Write a caption with the boxes of its mentions.

    Args:
        caption: that the mentions are of.
        placed: from left to right.
        granularity: 0 to 2.
        as_published: see `formats.ground`.
    """
    pieces, end = [], 0
    for mention, entry in placed:
        phrase = caption[mention.start : mention.end]
        pieces += [caption[end : mention.start], ground(phrase, entry["bbox"], granularity, as_published)]
        end = mention.end
    return "".join(pieces) + caption[end:]


def write_list(
    entries: Iterable[Entry], granularity: int, as_published: bool = False, max_overlap: float = 0.9
) -> str:
    """List what an image contains, best score first, without boxes that nearly equal one before them."""
    kept: list[Entry] = []
    for entry in best_first(entries):
        if all(overlap(entry["bbox"], other["bbox"]) <= max_overlap for other in kept):
            kept.append(entry)
    items = ", ".join(ground(entry["text"], entry["bbox"], granularity, as_published) for entry in kept)
    return f"{LIST_BEGINS} {items}."


def drop_leaked(caption: str) -> str:
    """Leave out what speaks of the prompt instead of the image: sentences, and what leads up to one.

    >>> drop_leaked("A dog sleeps. This sentence describes the dog.")
    'A dog sleeps.'
    """
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    return " ".join(sentence for sentence in map(without_preface, sentences) if not speaks_of_task(sentence))


class WriteCaptions:
    """Stage: writes `captions`, `metadata` and the caption they were made of.

    Args:
        caption_column: value with the caption to ground; "caption" is the raw one.
        vocabulary: all that the tagger knows; the tags of each sample are added to it.
        synonyms: other words -> the tag they mean.
        max_overlap: of two boxes in one text, as intersection over union.
        only_lists: list the things even where there is a caption.
        as_published: see `formats.ground`.
    """

    needs_images = False

    def __init__(
        self,
        caption_column: str,
        vocabulary: Sequence[str] = (),
        synonyms: Mapping[str, str] | None = None,
        max_overlap: float = 0.9,
        only_lists: bool = False,
        as_published: bool = False,
    ):
        self.caption_column, self.max_overlap = caption_column, max_overlap
        self.only_lists, self.as_published = only_lists, as_published
        self._known = frozenset(map(split_form, vocabulary))
        self._finder = PhraseFinder(sorted(set(vocabulary)), english_plural(), synonyms)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Write the captions of each sample; one without a box is filtered out."""
        return [self._write(sample) for sample in samples]

    def _write(self, sample: Sample) -> Values:
        entries = sample.values["entries"]
        caption = drop_leaked(self._caption_of(sample))
        values: Values = {"cogvlm_caption": caption or None, "metadata": write_metadata(entries)}
        if not entries:
            return {**values, "filtered_by": "no_box"}
        placed = [] if self.only_lists else self._place(sample, caption, entries)
        texts = [self._text(caption, placed, entries, granularity) for granularity in GROUNDING_GRANULARITIES]
        raw = sample.caption.strip()
        captions = [[text, granularity, False] for granularity, text in enumerate(texts)]
        captions += [[f"{raw} {text}", granularity, True] for granularity, text in enumerate(texts) if raw]
        return {**values, "captions": repr(captions)}

    def _caption_of(self, sample: Sample) -> str:
        if self.caption_column == "caption":
            return sample.caption
        return str(sample.values.get(self.caption_column) or "")

    def _place(self, sample: Sample, caption: str, entries: Sequence[Entry]) -> Grounded:
        tags = {entry["text"] for entry in entries} | set(sample.values.get("tags") or ())
        unknown = {tag for tag in tags if split_form(tag) not in self._known}
        finder = self._finder.with_tags(sorted(unknown)) if unknown else self._finder
        return place_boxes(finder(caption), entries, self.max_overlap, finder.form_of)

    def _text(self, caption: str, placed: Grounded, entries: Sequence[Entry], granularity: int) -> str:
        if placed:
            return write_caption(caption, placed, granularity, self.as_published)
        return write_list(entries, granularity, self.as_published, self.max_overlap)


def write_metadata(entries: Sequence[Entry]) -> str:
    """Write the boxes as the column `metadata` holds them: JSON with their number, and text, box and score of each.

    >>> write_metadata([{"text": "dog", "bbox": [0, 0, 0.5, 1], "confidence": 0.91234}])
    '{"length": 1, "entries": [{"text": "dog", "bbox": [0, 0, 0.5, 1], "confidence": 0.9123}]}'
    """
    rows: list[dict[str, Any]] = [
        {"text": entry["text"], "bbox": list(entry["bbox"]), "confidence": round(float(entry["confidence"]), 4)}
        for entry in entries
    ]
    return json.dumps({"length": len(rows), "entries": rows}, ensure_ascii=False)
