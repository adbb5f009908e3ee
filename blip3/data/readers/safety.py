# SPDX-License-Identifier: Apache-2.0
"""Refusals of unsafe requests, and helpful answers to safe ones: VLGuard."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from ..records import IMAGE_TOKEN, Record, Turn
from .rows import Row, convert_rows, fault, finish_record, identity_of, image_from, need

_QUESTIONS = ("safe_instruction", "unsafe_instruction", "instruction")


def read_safety(
    rows: Iterable[Row], image_folder: str = "", skip_faulty: bool = False, together: bool = False
) -> Iterator[Record]:
    """Read VLGuard: refusals of unsafe requests, and helpful answers to safe ones about safe images.

    Its training file has 2,000 images: 1,023 unsafe ones with a request each, and 977 safe ones with a safe and an
    unsafe request. That makes 2,977 exchanges, 2,000 of them refusals.

    Args:
        rows: `image`, `safe`, `harmful_category` and `instr-resp`, a list of `instruction`, `safe_instruction` or
            `unsafe_instruction` with `response`.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
        together: give one conversation for each image, as its authors trained; the order of its requests is random
            but follows from the row's id. Else one record for each request.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        image, identity = image_from(row.get("image"), place, "image", image_folder), identity_of(row, place)
        pairs = need(row, place, "instr-resp")
        exchanges = [_exchange(pair, f"instr-resp[{index}]", place) for index, pair in enumerate(pairs)]
        if together and hashlib.sha256(identity.encode()).digest()[0] % 2:
            exchanges.reverse()
        groups = [exchanges] if together else [[exchange] for exchange in exchanges]
        for index, group in enumerate(groups):
            spoken = [
                (role, text) for _, *texts in group for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            turns = [Turn(role, text) for role, text in spoken]
            turns[0] = Turn("user", f"{IMAGE_TOKEN}\n{turns[0].text}")
            is_unsafe = any(is_unsafe for is_unsafe, _, _ in group)
            annotations = {"is_unsafe": is_unsafe, "category": row.get("harmful_category")}
            kind, name = ("refusal" if is_unsafe else "instruction"), identity if together else f"{identity}-{index}"
            yield finish_record(place, name, kind, (image,), tuple(turns), annotations=annotations)

    yield from convert_rows(rows, "safety", convert, skip_faulty)


def _exchange(pair: Any, field: str, place: str) -> tuple[bool, str, str]:
    """Give whether a request is unsafe, the request, and its answer."""
    name = next((name for name in _QUESTIONS if pair.get(name)), "")
    if not name or not isinstance(pair.get("response"), str):
        raise fault(
            place,
            field,
            pair,
            "it needs an instruction and a response",
            "The row is probably of another data set.",
            "Use the reader for its form.",
        )
    return name != "safe_instruction", str(pair[name]), pair["response"]
