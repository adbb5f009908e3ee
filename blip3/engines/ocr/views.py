# SPDX-License-Identifier: Apache-2.0
"""Where a detector looks: at one enlarged view of a small image, at several overlapping ones of a large image.

    700 x 500     one view, enlarged until small print can be found
    5000 x 5000   one view of the whole, shrunk, for headlines; and views at full size, which overlap
    30 x 4000     views along the strip

A detector that shrinks a large image loses its small print without a word. Here nothing is shrunk that is not looked
at in full size too, up to `MAX_VIEWS` views. Beyond, all is shrunk and the scale says so.
"""

import math
from dataclasses import dataclass

VIEW_SIDE = 1600
"""Longest side of a view, in pixels of the image."""
ENLARGED_SIDE = 800
"""Longest side of a small image that is enlarged, in pixels of the detector's input."""
OVERVIEW_SIDE = 736
"""Longest side of a shrunk view: letters of more than about 200 pixels are not seen as words."""
OVERLAP = 240
"""Of two views, in pixels: a line of text up to this height is whole in one of them across its direction."""
MAX_VIEWS = 81
"""At full size: images up to about 12,000 x 12,000 pixels."""


@dataclass(frozen=True)
class View:
    """A part of an image at a scale."""

    left: int
    top: int
    right: int
    bottom: int
    """In pixels of the image; right and bottom are outside."""
    scale: float
    """Of the view, over the image."""
    is_whole: bool = False
    """A shrunk view of a whole image that has others: only text too high for them counts."""


def plan_views(size: tuple[int, int], short_side: int, most_enlarged: float) -> list[View]:
    """Plan where to look in an image.

    Args:
        size: (height, width) in pixels.
        short_side: small images are enlarged until their shorter side has so many pixels,
        most_enlarged: but at most so many times.

    Returns:
        one view, or a shrunk one of the whole and the others.

    >>> [(view.left, view.right, view.scale) for view in plan_views((100, 1800), 300, 2.0)]
    [(0, 1020, 2.0), (780, 1800, 2.0)]
    """
    height, width = size
    shrunk = min(1.0, _affordable_scale(size))
    enlarged = max(1.0, min(short_side / min(size), most_enlarged, ENLARGED_SIDE / max(size)))
    if max(size) <= VIEW_SIDE:
        return [View(0, 0, width, height, enlarged)]
    scale = shrunk if shrunk < 1 else max(1.0, min(short_side / min(size), most_enlarged))
    side = int(VIEW_SIDE / shrunk)
    rows, columns = _spans(height, side, int(OVERLAP / shrunk)), _spans(width, side, int(OVERLAP / shrunk))
    views = [View(left, top, right, bottom, scale) for top, bottom in rows for left, right in columns]
    is_strip = len(rows) == 1 or len(columns) == 1
    whole = [] if is_strip and min(size) <= OVERLAP else [View(0, 0, width, height, OVERVIEW_SIDE / max(size), True)]
    return whole + views


def _affordable_scale(size: tuple[int, int]) -> float:
    """The scale at which an image needs no more than `MAX_VIEWS` views; above 1 it could be larger."""
    scale, step = 1.0, VIEW_SIDE - OVERLAP
    while math.prod(max(1, math.ceil((side * scale - OVERLAP) / step)) for side in size) > MAX_VIEWS:
        scale *= 0.95
    return scale


def _spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a length into equal spans of at most `side`, which overlap."""
    if length <= side:
        return [(0, length)]
    count = math.ceil((length - overlap) / (side - overlap))
    span = math.ceil((length + (count - 1) * overlap) / count)
    step = (length - span) / (count - 1)
    return [(round(index * step), round(index * step) + span) for index in range(count)]
