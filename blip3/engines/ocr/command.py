# SPDX-License-Identifier: Apache-2.0
"""The command of the engine: its options, the plan they make, and the check against rendered pages."""

import argparse
from typing import Any

from ...data.formats import AS_PUBLISHED, UP_TO
from ...refusals import check_positive
from ..filters import add_least_options, add_line_options, between, describe
from ..stages import EnginePlan, StageSpec
from .check import measure
from .choice import READERS, describe_reader, make_reader
from .stages import HD_SIDE, ReadText, WriteRows

SCHEMA = {"captions": "string", "metadata": "string"}
MIN_CONFIDENCE = 0.8
"""In 25 photographs without text, what was read into them had 0.1 to 0.91; `rows.least_confidence` has the rest."""
MIN_LETTERS = 0.5
"""Both unless the filters' --min-confidence and --min-letters say otherwise; 0 keeps everything."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine, filters of lines among them."""
    add_reading_options(parser)
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--hd", action="store_true", help=f"only images with both sides over {HD_SIDE} pixels, as BLIP3-OCR-HD"
    )
    group.add_argument(
        "--as-published",
        action="store_true",
        help=f"write {AS_PUBLISHED!r} as the published rows do, not {UP_TO!r} as the report does",
    )
    add_line_options(parser)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading: by what, and which lines are kept."""
    parser.add_argument("--reader", choices=READERS, default="rapidocr", help="what reads (default: rapidocr)")
    parser.add_argument(
        "--turned-text",
        action="store_true",
        help="turn text round that stands on its head (rapidocr): for photographs of documents; turns some short "
        "strings that were right",
    )
    paddle = parser.add_argument_group("PaddleOCR (--reader paddleocr)")
    for part, what in (("detection", "detection"), ("recognition", "recognition"), ("orientation", "text direction")):
        paddle.add_argument(f"--paddle-{part}", default="", metavar="FOLDER", help=f"with the {what} model")
    tesseract = parser.add_argument_group("Tesseract (--reader tesseract)")
    tesseract.add_argument("--tesseract-program", default="", metavar="PATH", help="(default: tesseract)")
    tesseract.add_argument("--tesseract-language", default="", metavar="NAME", help="of its data (default: eng)")
    add_least_options(parser)


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    add_reading_options(parser)
    check = parser.add_argument_group("verify")
    check.add_argument("--verify-strings", type=int, default=1000, metavar="N", help="to read (default: 1000)")
    check.add_argument("--verify-seed", type=int, default=0, metavar="N", help="of the rendered pages (default: 0)")


def thresholds(options: argparse.Namespace) -> tuple[float, float]:
    """Give the least confidence and share of letters of a line: those of the filters, or defaults of the engine."""
    confidence = MIN_CONFIDENCE if options.min_confidence is None else options.min_confidence
    return confidence, MIN_LETTERS if options.min_letters is None else options.min_letters


READER_OPTIONS = {
    "rapidocr": ("turned_text",),
    "paddleocr": ("paddle_detection", "paddle_recognition", "paddle_orientation"),
    "tesseract": ("tesseract_program", "tesseract_language"),
}
"""Of each reader alone."""


def reader_options(options: argparse.Namespace) -> dict[str, Any]:
    """Give the keyword arguments of the chosen reader's class.

    Raises:
        ValueError: for an option that the reader does not have.
    """
    for reader, names in READER_OPTIONS.items():
        given = [name for name in names if getattr(options, name)]
        if given and reader != options.reader:
            raise ValueError(
                f"--{given[0].replace('_', '-')} was given with --reader {options.reader}, but it is an option of "
                f"{reader} alone. The reader was probably forgotten: add --reader {reader}, or leave the option out."
            )
    if options.reader == "rapidocr":
        return {"turned_text": options.turned_text}
    if options.reader == "paddleocr":
        return {part: getattr(options, f"paddle_{part}") for part in ("detection", "recognition", "orientation")}
    return {
        "program": options.tesseract_program or "tesseract",
        "language": options.tesseract_language or "eng",
    }


def plan(options: argparse.Namespace) -> EnginePlan:
    """Plan the engine from the parsed options.

    Raises:
        ValueError: for options that do not fit each other.
        ImportError: if the reader's package is not installed.
    """
    about = describe_reader(options.reader, reader_options(options))
    min_confidence, min_letters = thresholds(options)
    read = {
        "reader": options.reader,
        "min_confidence": min_confidence,
        "min_letters": min_letters,
        "is_hd": options.hd,
    }
    write = {"up_to": AS_PUBLISHED if options.as_published else UP_TO}
    filters = between(options)
    return EnginePlan(
        name="ocr",
        stages=(
            StageSpec(ReadText, {**read, "reader_options": reader_options(options)}),
            *filters,
            StageSpec(WriteRows, write),
        ),
        schema=SCHEMA,
        settings={**read, **write, "reader_is": dict(about.settings), "line_filters": describe(filters)},
        made_with=dict(about.made_with),
    )


def verify(options: argparse.Namespace) -> dict[str, float]:
    """Read rendered pages with the chosen reader and compare with what they say; figures as `check.measure` names.

    Raises:
        ValueError: for options that do not fit each other.
        ImportError: if the reader's package is not installed.
    """
    check_positive("--verify-strings is", options.verify_strings)
    reader = make_reader(options.reader, reader_options(options))
    return measure(reader, options.verify_strings, options.verify_seed, *thresholds(options))
