# SPDX-License-Identifier: Apache-2.0
"""The exact texts of the recipe: OCR at six granularities, grounding at three, few-shot prompts.

Boxes are (x1, y1, x2, y2), normalised to 0..1. The strings in brackets, quotes and tags are those of the BLIP-3 report
(arXiv:2408.08872) and its dataset cards; how several items are joined is ours: with commas.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

Box = tuple[float, float, float, float]

OCR_GRANULARITIES = range(6)
GROUNDING_GRANULARITIES = range(3)
UP_TO = "up to"
"""In the report and on the card."""
AS_PUBLISHED = "upto"
"""In the rows of the published data sets, according to a parser that others wrote for them."""
UP_TO_SPELLINGS = (UP_TO, AS_PUBLISHED)
_MAX_DENOMINATOR = 17  # the report's own example is 2/17
_NUMBER = r"\s*(\d*\.?\d+|\d+\.)\s*"
_PLACES = (  # five of them are in the report's samples, the other four by symmetry
    ("at the top left corner", "above the center", "at the top right corner"),
    ("to the left of the center", "in the center", "to the right of the center"),
    ("at the bottom left corner", "below the center", "at the bottom right corner"),
)


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
    corner = rf"[\[(]{_NUMBER},{_NUMBER}[\])]"
    between = "|".join(UP_TO_SPELLINGS)
    pairs = rf"\[{_NUMBER},{_NUMBER}\]\s*\[{_NUMBER},{_NUMBER}\]|starts at {corner} and extends (?:{between}) {corner}"
    flat = rf"<bbox>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</bbox>"
    found = re.finditer(f"{pairs}|{flat}", text)
    return [tuple(float(group) for group in match.groups() if group is not None) for match in found]  # type: ignore[misc]


def _fraction(value: float) -> str:
    fraction = Fraction(value).limit_denominator(_MAX_DENOMINATOR)
    return f"{fraction.numerator}/{fraction.denominator}" if fraction.denominator > 1 else str(fraction.numerator)


def place_name(box: Sequence[float]) -> str:
    """Name the ninth of the image in which the centre of a box lies, as the published samples do.

    >>> [place_name((x, y, x, y)) for x, y in ((0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.9, 0.5))]
    ['at the top left corner', 'above the center', 'in the center', 'to the right of the center']
    """
    column = min(int((box[0] + box[2]) / 2 * 3), 2)
    row = min(int((box[1] + box[3]) / 2 * 3), 2)
    return _PLACES[row][column]


def ocr_item(
    text: str,
    box: Sequence[float],
    granularity: int,
    place: Callable[[Sequence[float]], str] = place_name,
    up_to: str = UP_TO,
) -> str:
    """Write one string at one of the six granularities (0..5; the report counts them from 1).

    Args:
        text: of the string.
        box: normalised.
        granularity: 0 to 5.
        place: gives the words for where a box lies, granularity 1.
        up_to: one of `UP_TO_SPELLINGS`.

    >>> ocr_item("TEXT", (0.192, 0.037, 0.817, 0.203), 3)
    '"TEXT" approximately starts at [0.2, 0.0] and extends up to [0.8, 0.2]'
    """
    x1, y1, x2, y2 = box
    if granularity == 0:
        return f'"{text}"'
    if granularity == 1:
        return f'"{text}" located {place(box)}'
    if granularity == 2:
        down, across = _fraction((y1 + y2) / 2), _fraction((x1 + x2) / 2)
        return (
            f'"{text}" located at {down} of the image from top to bottom and {across} of the image from left to right'
        )
    if granularity == 5:
        return f"<ocr>{text}</ocr><bbox>{write_box(box)}</bbox>"
    word, decimals = (" approximately", 1) if granularity == 3 else ("", 3)
    start, end = ([round(edge, decimals) for edge in corner] for corner in ((x1, y1), (x2, y2)))
    return f'"{text}"{word} starts at {start} and extends {up_to} {end}'


def write_ocr(
    strings: Sequence[tuple[str, Sequence[float]]],
    granularity: int,
    caption: str = "",
    place: Callable[[Sequence[float]], str] = place_name,
    up_to: str = UP_TO,
) -> str:
    """Write the strings of an image, (text, box) each, after its raw caption where there is one.

    Args:
        strings: in reading order.
        granularity: 0 to 5.
        caption: the raw one.
        place: as `ocr_item` takes it.
        up_to: as `ocr_item` takes it.

    Raises:
        ValueError: for a granularity outside 0..5.
    """
    if granularity not in OCR_GRANULARITIES:
        raise ValueError(
            f"The OCR granularity is {granularity!r} but must be 0 to 5. It was probably counted from 1, as in the "
            "report: subtract 1."
        )
    items = ", ".join(ocr_item(text, box, granularity, place, up_to) for text, box in strings)
    return f"{caption} {items}" if caption else items


def parse_ocr(text: str) -> list[tuple[str, Box]]:
    """Find the strings of an OCR text that has boxes (granularity 3, 4 or 5), in either published spelling.

    >>> parse_ocr('Sign. "A" starts at [0.1, 0.2] and extends upto [0.3, 0.4], <ocr>B</ocr><bbox>[0, 0][1, 1]</bbox>')
    [('A', (0.1, 0.2, 0.3, 0.4)), ('B', (0.0, 0.0, 1.0, 1.0))]
    """
    corner = rf"\[{_NUMBER},{_NUMBER}\]"
    between = "|".join(UP_TO_SPELLINGS)
    words = rf'"(.*?)"(?: approximately)? starts at {corner} and extends (?:{between}) {corner}'
    tags = rf"<ocr>(.*?)</ocr>\s*<bbox>{corner}\s*{corner}</bbox>"
    found = []
    for match in re.finditer(f"{words}|{tags}", text, re.DOTALL):
        string, *edges = [group for group in match.groups() if group is not None]
        found.append((string, tuple(float(edge) for edge in edges)))
    return found  # type: ignore[return-value]


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
