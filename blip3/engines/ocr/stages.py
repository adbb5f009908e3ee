# SPDX-License-Identifier: Apache-2.0
"""The one stage of the engine: image -> the columns `captions` and `metadata`."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...data.formats import UP_TO
from ...jobs.inputs import one_sentence
from ..stages import Sample, Values
from .choice import make_reader
from .rows import keep_lines, write_captions, write_metadata

HD_SIDE = 512
"""BLIP3-OCR-HD takes images of which both sides are longer, in pixels (report, version 4)."""


class ReadText:
    """Reads the text of each image, with a reader of its own.

    Args:
        reader: one of `choice.READERS`.
        reader_options: keyword arguments of its class.
        min_confidence: of a line, 0 to 1.
        min_letters: share of letters and digits of a line, 0 to 1.
        up_to: one of `formats.UP_TO_SPELLINGS`.
        is_hd: drop images with a side of `HD_SIDE` or less.
    """

    needs_images = True

    def __init__(
        self,
        reader: str,
        reader_options: Mapping[str, Any] | None = None,
        min_confidence: float = 0.0,
        min_letters: float = 0.0,
        up_to: str = UP_TO,
        is_hd: bool = False,
    ):
        self._reader = make_reader(reader, reader_options or {})
        self._min_confidence, self._min_letters = min_confidence, min_letters
        self._up_to, self._is_hd = up_to, is_hd

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Read the text of the samples' images; see `Stage`."""
        return [self._read(sample, image) for sample, image in zip(samples, images, strict=True)]

    def _read(self, sample: Sample, image: Image.Image) -> Values:
        if self._is_hd and min(image.size) <= HD_SIDE:
            return {"filtered_by": "hd"}
        try:
            reading = self._reader.read(image)
        except Exception as error:  # a reader's libraries raise all kinds, some without a message
            return {"error": one_sentence(error)}
        size = (image.height, image.width)
        kept = keep_lines(reading, size, self._reader.dilation, self._min_confidence, self._min_letters)
        metadata = write_metadata(kept, reading.scale)
        if not kept.entries:
            return {"filtered_by": "no_text", "metadata": metadata}
        return {"captions": write_captions(kept.entries, sample.caption, self._up_to), "metadata": metadata}
