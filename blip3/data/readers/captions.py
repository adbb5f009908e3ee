# SPDX-License-Identifier: Apache-2.0
"""Images with one text: captions (KALE, Datacomp, CC, SBU, VG) and their fusions, BLIP3-OCR and BLIP3-GROUNDING."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..records import IMAGE_TOKEN, Record, Skip, Turn
from .rows import Row, a_list, a_text, convert_rows, fault, finish_record, identity_of, image_of, need

_FILLER = re.compile(
    r"\b(?:the (?:image|picture) (?:contains|shows) )?(?:the |a )?(?:text|word)s?"
    r"(?: (?:that )?(?:reads?|says?|reading|saying))?:? (?=[\"<])",
    re.IGNORECASE,
)


def read_captions(
    rows: Iterable[Row], column: str = "caption", image_folder: str = "", skip_faulty: Skip = False
) -> Iterator[Record]:
    """Read images with a caption.

    Args:
        rows: with `column` and an image: `image`, `jpg`, `png`, or `key` of a file in `image_folder`.
        column: of the caption; `txt` in webdataset shards.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        caption = a_text(need(row, place, column), place, column)
        turns = (Turn("document", IMAGE_TOKEN + caption.strip()),)
        yield finish_record(place, identity_of(row, place), "caption", (image_of(row, place, image_folder),), turns)

    yield from convert_rows(rows, "captions", convert, skip_faulty)


def read_fusions(
    rows: Iterable[Row],
    alt_text: str = "alt_text",
    column: str = "caption",
    image_folder: str = "",
    skip_faulty: Skip = False,
) -> Iterator[Record]:
    """Read what KALE's second stage learns: to write the fused caption from image and alt-text.

    Args:
        rows: of the engine `kale`, or any with both texts and an image as `read_captions` takes it.
        alt_text: column of what is asked.
        column: of the fused caption, the answer.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        texts = [" ".join(a_text(need(row, place, name), place, name).split()) for name in (alt_text, column)]
        if not texts[0]:  # a dense caption that was kept as it is: nothing to learn
            return
        turns = (Turn("user", f"{IMAGE_TOKEN}\n{texts[0]}"), Turn("assistant", texts[1]))
        image = image_of(row, place, image_folder)
        yield finish_record(place, identity_of(row, place), "instruction", (image,), turns)

    yield from convert_rows(rows, "fusions", convert, skip_faulty)


def _choose(
    captions: list[Any], wanted: Sequence[int] | None, with_caption: bool | None, identity: str, seed: int
) -> Any:
    """Choose one (text, granularity, raw caption) by a hash of the row and the seed."""
    fitting = [
        caption
        for caption in captions
        if (wanted is None or caption[1] in wanted) and with_caption in (None, bool(caption[2]))
    ]
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return fitting[int.from_bytes(digest[:8], "big") % len(fitting)] if fitting else None


def _parse_text(text: str) -> Any:
    """Read JSON or a Python literal; None where a text is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, TypeError, MemoryError):  # that of the parser: nested too deep
        return None


def _parse_captions(value: Any, place: str) -> list[tuple[str, int, bool]]:
    """Parse `captions`: JSON or a Python literal, objects or lists of (text, granularity, raw caption)."""
    if isinstance(value, str):
        value = _parse_text(value)
    parsed = []
    for item in a_list(value, place, "captions"):
        if isinstance(item, dict):
            item = [item.get("text"), item.get("granularity"), item.get("include_datacomp_raw_cap", False)]
        if not isinstance(item, list | tuple) or len(item) != 3 or not isinstance(item[0], str):
            raise fault(
                place,
                "captions",
                item,
                "it must list text, granularity and include_datacomp_raw_cap",
                "The column was probably cut off or belongs to another data set.",
                "Compare the row with docs/data.md.",
            )
        if type(item[1]) is not int or not 0 <= item[1] <= 5:
            raise fault(place, "captions.granularity", item[1], "it must be 0 to 5", "It is damaged.", "Drop the row.")
        parsed.append((item[0], item[1], bool(item[2])))
    return parsed


def _leveled(
    rows: Iterable[Row],
    kind: str,
    options: tuple[Sequence[int] | None, bool | None, int],
    folder: str,
    skip: Skip,
    tidy: Any,
) -> Iterator[Record]:
    wanted, with_caption, seed = options

    def convert(row: Row, place: str) -> Iterator[Record]:
        if row.get("error") or row.get("filtered_by"):  # a data engine's row about an image that has no captions
            return
        identity = identity_of(row, place)
        chosen = _choose(_parse_captions(need(row, place, "captions"), place), wanted, with_caption, identity, seed)
        if chosen is None:
            return
        text, granularity, has_caption = chosen
        annotations = {"granularity": granularity, "include_datacomp_raw_cap": has_caption}
        turns = (Turn("document", IMAGE_TOKEN + tidy(text).strip()),)
        yield finish_record(place, identity, kind, (image_of(row, place, folder),), turns, annotations=annotations)

    yield from convert_rows(rows, kind, convert, skip)


def read_ocr(
    rows: Iterable[Row],
    granularities: Sequence[int] | None = (0,),
    with_caption: bool | None = None,
    *,
    image_folder: str = "",
    strip_filler: bool = True,
    seed: int = 0,
    skip_faulty: Skip = False,
) -> Iterator[Record]:
    """Read BLIP3-OCR: one of each row's captions.

    Args:
        rows: columns `captions`, `uid` or `key`, and an image (or `image_folder`).
        granularities: levels to choose from, 0 to 5; the recipe pre-trains on text without boxes, level 0. None: all.
        with_caption: only captions with (True) or without (False) the raw caption in front.
        image_folder: holds `key`.jpg, as img2dataset downloads them.
        strip_filler: drop filler such as "the text" before a quoted string, as the recipe's loader does. Which phrases
            it dropped beside that one is not published; ours are in `_FILLER`.
        seed: of the choice among a row's captions.
        skip_faulty: log and count faulty rows instead of raising.
    """
    tidy = (lambda text: _FILLER.sub("", text)) if strip_filler else str
    yield from _leveled(rows, "ocr", (granularities, with_caption, seed), image_folder, skip_faulty, tidy)


def read_grounding(
    rows: Iterable[Row],
    granularities: Sequence[int] | None = None,
    with_caption: bool | None = None,
    *,
    image_folder: str = "",
    seed: int = 0,
    skip_faulty: Skip = False,
) -> Iterator[Record]:
    """Read BLIP3-GROUNDING: one of each row's captions; arguments as `read_ocr`, levels 0 to 2."""
    yield from _leveled(rows, "grounding", (granularities, with_caption, seed), image_folder, skip_faulty, str)
