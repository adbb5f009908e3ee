# SPDX-License-Identifier: Apache-2.0
"""Refusals of unsafe requests, and helpful answers to safe ones: VLGuard."""

from collections.abc import Iterable, Iterator

from ..records import IMAGE_TOKEN, Record, Turn
from .rows import Row, convert_rows, fault, finish_record, identity_of, image_from, need


def read_safety(rows: Iterable[Row], image_folder: str = "", skip_faulty: bool = False) -> Iterator[Record]:
    """Read VLGuard: refusals of unsafe requests, and helpful answers to safe ones about safe images.

    Args:
        rows: `image`, `safe`, `harmful_category` and `instr-resp`, a list of `instruction`, `safe_instruction` or
            `unsafe_instruction` with `response`.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        image = image_from(row.get("image"), place, "image", image_folder)
        for index, pair in enumerate(need(row, place, "instr-resp")):
            name = next(
                (name for name in ("safe_instruction", "unsafe_instruction", "instruction") if pair.get(name)), ""
            )
            if not name or not isinstance(pair.get("response"), str):
                raise fault(
                    place,
                    f"instr-resp[{index}]",
                    pair,
                    "it needs an instruction and a response",
                    "The row is probably of another data set.",
                    "Use the reader for its form.",
                )
            is_unsafe = name != "safe_instruction"
            turns = (Turn("user", f"{IMAGE_TOKEN}\n{pair[name]}"), Turn("assistant", pair["response"]))
            annotations = {"is_unsafe": is_unsafe, "category": row.get("harmful_category")}
            kind, identity = ("refusal" if is_unsafe else "instruction"), f"{identity_of(row, place)}-{index}"
            yield finish_record(place, identity, kind, (image,), turns, annotations=annotations)

    yield from convert_rows(rows, "safety", convert, skip_faulty)
