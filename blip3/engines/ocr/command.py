# SPDX-License-Identifier: Apache-2.0
"""The command of the engine: its options, the plan they make, and the check against rendered pages."""

import argparse
from typing import Any

from ...data.formats import AS_PUBLISHED, UP_TO
from ...refusals import check_positive
from ..stages import EnginePlan, StageSpec
from .check import measure
from .choice import READERS, describe_reader, make_reader
from .stages import HD_SIDE, ReadText

SCHEMA = {"captions": "string", "metadata": "string"}
MIN_CONFIDENCE = 0.8
"""In 25 photographs without text, what was read into them had 0.1 to 0.91; `rows.least_confidence` has the rest."""
MIN_LETTERS = 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine."""
    parser.add_argument("--reader", choices=READERS, default="rapidocr", help="what reads (default: rapidocr)")
    parser.add_argument(
        "--min-text-confidence",
        type=_share,
        default=MIN_CONFIDENCE,
        metavar="SHARE",
        help=f"drop lines that the reader is less sure of, 0 to 1 (default: {MIN_CONFIDENCE})",
    )
    parser.add_argument(
        "--min-text-letters",
        type=_share,
        default=MIN_LETTERS,
        metavar="SHARE",
        help=f"drop lines with a smaller share of letters and digits, 0 to 1 (default: {MIN_LETTERS})",
    )
    parser.add_argument(
        "--turned-text",
        action="store_true",
        help="turn text round that stands on its head (rapidocr): for photographs of documents; turns some short "
        "strings that were right",
    )
    parser.add_argument(
        "--hd", action="store_true", help=f"only images with both sides over {HD_SIDE} pixels, as BLIP3-OCR-HD"
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help=f"write {AS_PUBLISHED!r} as the published rows do, not {UP_TO!r} as the report does",
    )
    paddle = parser.add_argument_group("PaddleOCR (--reader paddleocr)")
    for part, what in (("detection", "detection"), ("recognition", "recognition"), ("orientation", "text direction")):
        paddle.add_argument(f"--paddle-{part}", default="", metavar="FOLDER", help=f"with the {what} model")
    tesseract = parser.add_argument_group("Tesseract (--reader tesseract)")
    tesseract.add_argument("--tesseract-program", default="tesseract", metavar="PATH", help="(default: tesseract)")
    tesseract.add_argument("--tesseract-language", default="eng", metavar="NAME", help="of its data (default: eng)")
    check = parser.add_argument_group("verify")
    check.add_argument("--verify-strings", type=int, default=1000, metavar="N", help="to read (default: 1000)")
    check.add_argument("--verify-seed", type=int, default=0, metavar="N", help="of the rendered pages (default: 0)")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: pass a number from 0 to 1, such as 0.5")
    return value


def reader_options(options: argparse.Namespace) -> dict[str, Any]:
    """Give the keyword arguments of the chosen reader's class.

    Raises:
        ValueError: for an option that the reader does not have.
    """
    if options.turned_text and options.reader != "rapidocr":
        raise ValueError(
            f"--turned-text was given with --reader {options.reader}, but only rapidocr brings a model for it. "
            "It was probably meant for another reader: with paddleocr name its model by --paddle-orientation, or "
            "leave the option out."
        )
    if options.reader == "rapidocr":
        return {"turned_text": options.turned_text}
    if options.reader == "paddleocr":
        return {part: getattr(options, f"paddle_{part}") for part in ("detection", "recognition", "orientation")}
    return {"program": options.tesseract_program, "language": options.tesseract_language}


def plan(options: argparse.Namespace) -> EnginePlan:
    """Plan the engine from the parsed options.

    Raises:
        ValueError: for options that do not fit each other.
        ImportError: if the reader's package is not installed.
    """
    about = describe_reader(options.reader, reader_options(options))
    stage = {
        "reader": options.reader,
        "reader_options": reader_options(options),
        "min_confidence": options.min_text_confidence,
        "min_letters": options.min_text_letters,
        "up_to": AS_PUBLISHED if options.as_published else UP_TO,
        "is_hd": options.hd,
    }
    settings = {name: value for name, value in stage.items() if name != "reader_options"}
    return EnginePlan(
        name="ocr",
        stages=(StageSpec(ReadText, stage),),
        schema=SCHEMA,
        settings={**settings, "reader_is": dict(about.settings)},
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
    thresholds = (options.min_text_confidence, options.min_text_letters)
    return measure(reader, options.verify_strings, options.verify_seed, *thresholds)
