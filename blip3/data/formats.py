# SPDX-License-Identifier: Apache-2.0
"""The exact texts of the recipe: OCR at six granularities, grounding at three, few-shot prompts.

Boxes are (x1, y1, x2, y2), normalised to 0..1. The strings in brackets, quotes and tags are those of the BLIP-3 report
(arXiv:2408.08872) and its dataset cards; how several items are joined is ours: with commas.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

Box = tuple[float, float, float, float]

OCR_GRANULARITIES = range(6)
GROUNDING_GRANULARITIES = range(3)
_MAX_DENOMINATOR = 17  # the report's own example is 2/17


def write_box(box: Sequence[float], decimals: int = 3) -> str:
    """Write a box as the report's finest level does.

    >>> write_box((0.192, 0.037, 0.817, 0.2034))
    '[0.192, 0.037][0.817, 0.203]'
    """
    x1, y1, x2, y2 = (round(min(max(float(edge), 0.0), 1.0), decimals) for edge in box)
    return f"[{x1}, {y1}][{x2}, {y2}]"


def parse_boxes(text: str) -> list[Box]:
    """Find every box in a text, in each published form, with or without spaces.

    The forms are `[x1, y1][x2, y2]`, `<bbox>x1,y1,x2,y2</bbox>`, and `starts at [x1, y1] and extends up to [x2, y2]`,
    which the report writes with round brackets too and the published rows with "upto".

    >>> parse_boxes("at [0.1, 0.2][0.3, 0.4] and <bbox>0,0,1,1</bbox>")
    [(0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 1.0)]
    >>> parse_boxes("starts at [0.1, 0.2] and extends upto [0.3, 0.4]")
    [(0.1, 0.2, 0.3, 0.4)]
    """
    number = r"\s*(\d*\.?\d+|\d+\.)\s*"
    corner = rf"[\[(]{number},{number}[\])]"
    pairs = rf"\[{number},{number}\]\s*\[{number},{number}\]|starts at {corner} and extends up ?to {corner}"
    flat = rf"<bbox>{number},{number},{number},{number}</bbox>"
    found = re.finditer(f"{pairs}|{flat}", text)
    return [tuple(float(group) for group in match.groups() if group is not None) for match in found]  # type: ignore[misc]


def _from_center(box: Sequence[float]) -> str:
    """Name the side of the centre on which a box lies most, or the centre."""
    right = (box[0] + box[2]) / 2 - 0.5
    below = (box[1] + box[3]) / 2 - 0.5
    if max(abs(right), abs(below)) < 1 / 12:
        return "at the center"
    if abs(below) >= abs(right):
        return "below the center" if below > 0 else "above the center"
    return "to the right of the center" if right > 0 else "to the left of the center"


def _fraction(value: float) -> str:
    fraction = Fraction(value).limit_denominator(_MAX_DENOMINATOR)
    return f"{fraction.numerator}/{fraction.denominator}" if fraction.denominator > 1 else str(fraction.numerator)


def ocr_item(text: str, box: Sequence[float], granularity: int) -> str:
    """Write one string at one of the six granularities (0..5; the report counts them from 1).

    >>> ocr_item("TEXT", (0.192, 0.037, 0.817, 0.203), 3)
    '"TEXT" approximately starts at [0.2, 0.0] and extends up to [0.8, 0.2]'
    """
    x1, y1, x2, y2 = box
    if granularity == 0:
        return f'"{text}"'
    if granularity == 1:
        return f'"{text}" located {_from_center(box)}'
    if granularity == 2:
        down, across = _fraction((y1 + y2) / 2), _fraction((x1 + x2) / 2)
        return (
            f'"{text}" located at {down} of the image from top to bottom and {across} of the image from left to right'
        )
    if granularity == 5:
        return f"<ocr>{text}</ocr><bbox>{write_box(box)}</bbox>"
    word, decimals = (" approximately", 1) if granularity == 3 else ("", 3)
    start, end = ([round(edge, decimals) for edge in corner] for corner in ((x1, y1), (x2, y2)))
    return f'"{text}"{word} starts at {start} and extends up to {end}'


def write_ocr(strings: Sequence[tuple[str, Sequence[float]]], granularity: int, caption: str = "") -> str:
    """Write the strings of an image, (text, box) each, after its raw caption where there is one.

    Raises:
        ValueError: for a granularity outside 0..5.
    """
    if granularity not in OCR_GRANULARITIES:
        raise ValueError(
            f"The OCR granularity is {granularity!r} but must be 0 to 5. It was probably counted from 1, as in the "
            "report: subtract 1."
        )
    items = ", ".join(ocr_item(text, box, granularity) for text, box in strings)
    return f"{caption} {items}" if caption else items


def place_name(box: Sequence[float]) -> str:
    """Name the ninth of the image in which the centre of a box lies.

    >>> place_name((0.8, 0.8, 1.0, 1.0))
    'at the bottom right corner'
    """
    column = min(int((box[0] + box[2]) / 2 * 3), 2)
    row = min(int((box[1] + box[3]) / 2 * 3), 2)
    names = (
        ("at the top left corner", "at the top", "at the top right corner"),
        ("on the left", "in the center", "on the right"),
        ("at the bottom left corner", "at the bottom", "at the bottom right corner"),
    )
    return names[row][column]


def ground(phrase: str, box: Sequence[float], granularity: int, as_published: bool = False) -> str:
    """Write a phrase with where it is, at one of the three granularities (0 coarse, 1 middle, 2 fine).

    The middle one has the report's `object ( grounding_info )`, and inside it the words and brackets of the published
    rows; those write "upto", the report "up to".

    >>> ground("football player", (0.015, 0.005, 0.845, 0.993), 1)
    'football player (starts at [0.015, 0.005] and extends up to [0.845, 0.993])'
    >>> ground("football player", (0.015, 0.005, 0.845, 0.993), 2)
    '<object>football player</object><bbox>[0.015, 0.005][0.845, 0.993]</bbox>'

    Args:
        phrase: of the caption.
        box: of what it names.
        granularity: 0 to 2.
        as_published: write "upto".

    Raises:
        ValueError: for a granularity outside 0..2.
    """
    if granularity == 0:
        return f"{phrase} ({place_name(box)})"
    if granularity == 1:
        x1, y1, x2, y2 = (round(edge, 3) for edge in box)
        return f"{phrase} (starts at [{x1}, {y1}] and extends up{'' if as_published else ' '}to [{x2}, {y2}])"
    if granularity == 2:
        return f"<object>{phrase}</object><bbox>{write_box(box)}</bbox>"
    raise ValueError(
        f"The grounding granularity is {granularity!r} but must be 0 (coarse), 1 (middle) or 2 (fine). It was "
        "probably counted from 1: subtract 1."
    )


def few_shot_question(question: str) -> str:
    """Write the prompt of a question with its image, up to the answer (OpenFlamingo's form)."""
    return f"<image>Question:{question} Short answer:"
