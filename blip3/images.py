# SPDX-License-Identifier: Apache-2.0
"""Images as a person holds them: turned upright as their EXIF tag says, wherever this package opens one itself."""

from typing import Any

from PIL import ExifTags, Image, ImageOps

SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


def turns_upright(processor: Any) -> bool:
    """Whether images are turned upright for a model: unless its processor forbids it by `do_exif_transpose` False."""
    return processor.image_processor.do_exif_transpose is not False


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image that was just opened as its EXIF tag says, in place; returns it."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged tags; Pillow writes them anew after it has turned the pixels
        image.info.pop("exif", None)
    return image


def size_of(image: Image.Image, upright: bool = True) -> tuple[int, int]:
    """Give (height, width) in pixels of an image that was just opened, without decoding it.

    Args:
        image: as `Image.open` gives it.
        upright: as it will be once it is turned; False gives it as stored.
    """
    is_turned = upright and _is_stored_sideways(image)
    return (image.width, image.height) if is_turned else (image.height, image.width)


def _is_stored_sideways(image: Image.Image) -> bool:
    if image.format == "TIFF":  # Pillow turns these by itself
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except Exception:  # damaged tags, which say nothing about the pixels
        return False
