# SPDX-License-Identifier: Apache-2.0
"""What reads the text of an image: the protocol, and the readers by name.

    rapidocr   PP-OCRv6 small, inside the package's wheel, on onnxruntime: the default
    paddleocr  the report's engine, with models from folders that you name
    tesseract  the program `tesseract`, for printed pages

Each limits itself to one thread: there is one reader in each worker, and a worker for each core.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ...refusals import check_choice
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


MODULES = {"rapidocr": "rapid", "paddleocr": "paddle", "tesseract": "tesseract"}
"""Reader -> module of this folder, with a class `Reader` and a function `about` of the same arguments."""
READERS = tuple(MODULES)


def make_reader(name: str, options: Mapping[str, Any]) -> OcrReader:
    """Load a reader.

    Args:
        name: one of `READERS`.
        options: keyword arguments of its class.

    Raises:
        ValueError: for an unknown name, or options it cannot work with.
        ImportError: if its package is not installed.
    """
    return _module(name).Reader(**options)


def describe_reader(name: str, options: Mapping[str, Any]) -> About:
    """Say what a reader is made of, without loading its models; raises as `make_reader`."""
    return _module(name).about(**options)


def _module(name: str) -> Any:
    check_choice("The OCR reader is", name, MODULES)
    return importlib.import_module(f"..{MODULES[name]}", __name__)
