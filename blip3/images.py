# SPDX-License-Identifier: Apache-2.0
"""Images as this package holds them: turned upright as their EXIF tag says where it opens one, bytes until the model.

The tag is read here and not by Pillow, which copies the value of every tag it meets: a block of 64 KiB whose tags all
point at the same bytes takes hundreds of MiB there, and its values go into the library's log.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import Image

SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width

_ORIENTATION = 0x0112
_MAX_TAGS = 65_535
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # TIFF's types that an orientation is written in
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # of Pillow's `info`
_SCALING = ("rescale_factor", "image_mean", "image_std")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turns_upright(processor: Any) -> bool:
    """Whether images are turned upright for a model: unless its processor forbids it by `do_exif_transpose` False."""
    return processor.image_processor.do_exif_transpose is not False


def byte_options(processor: Any, config: Any) -> dict[str, str]:
    """Say to a processor that its model scales bytes itself, if both do it alike; nothing, so floats, if they do not.

    Args:
        processor: of text and images; one whose code is older than bytes gives none.
        config: of the model.

    Returns:
        arguments of a call with images.
    """
    tiler = processor.image_processor
    knows = hasattr(tiler, "pixel_dtype") and hasattr(config, "image_mean")
    scales_alike = knows and all(getattr(tiler, name) == getattr(config, name) for name in _SCALING)
    return {"pixel_dtype": "uint8"} if scales_alike and tiler.do_rescale and tiler.do_normalize else {}


def float_options(processor: Any) -> dict[str, str]:
    """Ask an image processor, or a processor that has one, for scaled floats; its settings may ask for bytes."""
    tiler = getattr(processor, "image_processor", processor)
    return {"pixel_dtype": "float32"} if hasattr(tiler, "pixel_dtype") else {}


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image that was just opened as its EXIF tag says; returns it, or a turned copy, without the tags."""
    image.load()  # a PNG may name its tags after its pixels
    return turn(image, _orientation_of_opened(image))


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a decoded image by an orientation of 1 to 8; returns it, or a turned copy, without the tags that say it."""
    turned = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
    for name in _METADATA:
        turned.info.pop(name, None)
    return turned


def size_of(image: Image.Image, upright: bool = True) -> tuple[int, int]:
    """Give (height, width) in pixels of an image that was just opened, without decoding it.

    Args:
        image: as `Image.open` gives it.
        upright: as it will be once it is turned; False gives it as stored.
    """
    is_turned = upright and _orientation_of_opened(image) in SIDEWAYS
    return (image.width, image.height) if is_turned else (image.height, image.width)


def _orientation_of_opened(image: Image.Image) -> int:
    return 1 if image.format == "TIFF" else orientation_in(image.info)  # Pillow turns TIFF by itself


def orientation_in(info: Mapping[Any, Any]) -> int:
    """Read the orientation, 1 where none is said, out of what Pillow or `serving/structure.py` found beside pixels."""
    exif, text = info.get("exif"), info.get("Raw profile type exif")
    if exif is None and isinstance(text, str):  # as ImageMagick writes it into a PNG
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            exif = None
    found = _orientation_in_exif(exif) if isinstance(exif, bytes) else None
    if found is not None:
        return found
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
    return int(match[1]) if match else 1


def _orientation_in_exif(exif: bytes) -> int | None:
    """Read one tag of the first directory of a TIFF block; None where it is not, or the block is damaged."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    found = None
    try:
        _, start = struct.unpack_from(order + "HL", data, 2)
        (num_tags,) = struct.unpack_from(order + "H", data, start)
        for place in range(start + 2, start + 2 + 12 * min(num_tags, _MAX_TAGS), 12):
            tag, kind, count = struct.unpack_from(order + "HHL", data, place)
            if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
                (found,) = struct.unpack_from(order + _INTEGERS[kind], data, place + 8)
    except struct.error:  # cut: what was found until then counts
        pass
    return found
