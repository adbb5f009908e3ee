# SPDX-License-Identifier: Apache-2.0
"""The stages of the engine: image -> lines -> the columns `captions` and `metadata`.

Filters of lines stand between the two (`filters.between`): lines are `entries` among a sample's values, and
`dropped_entries` counts those that a filter's name dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...data.formats import UP_TO
from ...jobs.inputs import one_sentence
from ..filters.texts import DROPPED, ENTRIES
from ..stages import Sample, Values
from .choice import make_reader
from .rows import Entry, keep_lines, write_captions, write_metadata

HD_SIDE = 512
"""BLIP3-OCR-HD takes images of which both sides are longer, in pixels (report, version 4)."""


class ReadText:
    """Reads the text of each image, with a reader of its own.

    Args:
        reader: one of `choice.READERS`.
        reader_options: keyword arguments of its class.
        min_confidence: of a line, 0 to 1.
        min_letters: share of letters and digits of a line, 0 to 1.
        is_hd: drop images with a side of `HD_SIDE` or less.
    """

    needs_images = True

    def __init__(
        self,
        reader: str,
        reader_options: Mapping[str, Any] | None = None,
        min_confidence: float = 0.0,
        min_letters: float = 0.0,
        is_hd: bool = False,
    ):
        self._reader = make_reader(reader, reader_options or {})
        self._min_confidence, self._min_letters, self._is_hd = min_confidence, min_letters, is_hd

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add `entries`, `dropped_entries` and `scale`; drop images without text, or without any that is kept."""
        return [self._read(image) for image in images]

    def _read(self, image: Image.Image) -> Values:
        if self._is_hd and min(image.size) <= HD_SIDE:
            return {"filtered_by": "hd"}
        try:
            reading = self._reader.read(image)
        except Exception as error:  # a reader's libraries raise all kinds, some without a message
            return {"error": one_sentence(error)}
        size = (image.height, image.width)
        kept = keep_lines(reading, size, self._reader.dilation, self._min_confidence, self._min_letters)
        if not kept.entries:  # a blank page, or one that lost its last line to a threshold
            return {"filtered_by": [*kept.dropped, "no_text"][0], DROPPED: kept.dropped}
        entries = [entry.to_json() for entry in kept.entries]
        return {ENTRIES: entries, DROPPED: kept.dropped, "scale": reading.scale}


class WriteRows:
    """Writes the lines of each image at every granularity.

    Args:
        up_to: one of `formats.UP_TO_SPELLINGS`.
    """

    needs_images = False

    def __init__(self, up_to: str = UP_TO):
        self._up_to = up_to

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add `captions` and `metadata`."""
        return [self._write(sample) for sample in samples]

    def _write(self, sample: Sample) -> Values:
        entries = [Entry.from_json(values) for values in sample.values[ENTRIES]]
        captions = write_captions(entries, sample.caption, self._up_to)
        return {
            "captions": captions,
            "metadata": write_metadata(entries, sample.values[DROPPED], sample.values["scale"]),
        }
