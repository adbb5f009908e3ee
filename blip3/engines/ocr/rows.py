# SPDX-License-Identifier: Apache-2.0
"""Lines of text -> the two columns of BLIP3-OCR: `captions` and `metadata`, both JSON.

captions  [{"text", "granularity", "include_datacomp_raw_cap"}, ...]: six granularities, 0 to 5, without and with the
          raw caption in front. Readers select by granularity, never by place.
metadata  {"length", "entries": [{"text", "bbox", "confidence"}], "dropped", "scale"}: the strings themselves, how many
          lines were dropped and why, and by how much a gigantic image was shrunk
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.formats import OCR_GRANULARITIES, UP_TO, Box, write_ocr
from ..filters.texts import letters
from ..texts import clean
from .boxes import bounding_box, reading_order, tighten
from .readers import Line, Reading

BOX_DECIMALS = 4


@dataclass(frozen=True)
class Entry:
    """One string, as a row has it."""

    text: str
    box: Box
    """Of the ink, normalised."""
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """Give the form of `metadata`."""
        return {"text": self.text, "bbox": list(self.box), "confidence": self.confidence}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Entry":
        """Read the form of `metadata`."""
        x1, y1, x2, y2 = values["bbox"]
        return Entry(values["text"], (x1, y1, x2, y2), values["confidence"])


@dataclass(frozen=True)
class Kept:
    """What of a reading becomes a row, and how much does not."""

    entries: tuple[Entry, ...]
    dropped: dict[str, int]
    """Why -> number of lines: `confidence`, `letters`."""


def least_confidence(text: str, min_confidence: float) -> float:
    """Give the confidence a line must have: a lone character may be in doubt by a quarter as much as other lines.

    Detectors take round things for text: a cup is read as 8, an eye as O, with more confidence than other false text.

    >>> least_confidence("8", 0.8), least_confidence("80", 0.8), least_confidence("8", 0.0)
    (0.95, 0.8, 0.0)
    """
    is_lone = len(text.strip()) == 1 and min_confidence > 0
    return round(1 - (1 - min_confidence) / 4, 6) if is_lone else min_confidence


def keep_lines(
    reading: Reading, size: tuple[int, int], dilation: float, min_confidence: float = 0.0, min_letters: float = 0.0
) -> Kept:
    """Tighten, order and filter the lines of an image.

    Args:
        reading: of a reader.
        size: (height, width) of the image in pixels.
        dilation: of the reader.
        min_confidence: 0 to 1; less sure lines are dropped and counted (`least_confidence`).
        min_letters: share of letters and digits; lines with fewer are dropped and counted, and those that are nothing
            but a marker of our texts.
    """
    sure = [line for line in reading.lines if line.confidence >= least_confidence(line.text, min_confidence)]
    kept = [line for line in sure if letters(line.text) >= min_letters and clean(line.text).strip()]
    quads = [tighten(line.quad, dilation) for line in kept]
    entries = [_entry(kept[index], bounding_box(quads[index], size)) for index in reading_order(quads)]
    dropped = {"confidence": len(reading.lines) - len(sure), "letters": len(sure) - len(kept)}
    return Kept(tuple(entries), {name: count for name, count in dropped.items() if count})


def _entry(line: Line, box: Box) -> Entry:
    x1, y1, x2, y2 = (round(edge, BOX_DECIMALS) for edge in box)
    return Entry(" ".join(clean(line.text).split()), (x1, y1, x2, y2), round(line.confidence, 4))


def write_captions(entries: Sequence[Entry], raw_caption: str = "", up_to: str = UP_TO) -> str:
    """Write the column `captions`: six entries, and six more if there is a raw caption.

    Args:
        entries: in reading order.
        raw_caption: the alt-text; without one there is nothing to put in front.
        up_to: one of `formats.UP_TO_SPELLINGS`.
    """
    strings = [(entry.text, entry.box) for entry in entries]
    raw = " ".join(raw_caption.split())
    captions = [
        {
            "text": write_ocr(strings, granularity, raw if has_caption else "", up_to=up_to),
            "granularity": granularity,
            "include_datacomp_raw_cap": has_caption,
        }
        for granularity in OCR_GRANULARITIES
        for has_caption in ((False, True) if raw else (False,))
    ]
    return json.dumps(captions, ensure_ascii=False)


def write_metadata(entries: Sequence[Entry], dropped: Mapping[str, int], scale: float = 1.0) -> str:
    """Write the column `metadata`.

    Args:
        entries: in reading order.
        dropped: name of a filter -> number of lines it dropped.
        scale: of the reading; written where it is below 1.
    """
    values = {
        "length": len(entries),
        "entries": [entry.to_json() for entry in entries],
        "dropped": dict(dropped),
        **({"scale": round(scale, 4)} if scale < 1 else {}),
    }
    return json.dumps(values, ensure_ascii=False)
