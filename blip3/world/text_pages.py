# SPDX-License-Identifier: Apache-2.0
"""Pages with words, numbers and codes in several fonts: reading and OCR."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data.canvas import Box as Rectangle
from ..data.canvas import Drawing, Line, Mark, place_text, text_box, text_width
from ..data.formats import Box, write_ocr
from ..data.records import Record
from .scenes import NUMBERS, Rng, ask, make_record, pick, pick_background, pick_size
from .settings import CHARACTERS, WORDS, WorldSettings
from .splits import sample_until, string_key
from .wording import side_of_center

INKS = ("#111111", "#1c2b4a", "#4a1c1c", "#15402a", "#3a1c4a", "#5a3a10")
_CASES: tuple[Callable[[str], str], ...] = (str.lower, str.upper, str.title)
_LETTERS = "".join(WORDS)  # with repetitions: rendered from, it gives letters as often as words do
_PAPERS = ("#ffffff", "#f8f3e6", "#eaf1f7", "#eef5ea", "#fff6c9")


@dataclass(frozen=True)
class Page:
    """A rendered page and its annotations."""

    drawing: Drawing
    strings: tuple[tuple[str, Box], ...]
    """(text, normalised ink box) in reading order."""

    @property
    def annotations(self) -> dict[str, Any]:
        """What a record's `annotations["pictures"]` holds for this image."""
        return {
            "size": list(self.drawing.size),
            "keys": [string_key(text) for text, _ in self.strings],
            "objects": [],
            "strings": [{"text": text, "box": list(box)} for text, box in self.strings],
        }


def normalise(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """Divide a box in pixels by the (height, width) of its image."""
    (x1, y1, x2, y2), (height, width) = box, size
    return round(x1 / width, 4), round(y1 / height, 4), round(x2 / width, 4), round(y2 / height, 4)


def sample_string(rng: Rng, split: str, propose: Callable[[], str]) -> str:
    """Propose strings until one belongs to the split."""
    return sample_until(split, propose, string_key)


def code(rng: Rng, split: str, length: int, characters: str = CHARACTERS) -> str:
    """Sample a random string of a given length."""
    return sample_string(rng, split, lambda: "".join(characters[i] for i in rng.integers(0, len(characters), length)))


def word(rng: Rng, split: str, longest: int = 99) -> str:
    """Sample an English word, in small letters, capitals or with a capital first."""
    known = [candidate for candidate in WORDS if len(candidate) <= longest] if longest < 8 else WORDS
    return pick(rng, _CASES)(sample_string(rng, split, lambda: pick(rng, known)))


def made_up_word(rng: Rng, split: str, length: int) -> str:
    """Sample random letters, each as frequent as in the English words, cased like `word`."""
    return pick(rng, _CASES)(code(rng, split, length, _LETTERS))


def number(rng: Rng, split: str, below: int = 1000) -> str:
    """Sample a number of at least two digits."""
    return sample_string(rng, split, lambda: str(rng.integers(10, below)))


def any_string(rng: Rng, split: str, settings: WorldSettings) -> str:
    """Sample a string to read: a code (mostly), a number or a word of 1 to `max_characters` characters."""
    kind, longest = rng.random(), settings.max_characters
    length = int(rng.integers(1, longest + 1))
    if settings.made_up_words and rng.random() < settings.made_up_words:
        return made_up_word(rng, split, max(length, 2))
    if kind < 0.6 or longest < 4:
        return code(rng, split, length)
    if kind < 0.8:
        return code(rng, split, max(length, 2), "0123456789")
    return word(rng, split, longest)


def sample_page(rng: Rng, strings: list[str], settings: WorldSettings) -> Page:
    """Set strings on a page, one to a strip from top to bottom, each in its own font, size, ink and place.

    Args:
        rng: decides everything else.
        strings: in reading order.
        settings: sizes and fonts.
    """
    height, width = pick_size(rng, settings.sides, settings.max_aspect)
    height = max(height, int(1.6 * settings.min_text_pixels * len(strings)))
    background, marks, boxes = pick_background(rng), list[Mark](), []
    strip = height // len(strings)
    for index, text in enumerate(strings):
        font = pick(rng, settings.fonts)
        points = int(rng.uniform(*settings.text_heights) * min(height, width))
        points = max(settings.min_text_pixels, min(points, int(strip / 1.5)))
        points, needed = fit_text(text, font, points, width, settings.min_text_pixels)
        if needed > width:
            return sample_page(rng, strings, settings)
        left, top, right, bottom = text_box(text, font, points)
        x = int(rng.integers(0, max(1, width - (right - left))))
        y = index * strip + int(rng.integers(0, max(1, strip - (bottom - top))))
        mark, box = place_text(text, font, points, pick(rng, INKS), (x, y))
        marks += [*_decoration(rng, box, height, width), mark]
        boxes.append(normalise(box, (height, width)))
    return Page(Drawing((height, width), background, tuple(marks)), tuple(zip(strings, boxes, strict=True)))


def fit_text(text: str, font: str, points: int, width: int, least: int) -> tuple[int, int]:
    """Shrink a font size until the text fits the width; gives the size and the width it then needs, in pixels."""
    while True:
        needed = text_width(text, font, points)
        if needed <= width or points <= least:
            return points, needed
        points = max(least, min(points - 1, points * width // needed))


def _decoration(rng: Rng, box: tuple[float, float, float, float], height: int, width: int) -> list[Mark]:
    """Put a sign behind the text, a rule below it, or nothing."""
    x1, y1, x2, y2 = (int(edge) for edge in box)
    pad, kind = max(3, (y2 - y1) // 4), rng.random()
    if kind < 0.25:
        panel = (max(0, x1 - pad), max(0, y1 - pad), min(width - 1, x2 + pad), min(height - 1, y2 + pad))
        return [Rectangle(panel, pick(rng, _PAPERS), pick(rng, (None, *INKS)), max(1, pad // 4))]
    if kind < 0.4 and y2 + pad < height:
        return [Line((x1, y2 + pad, x2, y2 + pad), pick(rng, INKS), max(1, pad // 4))]
    return []


# -------------------------------------------------------------------------------------------------- the tasks


def read_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Read one string of 1 to `max_characters` characters somewhere on a page."""
    text = any_string(rng, split, settings)
    question = pick(rng, ("What is written in the picture?", "Read the text.", "What does it say?"))
    return ask("read", question, text, [sample_page(rng, [text], settings)])


def ocr_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Write the strings of a page at one of six granularities, with or without a raw caption in front."""
    fewest, most = settings.ocr_strings
    strings = [any_string(rng, split, settings) for _ in range(int(rng.integers(fewest, most + 1)))]
    page, granularity = sample_page(rng, strings, settings), pick(rng, settings.ocr_granularities)
    count = len(strings)
    caption = f"A page with {NUMBERS[count]} line{'s' * (count > 1)} of text." if rng.random() < 0.5 else ""
    text = write_ocr(page.strings, granularity, caption, side_of_center)
    extra = {"granularity": granularity, "include_datacomp_raw_cap": bool(caption)}
    return make_record("ocr", "ocr", [("document", f"<image>{text}")], [page], text, **extra)
