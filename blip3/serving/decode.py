# SPDX-License-Identifier: Apache-2.0
"""Bytes of a stranger to an image: base64 read strictly, structure and size checked, then decoded in time.

    base64 --> file --- outline_of (structure.py) ---> format, size, blocks, checked --- decode ---> image

What can be refused is refused before anything is decoded.
"""

import base64
import io
import math
import re
from typing import Any

from PIL import Image

from ..images import orientation_in, turn
from .limits import Deadline, ImageLimits, shorten
from .structure import FORMATS, Outline, outline_of

PIXEL_BYTES = 4  # of a decoded image, whatever its mode


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


def check_file(data: bytes, limits: ImageLimits, max_pixels: int | None = None) -> Outline:
    """Check an image's file without decoding it.

    Args:
        data: the file.
        limits: which sizes are accepted.
        max_pixels: what is left of the request's pixels.

    Raises:
        ValueError: if it is of no accepted format or size, or built to take long.
    """
    if len(data) > limits.max_bytes:
        raise ValueError(too_many_bytes("more", limits.max_bytes))
    outline = outline_of(data)
    if outline is None or min(outline.height, outline.width) < 1:
        raise ValueError(_no_beginning(len(data)))
    _check_size(outline.height, outline.width, limits, max_pixels)
    return outline


def decode_image(outline: Outline, limits: ImageLimits, deadline: Deadline, upright: bool = True) -> Image.Image:
    """Decode a checked file; the first frame of animations.

    Pillow reads a file a piece at a time, and no piece is given after the deadline. What it does with one piece, and
    with the whole of a WebP, cannot be stopped: the limits of sides and pixels bound that.

    Args:
        outline: of `check_file`.
        limits: which sizes are accepted.
        deadline: for the last byte to be decoded.
        upright: turn the image as its EXIF tag says.

    Returns:
        the image without metadata, which keeps nothing of the file.

    Raises:
        ValueError: if it is damaged, or time runs out.
    """
    try:
        image = _open(outline, deadline)
        _check_size(image.height, image.width, limits, None)  # of what will be decoded, whatever the walk has read
        loaded = _load(image, deadline)
    except TimeoutError:
        raise ValueError(
            f"its {len(outline.data)} bytes were not decoded in time ({limits.total_seconds:g} s for all images of a "
            "request). There are probably too many large ones, or it was built to take long: send fewer, or scale "
            "them down."
        ) from None
    info: dict[Any, Any] = {**loaded.info, **outline.info}
    if outline.kind in ("GIF", "WEBP"):  # their decoders stay behind the image, with the file
        loaded = loaded.copy()
    loaded.info = {name: value for name, value in info.items() if name == "transparency"}
    return turn(loaded, orientation_in(info) if upright else 1)


def check_opened(image: Image.Image, limits: ImageLimits, max_pixels: int | None = None) -> Outline | Image.Image:
    """Check an image that a server has already opened from a body: by its file, where that is still in memory.

    Returns:
        the file's outline; or the image, as it is and never turned, where it is no longer a file.

    Raises:
        ValueError: as `check_file` does.
    """
    file = getattr(image, "fp", None)
    if isinstance(file, io.BytesIO) and not file.closed:
        return check_file(file.getvalue(), limits, max_pixels)
    if image.format not in (None, "MPO", *FORMATS):
        raise ValueError(
            f"it is a {shorten(image.format)} but {', '.join(FORMATS)} are read. It is probably an original from a "
            "scanner: save it as JPEG or PNG."
        )
    _check_size(image.height, image.width, limits, max_pixels)
    return _load(image, Deadline(math.inf))


class _TimedFile(io.BytesIO):
    """Bytes of a file, until a deadline."""

    def __init__(self, data: bytes, deadline: Deadline):
        super().__init__(data)
        self.deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self.deadline.remaining()
        return super().read(size)


def _open(outline: Outline, deadline: Deadline) -> Image.Image:
    try:
        return Image.open(_TimedFile(outline.data, deadline), formats=(outline.kind,))
    except Exception:  # decoders raise whatever a broken file makes them meet
        deadline.remaining()
        raise ValueError(_no_beginning(len(outline.data))) from None


def _load(image: Image.Image, deadline: Deadline) -> Image.Image:
    height, width = image.height, image.width
    try:
        image.load()
    except Exception:  # decoders raise whatever a broken file makes them meet
        deadline.remaining()
        raise ValueError(
            f"its {height} x {width} pixels (height x width) could not be decoded. It is probably cut or damaged: "
            "open it in a viewer and save it again."
        ) from None
    return image


def _no_beginning(num_bytes: int) -> str:
    return (
        f"its {num_bytes} bytes are not the beginning of a {', '.join(FORMATS)} file of acceptable size. It is "
        "probably of another type, a web page or empty: save it as JPEG or PNG."
    )


def _check_size(height: int, width: int, limits: ImageLimits, max_pixels: int | None) -> None:
    left = limits.max_pixels if max_pixels is None else max_pixels
    if max(height, width) > limits.max_side or height * width > min(limits.max_pixels, left):
        left_over = "" if max_pixels is None else f" and {left} left in this request"
        raise ValueError(
            f"it has {height} x {width} pixels (height x width) but at most {limits.max_side} a side, "
            f"{limits.max_pixels} in all{left_over} are decoded. It is probably an original from "
            "a camera: scale it down."
        )
