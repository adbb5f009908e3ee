# SPDX-License-Identifier: Apache-2.0
"""Refusals of unsafe requests, and helpful answers to safe ones: VLGuard."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from ..records import IMAGE_TOKEN, Record, Skip, Turn
from .rows import Row, convert_rows, fault, finish_record, identity_of, image_from, need

SUBSETS = {"safe_instruction": "safe_safes", "unsafe_instruction": "safe_unsafes", "instruction": "unsafes"}
"""Key of a request -> VLGuard's name for such requests: safe and unsafe ones about safe images, and unsafe images."""


def read_safety(
    rows: Iterable[Row],
    image_folder: str = "",
    skip_faulty: Skip = False,
    source: str = "safety",
    together: bool = False,
) -> Iterator[Record]:
    """Read VLGuard: refusals of unsafe requests, and helpful answers to safe ones about safe images.

    Its training file has 2,000 images: 1,023 unsafe ones with a request each, and 977 safe ones with a safe and an
    unsafe request. That makes 2,977 exchanges, 2,000 of them refusals.

    Args:
        rows: `image`, `safe`, `harmful_category` and `instr-resp`, a list of `instruction`, `safe_instruction` or
            `unsafe_instruction` with `response`.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
        source: of the rows, for messages.
        together: give one conversation for each image, as its authors trained; the order of its requests is random
            but follows from the row's id. Else one record for each request.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        image, identity = image_from(row.get("image"), place, "image", image_folder), identity_of(row, place)
        pairs = need(row, place, "instr-resp")
        pairs = pairs if isinstance(pairs, list) else [pairs]
        exchanges = [(_request_of(pair, place, f"instr-resp[{index}]"), pair) for index, pair in enumerate(pairs)]
        if together and hashlib.sha256(identity.encode()).digest()[0] % 2:
            exchanges.reverse()
        for index, group in enumerate([exchanges] if together else [[exchange] for exchange in exchanges]):
            turns = [Turn(*turn) for name, pair in group for turn in _turns_of(pair[name], pair["response"])]
            turns[0] = Turn("user", f"{IMAGE_TOKEN}\n{turns[0].text}")
            is_unsafe = any(name != "safe_instruction" for name, _ in group)
            annotations = {"is_unsafe": is_unsafe, "category": row.get("harmful_category")}
            annotations |= {} if together else {"subset": SUBSETS[group[0][0]]}
            kind, record_id = (
                ("refusal" if is_unsafe else "instruction"),
                identity if together else f"{identity}-{index}",
            )
            yield finish_record(place, record_id, kind, (image,), tuple(turns), annotations=annotations)

    yield from convert_rows(rows, source, convert, skip_faulty)


def _turns_of(request: str, response: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", request), ("assistant", response)


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
