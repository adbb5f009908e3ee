# SPDX-License-Identifier: Apache-2.0
"""Bytes of a stranger to an image: base64 read strictly, format and size checked by the header, then decoded."""

import base64
import io
import math
import re

from PIL import Image

from ..images import turn_upright
from .limits import ImageLimits, shorten

# TIFF is left out on purpose: it wraps many codecs, and browsers do not send it. MPO is what some cameras call JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_JPEG_SCANS = 32  # encoders write about ten; each scan costs a pass over the whole image


def too_many_bytes(given: str, max_bytes: int) -> str:
    """Say that a file is too large; `given` is its size in words, such as `more`."""
    return (
        f"its file has {given} than {max_bytes} bytes, the limit. It is probably an original from a camera: scale it "
        "down or save it as JPEG."
    )


def strip_data_header(url: str) -> str:
    """Give the base64 text of a data URL.

    Raises:
        ValueError: if it is not an image in base64.
    """
    header, _, encoded = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]{1,40}(;[\w.+-]{1,40}=[\w.+-]{1,40}){0,4};base64", header[:400], re.I):
        raise ValueError(
            f"its data URL begins with {shorten(header)} but 'data:image/...;base64,' is expected. It is probably of "
            "another type or percent-encoded: send base64."
        )
    return encoded


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Decode base64 text strictly, after checking its length.

    Raises:
        ValueError: if it is too long, or anything but canonical base64.
    """
    if len(text) > 4 * math.ceil(max_bytes / 3):
        raise ValueError(too_many_bytes("more", max_bytes))
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(
            f"its text of {len(text)} characters is neither an http, https or data URL nor base64. It is probably the "
            "name of a file, which is never opened here, or was cut: send the file's bytes as base64, with padding "
            "and without line breaks."
        ) from None


def decode_image(data: bytes, limits: ImageLimits, max_pixels: int | None = None, upright: bool = True) -> Image.Image:
    """Decode an image's file; the first frame of animations.

    Args:
        data: the file.
        limits: which sizes are accepted.
        max_pixels: what is left of the request's pixels.
        upright: turn the image as its EXIF tag says.

    Raises:
        ValueError: if it is no complete image of an accepted format and size.
    """
    if len(data) > limits.max_bytes:
        raise ValueError(too_many_bytes("more", limits.max_bytes))
    # In a JPEG's compressed data FF is always followed by 00, so this counts scans (and those of thumbnails).
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ValueError(
            f"it is a JPEG of more than {MAX_JPEG_SCANS} scans, the limit. It was probably built to take long to "
            "decode: save it again with an ordinary encoder."
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # decoders raise whatever a broken file makes them meet
        raise ValueError(
            f"its {len(data)} bytes are not the beginning of a {', '.join(FORMATS)} file of acceptable size. It is "
            "probably of another type, a web page or empty: save it as JPEG or PNG."
        ) from None
    loaded = _load(image, limits, max_pixels)
    return turn_upright(loaded) if upright else loaded


def check_image(
    image: Image.Image, limits: ImageLimits, max_pixels: int | None = None, upright: bool = True
) -> Image.Image:
    """Check an image that a server has already opened from a body, and decode it by our own rules where it can.

    An image that is no longer a file is left as it is, not turned.

    Raises:
        ValueError: as `decode_image` does.
    """
    file = getattr(image, "fp", None)
    if isinstance(file, io.BytesIO) and not file.closed:
        return decode_image(file.getvalue(), limits, max_pixels, upright)
    if image.format not in (None, "MPO", *FORMATS):
        raise ValueError(
            f"it is a {shorten(image.format)} but {', '.join(FORMATS)} are read. It is probably an original from a "
            "scanner: save it as JPEG or PNG."
        )
    return _load(image, limits, max_pixels)


def _load(image: Image.Image, limits: ImageLimits, max_pixels: int | None) -> Image.Image:
    height, width, left = image.height, image.width, limits.max_pixels if max_pixels is None else max_pixels
    if max(height, width) > limits.max_side or height * width > min(limits.max_pixels, left):
        left_over = "" if max_pixels is None else f" and {left} left in this request"
        raise ValueError(
            f"it has {height} x {width} pixels (height x width) but at most {limits.max_side} a side, "
            f"{limits.max_pixels} in all{left_over} are decoded. It is probably an original from "
            "a camera: scale it down."
        )
    try:
        image.load()
    except Exception:  # decoders raise whatever a broken file makes them meet
        raise ValueError(
            f"its {height} x {width} pixels (height x width) could not be decoded. It is probably cut or damaged: "
            "open it in a viewer and save it again."
        ) from None
    return image
