# SPDX-License-Identifier: Apache-2.0
"""Boxes that are none, and boxes that say the same twice.

An entry is {"text": tag, "bbox": [x1, y1, x2, y2], "confidence": score}, the box normalised to 0..1.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..stages import Sample, Values
from .phrases import Form, split_form

Entry = dict[str, Any]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Give the intersection of two boxes over their union.

    >>> overlap((0, 0, 1, 1), (0, 0, 1, 0.5))
    0.5
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    total = area(one) + area(other) - shared
    return shared / total if total > 0 else 0.0


def area(box: Sequence[float]) -> float:
    """Give the share of the image that a box covers."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def usable(entries: Iterable[Entry], max_area: float = 1.0) -> list[Entry]:
    """Clip boxes to the image, and leave out those that are inverted, empty, no numbers, or too large.

    Args:
        entries: as detectors give them.
        max_area: largest share of the image that a box may cover.
    """
    found = []
    for entry in entries:
        edges = [float(edge) for edge in entry["bbox"]]
        if all(map(math.isfinite, edges)) and math.isfinite(float(entry["confidence"])):
            box = [round(min(max(edge, 0.0), 1.0), 4) for edge in edges]
            if box[0] < box[2] and box[1] < box[3] and area(box) <= max_area:
                found.append({**entry, "bbox": box})
    return found


def best_first(entries: Iterable[Entry]) -> list[Entry]:
    """Order entries by score, equal ones by tag and box, so that the order of a detector does not matter."""
    return sorted(entries, key=lambda entry: (-entry["confidence"], entry["text"], entry["bbox"]))


def suppress(entries: Iterable[Entry], max_overlap: float) -> list[Entry]:
    """Keep of each tag's boxes that overlap more than `max_overlap` the best (non-maximum suppression).

    Tags are the same where their words are: `Dog` and `dog`, `t-shirt` and `t shirt`.
    """
    kept: dict[Form, list[Entry]] = {}
    found = []
    for entry in best_first(entries):
        same = kept.setdefault(split_form(entry["text"]), [])
        if all(overlap(entry["bbox"], other["bbox"]) <= max_overlap for other in same):
            same.append(entry)
            found.append(entry)
    return found


class TidyBoxes:
    """Stage: takes the detector's faults out of `entries`, best score first.

    Args:
        max_area: largest share of the image that a box may cover.
        max_overlap: of two boxes of one tag, as intersection over union.
    """

    needs_images = False

    def __init__(self, max_area: float, max_overlap: float):
        self.max_area, self.max_overlap = max_area, max_overlap

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Tidy the boxes of each sample."""
        found = (usable(sample.values["entries"], self.max_area) for sample in samples)
        return [{"entries": suppress(entries, self.max_overlap)} for entries in found]
