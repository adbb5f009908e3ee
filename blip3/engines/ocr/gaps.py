# SPDX-License-Identifier: Apache-2.0
"""Strings side by side, such as the cells of a table, which a detector took for one line.

They are told apart by what stands between them: a rule from top to bottom of the line, or a gap as wide as the letters
are high. A space between two words is neither.
"""

import numpy as np

_LEAST_CONTRAST = 24
"""Between the lightest and the darkest pixel of a line, of 255; below, nothing is told apart."""
_INK = 0.25
"""Of that contrast: a column with less difference between its own pixels is blank."""
_RULE = 0.12
"""Of that contrast: a blank column that differs so much from those beside it is a rule."""
_MARGIN = 0.1
"""Share of the line's height left out above and below, where its neighbours may reach in."""
_WIDE_GAP = 0.5
"""Share of the line's height, which a detector grew to twice the letters' own."""
_WIDEST_RULE = 0.2
"""Share of the line's height."""

Span = tuple[int, int, int, int]


def find_strings(line: np.ndarray) -> list[Span]:
    """Find the strings of a line of text.

    Args:
        line: (height, width, 3) uint8, cut out with some background above and below.

    Returns:
        (left, top, right, bottom) of the ink of each in pixels, from left to right; one string or none is an empty
        list, because there is nothing to split.
    """
    height, width = line.shape[:2]
    gray = line.astype(np.float32).mean(axis=2)
    contrast = float(gray.max() - gray.min())
    margin = int(height * _MARGIN)
    if contrast < _LEAST_CONTRAST or width < 2 * height or height < 8:
        return []
    inner = gray[margin : height - margin]
    is_blank = np.ptp(inner, axis=0) < _INK * contrast  # (width,)
    runs = _runs(is_blank)
    breaks = [
        (start, end)
        for start, end in runs
        if end - start >= _WIDE_GAP * height or _has_rule(inner[:, start:end].mean(axis=0), contrast, height)
    ]
    edges = [0, *(edge for pair in breaks for edge in pair), width]
    pieces = list(zip(edges[::2], edges[1::2], strict=True))
    spans = [_ink(gray, start, end, is_blank, contrast) for start, end in pieces]
    found = [span for span in spans if span is not None]
    return found if len(found) > 1 else []


def _runs(is_blank: np.ndarray) -> list[tuple[int, int]]:
    """Give (start, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_blank, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _has_rule(means: np.ndarray, contrast: float, height: int) -> bool:
    """Whether a narrow band within a blank run differs from both sides.

    Args:
        means: (columns,) of the run.
        contrast: of the line.
        height: of the line.
    """
    background = np.median(means)
    is_other = np.abs(means - background) > _RULE * contrast
    inside = [(start, end) for start, end in _runs(is_other) if start > 0 and end < len(means)]
    return any(end - start <= max(2, _WIDEST_RULE * height) for start, end in inside)


def _ink(gray: np.ndarray, start: int, end: int, is_blank: np.ndarray, contrast: float) -> Span | None:
    """Give the box of the ink between two columns, or None if there is none."""
    columns = np.flatnonzero(~is_blank[start:end])
    if not len(columns):
        return None
    left, right = start + int(columns[0]), start + int(columns[-1]) + 1
    rows = np.flatnonzero(np.ptp(gray[:, left:right], axis=1) >= _INK * contrast)
    return (left, int(rows[0]), right, int(rows[-1]) + 1) if len(rows) else None
