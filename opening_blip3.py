# SPDX-License-Identifier: Apache-2.0
"""Whatever holds an image to a PIL image: paths, open files, bytes, URLs, base64 text, cells of `datasets`.

    source --open_source--> image, not yet decoded --turn_upright--> image as its EXIF tag says
                                |
                                +-- decode_smaller: a JPEG at 1/2, 1/4 or 1/8, as its format allows

Sizes are (height, width).
"""

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from transformers import image_utils

URL_TIMEOUT_SECONDS = 60


class ImageError(ValueError):
    """What is wrong with one image; the image processor says which one it is."""


_OPENED_HERE = "is_opened_by_blip3"  # attribute of PIL images that `open_source` made
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_MAX_PATH_CHARACTERS = 4096
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what shows the image upright


def list_images(images: Any) -> Any:
    """Turn whatever holds images (a `datasets` Column, an iterator, ...) into lists, row by row; read once, in order.

    >>> list_images(iter(["a.jpg", ("b.jpg", "c.jpg")]))
    ['a.jpg', ['b.jpg', 'c.jpg']]
    """
    entries = entries_of(images)
    return images if entries is None else [list_images(entry) for entry in entries]


def entries_of(images: Any) -> list | None:
    """List the entries of what holds images; None for what is one image, or nothing that could hold any."""
    if is_source(images) or isinstance(images, Image.Image | Mapping | Set) or not isinstance(images, Iterable):
        return None
    is_numeric = getattr(getattr(images, "dtype", None), "kind", "O") in "biufc" or isinstance(images, torch.Tensor)
    return None if is_numeric or getattr(images, "ndim", 1) != 1 else list(images)


def is_source(image: Any) -> bool:
    """Whether this is something to open, rather than pixels."""
    if isinstance(image, Mapping):  # an undecoded image of `datasets`
        return not image.keys().isdisjoint(("bytes", "path"))
    return isinstance(image, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(image, "read")


def open_source(source: Any) -> Image.Image:
    """Open an image; it is neither decoded nor turned yet.

    Raises:
        ValueError: if it cannot be opened.
    """
    try:
        image = _open(source)
    except Exception as error:  # decoders raise whatever a broken file makes them meet
        raise ValueError(_explain_unopened(source, error)) from error
    setattr(image, _OPENED_HERE, True)
    return image


def is_opened_here(image: Any) -> bool:
    """Whether `open_source` made this image."""
    return getattr(image, _OPENED_HERE, False)


def _open(source: Any) -> Image.Image:
    if isinstance(source, Mapping):  # either may be None
        source = source.get("bytes") or source.get("path")
        if source is None:
            raise ImageError("it has neither bytes nor path")
    if isinstance(source, str):
        return _open_text(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source)


def _open_text(text: str) -> Image.Image:
    """Open a file name, URL or base64 text; a file name goes first, since base64 text may look like one."""
    if text.startswith(("http://", "https://")):
        return _open_url(text)
    if len(text) < _MAX_PATH_CHARACTERS and os.path.exists(text):
        return Image.open(text)
    is_data_url = text.startswith("data:")
    try:
        return Image.open(io.BytesIO(base64.b64decode(text.split(",", 1)[-1] if is_data_url else text)))
    except Exception as error:
        may_be_name = len(text) < _MAX_PATH_CHARACTERS or any(character in text for character in ".\\:~-_")
        if text and may_be_name and not is_data_url:
            raise FileNotFoundError(text) from error
        raise


def _open_url(url: str) -> Image.Image:
    """Download an image with the client of transformers' own loader, which would turn every image upright.

    Raises:
        ValueError: if the server's answer is not a file.
    """
    if hasattr(image_utils, "httpx"):  # transformers 5
        response = image_utils.httpx.get(url, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True)
    else:
        response = image_utils.requests.get(url, timeout=URL_TIMEOUT_SECONDS)
    if response.status_code != 200:
        raise ImageError(f"its server answered with status {response.status_code}")
    return Image.open(io.BytesIO(response.content))


def _explain_unopened(source: Any, error: Exception) -> str:
    """Say what was to be opened, why it could not be, and what to do about it."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or dict(source)
    is_path = isinstance(source, str | os.PathLike) and len(str(source)) < _MAX_PATH_CHARACTERS
    if isinstance(error, FileNotFoundError):
        reason = "no such file, nor base64 text of an image" if isinstance(source, str) else "no such file"
        advice = "The name is probably misspelt or starts in another folder: correct it, or pass the whole path."
    elif is_path and os.path.isdir(source):
        reason, advice = "it is a folder", "Its files were probably meant: name them one by one."
    elif is_path and os.path.isfile(source) and not os.path.getsize(source):
        reason, advice = "the file is empty", "It was probably cut off in a download: fetch it again or drop it."
    elif isinstance(error, ImageError):
        reason, advice = str(error), "It was probably moved or never stored: look where it comes from, or drop it."
    else:
        reason = f"{type(error).__name__}: {re.sub(r' ?<[^<>]* object at 0x[^<>]*>', '', str(error))[:200]}"
        advice = "It is probably damaged, of another type or out of reach: check that PIL.Image.open reads it."
    return (
        f"{_name_source(source)} could not be opened as an image ({reason}). Expected an image file, its bytes, a "
        f"URL or a base64 string. {advice}"
    )


def _name_source(source: Any) -> str:
    """Name what was to be opened; texts longer than a file's name may be are cut."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if isinstance(text, str) and len(text) > 255:
        return f"{text[:80]!r}... ({len(text)} characters)"
    return repr(text)[:600]


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF tag says. `ImageOps.exif_transpose` fails on tags that have nothing to do with it."""
    image.load()
    orientation = _orientation_of(image)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation_of(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, which says nothing about the pixels
        return 1


# -- JPEGs at a smaller scale -----------------------------------------------------------------------------------------


def size_before_decoding(image: Image.Image, is_turned: bool) -> tuple[int, int] | None:
    """Give (height, width) of a JPEG that `open_source` opened, once it is turned if it is to be; else None.

    Of no other image are its sizes needed before its pixels: no other can be decoded at a smaller scale.
    """
    if not is_opened_here(image) or not isinstance(image, JpegImageFile) or image.fp is None:
        return None
    is_sideways = is_turned and _orientation_of(image) in _SIDEWAYS
    return (image.width, image.height) if is_sideways else (image.height, image.width)


def decode_smaller(image: Image.Image, size: tuple[int, int], is_turned: bool) -> Image.Image:
    """Open a JPEG again so that it is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 that is not below a size.

    The format stores blocks of 8 x 8 pixels by frequency, of which a smaller scale computes the low ones alone
    (libjpeg's scaled DCT). Scales that do not divide both sides are left out: their last pixels would show less than
    the others, and all be resized as if they did not. The image itself keeps its size, since who holds it may want it.

    Args:
        image: for which `size_before_decoding` gives a size.
        size: (height, width) that are needed of the turned image, or of the stored one if it is not to be turned.
        is_turned: whether it will be.
    """
    height, width = size
    if is_turned and _orientation_of(image) in _SIDEWAYS:
        height, width = width, height
    for scale in (8, 4, 2):
        divides = image.width % scale == image.height % scale == 0
        if divides and image.width >= scale * width and image.height >= scale * height:
            again: Any = Image.open(image.fp)  # type: ignore[attr-defined]  # from the beginning of the file
            again.draft(None, (image.width // scale, image.height // scale))
            return again
    return image
