# SPDX-License-Identifier: Apache-2.0
"""Options of the filters, and the stages they ask for."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from ..packages import NUDENET, OPEN_NSFW, PY3LANGID
from ..stages import Stage, StageSpec
from .hashing import DISTANCE
from .images import ExactDuplicates, Faces, Listed, NearDuplicates, Sides, Unsafe
from .texts import (
    AltTextLanguage,
    AltTextLength,
    CaptionLength,
    Confidence,
    Letters,
    PersonalData,
    TextArea,
    TextLanguage,
)

LEAST_SIDE = 64
MODELS = (NUDENET, OPEN_NSFW, PY3LANGID)
"""Packages with trained weights: another version may drop other images."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that each engine has: of filters of images and of their alt-text."""
    add = parser.add_argument_group("filters of images").add_argument
    add("--min-side", type=_positive, default=LEAST_SIDE, metavar="PIXELS", help="of both sides; default: %(default)s")
    add("--drop-listed", metavar="FOLDER", help="of lists: those that blip3.engines.filters.duplicates writes")
    add("--drop-exact-duplicates", action="store_true", help="of a file in the same shard")
    help = f"of an image in the same shard: bits of 64 in which their pHashes differ; default: {DISTANCE}"
    add("--drop-near-duplicates", type=_bits, nargs="?", const=DISTANCE, metavar="BITS", help=help)
    add("--max-nsfw", type=_share, metavar="SCORE", help="of open_nsfw, 0 to 1; 0.5 is usual")
    help = "images with a face of at least this score; default: 0.5"
    add("--drop-faces", type=_share, nargs="?", const=0.5, metavar="SCORE", help=help)
    add = parser.add_argument_group("filters of alt-text").add_argument
    add("--alt-text-words", type=_positive, nargs=2, metavar=("LEAST", "MOST"), help="of alt-text")
    add("--alt-text-language", nargs="+", metavar="CODE", help="of alt-text: en de ...")


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an engine that writes one caption for an image."""
    add = parser.add_argument_group("filters of captions").add_argument
    add("--caption-words", type=_positive, nargs=2, metavar=("LEAST", "MOST"), help="of a caption that is written")


def add_least_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what a line of text must have at least."""
    add = parser.add_argument_group("lines that are kept").add_argument
    add("--min-confidence", type=_share, metavar="SHARE", help="of a line")
    add("--min-letters", type=_share, metavar="SHARE", help="of letters and digits in a line")


def add_line_options(parser: argparse.ArgumentParser) -> None:
    """Add the further options of an engine that reads lines of text."""
    add = parser.add_argument_group("filters of text in images").add_argument
    add("--min-text-area", type=_share, metavar="SHARE", help="of the image that a line takes")
    add("--text-language", nargs="+", metavar="CODE", help="of all lines of an image: en de ...")
    help = "with an e-mail address, a phone number or a card number"
    add("--drop-personal", choices=("lines", "images"), help=help)
    add("--phone-region", default="", metavar="CODE", help="country of phone numbers without its code: us, de, ...")


def stages(options: argparse.Namespace) -> tuple[list[StageSpec], list[StageSpec]]:
    """Give the filters that come before an engine's own stages, and those that come after."""
    before = [StageSpec(Sides, {"least": options.min_side})] if options.min_side > 1 else []
    before += _given(options.drop_listed, Listed, "folder")
    before += _range(options.alt_text_words, AltTextLength)
    before += _given(options.alt_text_language, AltTextLanguage, "languages")
    # Behind the filters of alt-text: an image is kept with the first of its rows that passes those.
    before += [StageSpec(ExactDuplicates)] if options.drop_exact_duplicates else []
    before += _given(options.drop_near_duplicates, NearDuplicates, "bits")
    before += _given(options.max_nsfw, Unsafe, "most")
    before += _given(options.drop_faces, Faces, "least")
    return before, _range(getattr(options, "caption_words", None), CaptionLength)  # of `add_caption_options`


def describe(specs: Iterable[StageSpec]) -> list[dict[str, Any]]:
    """Say what the rows depend on: each filter with its options, and the version of its model."""
    return [
        {"filter": spec.stage.__name__, **spec.options}
        | ({"version": spec.package.about()["version"]} if spec.package and spec.package in MODELS else {})
        for spec in specs
    ]


def between(options: argparse.Namespace) -> list[StageSpec]:
    """Give the filters of lines, which stand between reading them and writing captions of them.

    Args:
        options: of `add_least_options` and `add_line_options`.

    Raises:
        ValueError: for options that do not fit each other.
    """
    if options.phone_region and not options.drop_personal:
        raise ValueError(
            f"--phone-region is {options.phone_region} without --drop-personal, but phone numbers are looked for with "
            "it alone. It was probably forgotten: add --drop-personal lines, or images."
        )
    filters = _given(options.min_confidence, Confidence, "least")
    filters += _given(options.min_letters, Letters, "least")
    filters += _given(options.min_text_area, TextArea, "least")
    filters += _given(options.text_language, TextLanguage, "languages")
    if options.drop_personal:
        filters.append(StageSpec(PersonalData, {"drop": options.drop_personal, "region": options.phone_region}))
    return filters


def _given(value: Any, stage: type[Stage], name: str) -> list[StageSpec]:
    return [] if value is None else [StageSpec(stage, {name: value})]


def _range(values: Sequence[int] | None, stage: type[Stage]) -> list[StageSpec]:
    if values is None:
        return []
    least, most = values
    if least > most:
        raise ValueError(
            f"The least number of words is {least} and the most is {most}, but the first may not be larger. The two "
            "were probably exchanged: write the smaller number first."
        )
    return [StageSpec(stage, {"least": least, "most": most})]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it is {text} but must be 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"it is {text} but must be from 0 to 1")
    return number


def _bits(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 16:
        raise argparse.ArgumentTypeError(f"it is {text} but must be from 0 to 16: unlike images differ in about 32")
    return number
