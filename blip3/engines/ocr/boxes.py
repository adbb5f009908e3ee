# SPDX-License-Identifier: Apache-2.0
"""Quadrilaterals of text: tightened to the ink, ordered as one reads, joined across the views of a large image.

A quadrilateral is four corners (x, y) in pixels, clockwise from the one where the text begins. One line of text is one
quadrilateral, turned as the text is.
"""

from collections.abc import Sequence

import numpy as np

Quad = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
PixelBox = tuple[float, float, float, float]

_SHORT_LINE, _LONG_LINE, _SHORTNESS = 0.16, 0.075, 0.19
"""Of `growth`."""
_SAME_LINE = 0.5
"""Share of the lower of two lines' heights by which they overlap, from which on they stand beside each other."""
_ALIKE = 0.4
"""Share of the higher one's height that the lower must have for it."""
_THICKER = 1.3
"""How much thicker than the thicker of two pieces their union may be and still be one line."""
_COVERED = 0.5
"""Share of a piece inside another, from which on it is a part of that one."""


def growth(width: float, height: float) -> float:
    """Give by how many pixels a detector of the PP-OCR family grew each side of a line, in the mean.

    Such a detector finds the middle of a line and grows it (DB, arXiv:1911.08947, section 3.4): good for reading, but
    the box then holds more than the ink. Measured on lines of known ink in 20 faces: a sixth of the shorter side for
    a short word, half as much for a long line.

    Args:
        width: of the grown box, along the line or across it.
        height: the other side.
    """
    short, long = sorted((width, height))
    return short * min(_SHORT_LINE, _LONG_LINE + _SHORTNESS * short / long) if long else 0.0


def tighten(quad: Quad, dilation: float) -> Quad:
    """Move each side of a quadrilateral in by `dilation` times what a detector grew it by (`growth`).

    Args:
        quad: as detected, turned as it may be.
        dilation: 0 leaves it as it is.

    >>> tighten(((0, 0), (40, 0), (40, 20), (0, 20)), 1.0)
    ((3.2, 3.2), (36.8, 3.2), (36.8, 16.8), (3.2, 16.8))
    """
    corners = np.asarray(quad, dtype=np.float64)  # (4, 2)
    along = (corners[1] - corners[0] + corners[2] - corners[3]) / 2
    down = (corners[3] - corners[0] + corners[2] - corners[1]) / 2
    return _move_in(corners, along, down, dilation * growth(float(np.hypot(*along)), float(np.hypot(*down))))


def _move_in(corners: np.ndarray, along: np.ndarray, down: np.ndarray, distance: float) -> Quad:
    """Move the sides of a quadrilateral in, or out if the distance is negative; pixels."""
    width, height = float(np.hypot(*along)), float(np.hypot(*down))
    across, below = (side / length * distance if length else side for side, length in ((along, width), (down, height)))
    moved = corners + np.array([across + below, below - across, -across - below, across - below])
    first, second, third, fourth = ((float(x), float(y)) for x, y in moved)
    return first, second, third, fourth


def cut_quad(quad: Quad, part: PixelBox, dilation: float) -> Quad:
    """Cut a part out of a quadrilateral and grow it so that `tighten` gives the part.

    Args:
        quad: of a line.
        part: (x1, y1, x2, y2) as shares of its width and height.
        dilation: as `tighten` takes it.

    >>> piece = cut_quad(((0, 0), (100, 0), (100, 20), (0, 20)), (0.5, 0.25, 1.0, 0.75), 1.0)
    >>> [[round(value, 3) for value in corner] for corner in tighten(piece, 1.0)]
    [[50.0, 5.0], [100.0, 5.0], [100.0, 15.0], [50.0, 15.0]]
    """
    corners = np.asarray(quad, dtype=np.float64)
    x1, y1, x2, y2 = part
    shares = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    across, below = shares[:, :1], shares[:, 1:]
    top = corners[0] + (corners[1] - corners[0]) * across
    bottom = corners[3] + (corners[2] - corners[3]) * across
    inner = top + (bottom - top) * below
    along, down = inner[1] - inner[0], inner[3] - inner[0]
    width, height = float(np.hypot(*along)), float(np.hypot(*down))
    distance = 0.0
    for _ in range(30):  # the growth depends on the sides it gives; it converges because it is a small share of them
        distance = dilation * growth(width + 2 * distance, height + 2 * distance)
    return _move_in(inner, along, down, -distance)


