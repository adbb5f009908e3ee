# SPDX-License-Identifier: Apache-2.0
"""How the rendered world says where something is, beside `data.formats`, which has the published words.

Models were trained on these words: they stay as they are, so that a record of a seed stays the same.
"""

from collections.abc import Sequence

from ..data.formats import ground

_NINTHS = (
    ("at the top left corner", "at the top", "at the top right corner"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left corner", "at the bottom", "at the bottom right corner"),
)


def side_of_center(box: Sequence[float]) -> str:
    """Name the side of the centre on which a box lies most, or the centre.

    >>> side_of_center((0.8, 0.7, 1.0, 0.9))
    'to the right of the center'
    """
    right = (box[0] + box[2]) / 2 - 0.5
    below = (box[1] + box[3]) / 2 - 0.5
    if max(abs(right), abs(below)) < 1 / 12:
        return "at the center"
    if abs(below) >= abs(right):
        return "below the center" if below > 0 else "above the center"
    return "to the right of the center" if right > 0 else "to the left of the center"


def ground_rendered(phrase: str, box: Sequence[float], granularity: int) -> str:
    """Write a phrase with where it is, at one of the three granularities (0 coarse, 1 middle, 2 fine).

    >>> [ground_rendered("red cat", (0.3, 0.0, 0.5, 0.2), level) for level in (0, 1)]
    ['red cat (at the top)', 'red cat starts at (0.3, 0.0) and extends up to (0.5, 0.2)']
    """
    if granularity == 0:
        row, column = (min(int((box[axis] + box[axis + 2]) / 2 * 3), 2) for axis in (1, 0))
        return f"{phrase} ({_NINTHS[row][column]})"
    if granularity == 1:
        x1, y1, x2, y2 = (round(edge, 3) for edge in box)
        return f"{phrase} starts at ({x1}, {y1}) and extends up to ({x2}, {y2})"
    return ground(phrase, box, granularity)
