# SPDX-License-Identifier: Apache-2.0
"""Filters of texts: alt-text, captions, and the lines that OCR found in an image.

Lines are `entries` among a sample's values: {"text", "bbox": [x1, y1, x2, y2] of 0 to 1, "confidence"} each. Filters
of lines drop lines, and count them in `dropped_entries` by the filter's name; a sample that loses its last line is
dropped itself.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from PIL import Image

from ..packages import PHONENUMBERS, PY3LANGID
from ..stages import Sample, Values
from .personal import check_region, personal_data

ENTRIES, DROPPED = "entries", "dropped_entries"
LEAST_LETTERS = 20  # of a text whose language is looked at: shorter ones are names and numbers in any

Entry = Mapping[str, Any]


class AltTextLength:
    """Drops images whose alt-text is too short or too long.

    Args:
        least: words.
        most: words.
    """

    needs_images = False

    def __init__(self, least: int, most: int):
        self.least, self.most = least, most

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `alt_text_length`."""
        fits = [self.least <= len(sample.caption.split()) <= self.most for sample in samples]
        return [{} if fit else {"filtered_by": "alt_text_length"} for fit in fits]


class AltTextLanguage:
    """Drops images whose alt-text is in another language; one of few letters is kept.

    Args:
        languages: two letters each, as ISO 639-1 has them.
    """

    needs_images = False
    package = PY3LANGID

    def __init__(self, languages: Sequence[str]):
        self.languages, self.language_of = frozenset(languages), open_identifier(languages)

    @staticmethod
    def check(languages: Sequence[str]) -> None:
        """Refuse languages that are not known."""
        open_identifier(languages)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `alt_text_language`."""
        fits = [is_in(self.languages, sample.caption, self.language_of) for sample in samples]
        return [{} if fit else {"filtered_by": "alt_text_language"} for fit in fits]


class CaptionLength:
    """Drops images whose written caption is too short or too long.

    Args:
        least: words.
        most: words.
        column: of the caption, among the values.
    """

    needs_images = False

    def __init__(self, least: int, most: int, column: str = "caption"):
        self.least, self.most, self.column = least, most, column

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `caption_length`."""
        fits = [
            self.least <= len(str(sample.values.get(self.column) or "").split()) <= self.most for sample in samples
        ]
        return [{} if fit else {"filtered_by": "caption_length"} for fit in fits]


class _Lines:
    """Drops lines of which something is less than a bound; a subclass says what.

    Args:
        least: of 0 to 1.
    """

    needs_images = False
    name: str
    """Of the filter, for the counts."""

    def __init__(self, least: float):
        self.least = least

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop lines by the filter's name."""
        return [
            drop_entries(sample, self.name, lambda entry: self.share_of(entry) >= self.least) for sample in samples
        ]

    def share_of(self, entry: Entry) -> float:
        """Give what is compared, of 0 to 1."""
        raise NotImplementedError


class Confidence(_Lines):
    """Drops lines that the reader is not sure of."""

    name = "confidence"

    def share_of(self, entry: Entry) -> float:
        """Give the reader's confidence."""
        return entry["confidence"]


class Letters(_Lines):
    """Drops lines of marks: `***`, `--|`."""

    name = "letters"

    def share_of(self, entry: Entry) -> float:
        """Give the share of letters and digits among what is no blank."""
        return letters(entry["text"])


class TextArea(_Lines):
    """Drops lines that are too small to be read."""

    name = "text_area"

    def share_of(self, entry: Entry) -> float:
        """Give the share of the image's area."""
        return area(entry["bbox"])


class TextLanguage:
    """Drops images whose lines together are in another language; few letters are kept.

    Args:
        languages: two letters each, as ISO 639-1 has them.
    """

    needs_images = False
    package = PY3LANGID

    def __init__(self, languages: Sequence[str]):
        self.languages, self.language_of = frozenset(languages), open_identifier(languages)

    @staticmethod
    def check(languages: Sequence[str]) -> None:
        """Refuse languages that are not known."""
        open_identifier(languages)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `text_language`."""
        texts = [" ".join(entry["text"] for entry in sample.values.get(ENTRIES, ())) for sample in samples]
        fits = [is_in(self.languages, text, self.language_of) for text in texts]
        return [{} if fit else {"filtered_by": "text_language"} for fit in fits]


class PersonalData:
    """Drops lines with an e-mail address, a phone number or a card number, or the images that have such lines.

    Args:
        drop: `lines` or `images`.
        region: two letters of the country whose phone numbers may be written without its code; empty for none.
    """

    needs_images = False
    package = PHONENUMBERS

    def __init__(self, drop: str, region: str = ""):
        self.drop, self.region = drop, region

    @staticmethod
    def check(drop: str, region: str = "") -> None:
        """Refuse a country that is not known."""
        check_region(region)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop images or lines by `personal_data`."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> Values:
        if self.drop == "lines":
            return drop_entries(sample, "personal_data", lambda entry: not personal_data(entry["text"], self.region))
        whole = [entry["text"] for entry in sample.values.get(ENTRIES, ())]
        has_some = any(personal_data(text, self.region) for text in [*whole, " ".join(whole)])
        return {"filtered_by": "personal_data"} if has_some else {}


def drop_entries(sample: Sample, name: str, keep: Callable[[Entry], bool]) -> Values:
    """Drop lines of one sample.

    Args:
        sample: with `entries`, or without: then nothing changes.
        name: of the filter.
        keep: whether a line stays.

    Returns:
        what changes: the count of lines dropped, and the lines that stay or that the sample lost its last line.
    """
    entries = sample.values.get(ENTRIES, ())
    kept = [entry for entry in entries if keep(entry)]
    if len(kept) == len(entries):
        return {}
    dropped = {**sample.values.get(DROPPED, {}), name: len(entries) - len(kept)}
    return {DROPPED: dropped, **({ENTRIES: kept} if kept else {"filtered_by": name})}


def letters(text: str) -> float:
    """Give the share of letters and digits among what is no blank.

    >>> letters("No. 7!"), letters("***"), letters("")
    (0.6, 0.0, 0.0)
    """
    marks = re.sub(r"\s", "", text)
    return sum(mark.isalnum() for mark in marks) / len(marks) if marks else 0.0


def area(box: Sequence[float]) -> float:
    """Give the area of a box."""
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


def is_in(languages: Collection[str], text: str, language_of: Callable[[str], str]) -> bool:
    """Say whether a text is in one of the languages, or too short to say."""
    return sum(map(str.isalpha, text)) < LEAST_LETTERS or language_of(text) in languages


def open_identifier(languages: Sequence[str]) -> Callable[[str], str]:
    """Load what tells the language of a text.

    Args:
        languages: that are wanted, to be known to it.

    Raises:
        ImportError: if py3langid is not installed.
        ValueError: if it does not know one.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise PY3LANGID.missing(error) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = set(languages) - set(identifier.labels)
    if unknown:
        raise ValueError(
            f"The languages are {', '.join(languages)} but py3langid does not know {', '.join(sorted(unknown))}; it "
            f"has {len(identifier.labels)}. A name was probably written in full: give two letters, such as en."
        )
    return lambda text: str(identifier.classify(text)[0])