def bounding_box(quad: Quad, size: tuple[int, int]) -> PixelBox:
    """Give the upright box (x1, y1, x2, y2) around a quadrilateral, normalised and within the image.

    Args:
        quad: in pixels.
        size: (height, width) of the image in pixels.
    """
    height, width = size
    xs, ys = zip(*quad, strict=True)
    edges = (min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height)
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in edges)
    return x1, y1, x2, y2


def reading_order(quads: Sequence[Quad]) -> list[int]:
    """Order lines from top to bottom, and from left to right where they stand beside each other.

    Returns:
        indices into `quads`.
    """
    tops = [min(y for _, y in quad) for quad in quads]
    bottoms = [max(y for _, y in quad) for quad in quads]
    rows: list[list[int]] = []
    for index in sorted(range(len(quads)), key=lambda index: tops[index] + bottoms[index]):
        if rows:
            last = rows[-1][-1]
            shared = min(bottoms[index], bottoms[last]) - max(tops[index], tops[last])
            lower, higher = sorted(bottoms[each] - tops[each] for each in (index, last))
            if shared > _SAME_LINE * lower and lower > _ALIKE * higher:
                rows[-1].append(index)
                continue
        rows.append([index])
    return [index for row in rows for index in sorted(row, key=lambda index: min(x for x, _ in quads[index]))]


def thickness(quad: Quad) -> float:
    """Give the shorter side of a quadrilateral, in pixels."""
    corners = np.asarray(quad, dtype=np.float64)
    return float(min(np.hypot(*(corners[1] - corners[0])), np.hypot(*(corners[3] - corners[0]))))


def join_views(views: Sequence[Sequence[Quad]]) -> list[Quad]:
    """Join what was found in overlapping views of one image, so that each line of text is there once and whole.

    A line that a view's edge cut is found as two pieces, which overlap where the views do: they become one. What lies
    inside a line of another view, as a single letter of a headline does, is dropped.

    Args:
        views: quadrilaterals of each view, in pixels of the whole image.
    """
    kept = [(number, quad) for number, quads in enumerate(views) for quad in quads]
    kept.sort(key=lambda entry: -_area(entry[1]))
    joined: list[tuple[int, Quad]] = []
    while kept:
        number, quad = kept.pop(0)
        for index, (other_number, other) in enumerate(joined):
            union = _union(quad, other) if other_number != number and _touch(quad, other) else None
            if union is not None:
                del joined[index]
                kept.insert(0, (-1 if union != other else other_number, union))
                break
        else:
            joined.append((number, quad))
    return [quad for _, quad in joined]


def _union(piece: Quad, line: Quad) -> Quad | None:
    """Give one line for two pieces of it, or None where they are two lines."""
    import cv2

    points = np.asarray([*piece, *line], dtype=np.float32)
    center, sides, angle = cv2.minAreaRect(points)
    if min(sides) <= _THICKER * max(thickness(piece), thickness(line)):
        return order_corners(cv2.boxPoints((center, sides, angle)))
    inside, _ = cv2.intersectConvexConvex(np.asarray(piece, np.float32), np.asarray(line, np.float32))
    return line if inside > _COVERED * _area(piece) else None


def order_corners(points: np.ndarray) -> Quad:
    """Order the corners of a rectangle clockwise from the top left.

    Args:
        points: (4, 2), clockwise or not.
    """
    by_x = points[np.argsort(points[:, 0], kind="stable")]
    (left_top, left_bottom), (right_top, right_bottom) = (
        side[np.argsort(side[:, 1], kind="stable")] for side in (by_x[:2], by_x[2:])
    )
    first, second, third, fourth = ((float(x), float(y)) for x, y in (left_top, right_top, right_bottom, left_bottom))
    return first, second, third, fourth


def _area(quad: Quad) -> float:
    xs, ys = np.asarray(quad, dtype=np.float64).T
    return float(abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1))) / 2)


def _touch(one: Quad, other: Quad) -> bool:
    """Whether the upright boxes around two quadrilaterals overlap."""
    (left, top), (right, bottom) = np.min(one, axis=0), np.max(one, axis=0)
    (other_left, other_top), (other_right, other_bottom) = np.min(other, axis=0), np.max(other, axis=0)
    return bool(left < other_right and other_left < right and top < other_bottom and other_top < bottom)
