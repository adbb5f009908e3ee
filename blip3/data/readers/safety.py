# SPDX-License-Identifier: Apache-2.0
"""Refusals of unsafe requests, and helpful answers to safe ones: VLGuard."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..records import IMAGE_TOKEN, Record, Turn
from .rows import Row, convert_rows, fault, finish_record, identity_of, image_from, need

SUBSETS = {"safe_instruction": "safe_safes", "unsafe_instruction": "safe_unsafes", "instruction": "unsafes"}
"""Key of a request -> VLGuard's name for such requests: safe and unsafe ones about safe images, and unsafe images."""


def read_safety(
    rows: Iterable[Row], image_folder: str = "", skip_faulty: bool = False, source: str = "safety"
) -> Iterator[Record]:
    """Read VLGuard: refusals of unsafe requests, and helpful answers to safe ones about safe images.

    Args:
        rows: `image`, `safe`, `harmful_category` and `instr-resp`, a list of `instruction`, `safe_instruction` or
            `unsafe_instruction` with `response`.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
        source: of the rows, for messages.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        image = image_from(row.get("image"), place, "image", image_folder)
        pairs = need(row, place, "instr-resp")
        for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            name = _request_of(pair, place, f"instr-resp[{index}]")
            is_unsafe = name != "safe_instruction"
            turns = (Turn("user", f"{IMAGE_TOKEN}\n{pair[name]}"), Turn("assistant", pair["response"]))
            annotations = {"is_unsafe": is_unsafe, "category": row.get("harmful_category"), "subset": SUBSETS[name]}
            kind, identity = ("refusal" if is_unsafe else "instruction"), f"{identity_of(row, place)}-{index}"
            yield finish_record(place, identity, kind, (image,), turns, annotations=annotations)

    yield from convert_rows(rows, source, convert, skip_faulty)


def _request_of(pair: Any, place: str, name: str) -> str:
    """Find the key of the request in a pair."""
    found = next((key for key in SUBSETS if isinstance(pair, dict) and pair.get(key)), "")
    if not found or not isinstance(pair[found], str) or not isinstance(pair.get("response"), str):
        raise fault(
            place,
            name,
            pair,
            "it needs an instruction and a response",
            "The row is probably of another data set.",
            "Use the reader for its form.",
        )
    return found
