# SPDX-License-Identifier: Apache-2.0
"""The readers by name.

rapidocr   PP-OCRv6 small, inside the package's wheel, on onnxruntime: the default
paddleocr  the report's engine, with models from folders that you name
tesseract  the program `tesseract`, for printed pages

Each limits itself to one thread: there is one reader in each worker, and a worker for each core.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...jobs.inputs import one_sentence
from ...refusals import check_choice
from . import paddle, rapid, tesseract
from .readers import About, OcrReader

READERS: dict[str, Any] = {"rapidocr": rapid, "paddleocr": paddle, "tesseract": tesseract}
"""Name -> module with a class `Reader` and a function `about` of the same arguments; it imports its package late."""


def make_reader(name: str, options: Mapping[str, Any]) -> OcrReader:
    """Load a reader, and try it on a blank image: what fails there is no fault of an image.

    Args:
        name: one of `READERS`.
        options: keyword arguments of its class.

    Raises:
        ValueError: for an unknown name, or options it cannot work with.
        ImportError: if its package is not installed.
        RuntimeError: if it cannot read a blank image.
    """
    check_choice("The OCR reader is", name, READERS)
    reader: OcrReader = READERS[name].Reader(**options)
    try:
        reader.read(Image.new("RGB", (64, 64), "white"))
    except Exception as error:  # a reader's libraries raise all kinds
        raise RuntimeError(
            f"The OCR reader {name!r} failed at a blank image ({one_sentence(error)}), but is to read yours. A model "
            "or language is probably missing, or versions of its packages do not fit each other: install others."
        ) from error
    return reader


def describe_reader(name: str, options: Mapping[str, Any]) -> About:
    """Say what a reader is made of, without loading its models; raises as `make_reader`."""
    check_choice("The OCR reader is", name, READERS)
    return READERS[name].about(**options)
