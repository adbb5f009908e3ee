# SPDX-License-Identifier: Apache-2.0
"""Interleaved documents: OBELICS, MINT-1T, MMC4."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..downloads import is_url
from ..images import ImageSource, RecordError
from ..records import IMAGE_TOKEN, Record, Skip, Turn
from .rows import Row, a_list, a_text, an_object, convert_rows, fault, finish_record, identity_of, image_from, need


def read_interleaved(
    rows: Iterable[Row], max_images: int = 6, image_folder: str = "", skip_faulty: Skip = False
) -> Iterator[Record]:
    """Read interleaved documents; every image begins a chunk.

    Three forms: `images` and `texts` of equal length, one of the two None at each place (OBELICS, MINT-1T); the same
    in `json` beside a `tiff` with all images of the document (MINT-1T's PDF documents, as webdataset); or MMC4's
    `text_list` and `image_info`, where an image goes before the sentence `matched_text_index`.

    Images named by URL are those that img2dataset downloaded into `image_folder`. One that it could not get is left
    out of its document, and a document of which none was downloaded is faulty.

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
        missing: RecordError | None = None
        for name, image, text in pieces:
            if image is not None and len(images) < max_images:
                found = _image_of(image, place, name, image_folder)
                missing = missing or (found if isinstance(found, RecordError) else None)
                images += [found] if isinstance(found, ImageSource) else []
                chunks += [IMAGE_TOKEN] if isinstance(found, ImageSource) else []
            if text:
                chunks[-1] += ("" if chunks[-1] in ("", IMAGE_TOKEN) else " ") + text.strip()
        turns = tuple(Turn("document", chunk) for chunk in _merge_bare(chunks))
        if missing is not None and not images:
            raise missing
        if images:
            yield finish_record(place, identity_of(row, place), "interleaved", tuple(images), turns)

    yield from convert_rows(rows, "interleaved", convert, skip_faulty)


def _image_of(image: Any, place: str, name: str, folder: str) -> ImageSource | RecordError:
    """Find an image of a document; gives the error where it has a URL and was not downloaded."""
    if isinstance(image, ImageSource):
        return image
    try:
        return image_from(image, place, name, folder)
    except RecordError as error:
        if not is_url(image):
            raise
        return error


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
    if "images" not in row and isinstance(row.get("json"), dict):
        row = row["json"] | {"images": _frames_of(row, place)}
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


def _frames_of(row: Row, place: str) -> list[ImageSource | None]:
    """Find the images of a document in its TIFF, whose frames lie in the order of `image_metadata`.

    `images` names them `page_PAGE_image_XREF`. Where a name is not in the metadata, the frames are taken in the order
    in which `images` names them.
    """
    document = row["json"]
    names = a_list(need(document, place, "images"), place, "images")
    if not any(names):
        return [None] * len(names)
    data = image_from(need(row, place, "tiff", "tif"), place, "tiff").data
    listed = a_list(document.get("image_metadata") or [], place, "image_metadata")
    entries = [an_object(entry, place, f"image_metadata[{index}]") for index, entry in enumerate(listed)]
    numbers = {f"page_{entry.get('page')}_image_{entry.get('xref')}": index for index, entry in enumerate(entries)}
    if not all(name in numbers for name in names if name):
        numbers = {name: index for index, name in enumerate(dict.fromkeys(name for name in names if name))}
    frames = len(entries) or len(numbers)
    return [ImageSource(data=data, frame=numbers[name], frames=frames) if name else None for name in names]


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
