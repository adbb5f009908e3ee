# SPDX-License-Identifier: Apache-2.0
"""Interleaved documents: OBELICS, MINT-1T, MMC4."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..images import ImageSource
from ..records import IMAGE_TOKEN, Record, Turn
from .rows import Row, a_list, a_text, an_object, convert_rows, fault, finish_record, identity_of, image_from, need


def read_interleaved(
    rows: Iterable[Row], max_images: int = 6, image_folder: str = "", skip_faulty: bool = False
) -> Iterator[Record]:
    """Read interleaved documents; every image begins a chunk.

    Two forms: `images` and `texts` of equal length, one of the two None at each place (OBELICS, MINT-1T), or MMC4's
    `text_list` and `image_info`, where an image goes before the sentence `matched_text_index`.

    Args:
        rows: documents.
        max_images: keep the first so many images (OpenFlamingo's 6).
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising. Documents without images are left out.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        pieces = _matched_pieces(row, place) if "text_list" in row else _aligned_pieces(row, place)
        images: list[ImageSource] = []
        chunks = [""]
        for name, image, text in pieces:
            if image is not None and len(images) < max_images:
                images.append(image_from(image, place, name, image_folder))
                chunks.append(IMAGE_TOKEN)
            if text:
                chunks[-1] += ("" if chunks[-1] in ("", IMAGE_TOKEN) else " ") + text.strip()
        turns = tuple(Turn("document", chunk) for chunk in _merge_bare(chunks))
        if images:
            yield finish_record(place, identity_of(row, place), "interleaved", tuple(images), turns)

    yield from convert_rows(rows, "interleaved", convert, skip_faulty)


def _merge_bare(chunks: list[str]) -> list[str]:
    """Join images without text of their own to the next chunk, or to the last one at the end."""
    merged, waiting = [], ""
    for chunk in chunks:
        if chunk and set(chunk.split(IMAGE_TOKEN)) == {""}:
            waiting += chunk
        elif chunk:
            merged.append(waiting + chunk)
            waiting = ""
    return [*merged, waiting] if waiting else merged


def _aligned_pieces(row: Row, place: str) -> Iterator[tuple[str, Any, str | None]]:
    images, texts = (a_list(need(row, place, name), place, name) for name in ("images", "texts"))
    if len(images) != len(texts):
        raise fault(
            place,
            "texts",
            f"it has {len(texts)} entries and images {len(images)}",
            "the two must be equally long, with None where the other has something",
            "The row was probably filtered on one side only.",
            "Filter both, or drop the row.",
        )
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        yield f"images[{index}]", image, a_text(text or "", place, f"texts[{index}]")


def _matched_pieces(row: Row, place: str) -> Iterator[tuple[str, Any, str | None]]:
    sentences = a_list(need(row, place, "text_list"), place, "text_list")
    before: dict[int, list[tuple[str, Any]]] = {}
    for index, info in enumerate(a_list(need(row, place, "image_info"), place, "image_info")):
        info = an_object(info, place, f"image_info[{index}]")
        position, image = info.get("matched_text_index"), info.get("image") or info.get("image_name")
        if type(position) is not int or not 0 <= position < len(sentences):
            raise fault(
                place,
                f"image_info[{index}].matched_text_index",
                position,
                f"it must be 0 to {len(sentences) - 1}, a sentence of text_list",
                "Sentences were probably filtered.",
                "Filter the images alike, or drop the row.",
            )
        before.setdefault(position, []).append((f"image_info[{index}]", image))
    for index, sentence in enumerate(sentences):
        for name, image in before.get(index, []):
            yield name, image if image is not None else "", None
        yield "text_list", None, a_text(sentence or "", place, f"text_list[{index}]")
