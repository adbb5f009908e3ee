# SPDX-License-Identifier: Apache-2.0
"""What reads the text of an image: the protocol, and what it gives; `choice.py` has the readers by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from .boxes import Quad


@dataclass(frozen=True)
class Line:
    """One line of text, as a reader found it."""

    text: str
    quad: Quad
    """Where, in pixels; grown or not, as the reader does (`OcrReader.dilation`)."""
    confidence: float
    """0 to 1."""


@dataclass(frozen=True)
class Reading:
    """What a reader found in an image."""

    lines: tuple[Line, ...]
    scale: float = 1.0
    """Of the image the text was looked for in, over the image given: below 1 it was too large, and small text may be
    lost."""


class OcrReader(Protocol):
    """What reads the text of images."""

    dilation: float
    """By how much its quadrilaterals are to be tightened (`boxes.tighten`)."""

    def read(self, image: Image.Image) -> Reading:
        """Find and read the text of an image.

        Args:
            image: RGB, of any size.

        Returns:
            lines, in any order.
        """
        ...


@dataclass(frozen=True)
class About:
    """What a reader is made of, for the manifest."""

    settings: Mapping[str, Any]
    """What its lines depend on: versions and the sha256 of its models."""
    made_with: Mapping[str, Any]
    """Names and licences, for the reader of the manifest."""
