# SPDX-License-Identifier: Apache-2.0
"""Images stored turned, as cameras store them, with an EXIF tag that says how to show them."""

import io
from pathlib import Path

from PIL import ExifTags, Image

from support import render_image

FORMATS = ("JPEG", "PNG")
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # orientation -> what makes the stored pixels of upright ones


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    """Write an image to bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned_and_upright(file_format: str = "PNG", orientation: int = 6, height: int = 60, width: int = 200):
    """Bytes of a file stored turned, and of a PNG without EXIF that shows the same pixels upright."""
    image = render_image(height, width, seed=3)
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = encode(stored, file_format, exif=exif)
    if file_format != "JPEG":
        return turned, encode(image, "PNG")
    lossy = Image.open(io.BytesIO(encode(stored, "JPEG")))  # the same pixels: Pillow's encoder is deterministic
    undo = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}.get(orientation, STORED.get(orientation))
    return turned, encode(lossy if undo is None else lossy.transpose(undo), "PNG")


def write_both(folder: Path, file_format: str = "PNG", orientation: int = 6) -> tuple[Path, Path]:
    """Write the two files; returns the turned one and the upright one."""
    turned, upright = turned_and_upright(file_format, orientation)
    paths = folder / f"turned.{file_format.lower()}", folder / f"upright-{file_format.lower()}.png"
    for path, content in zip(paths, (turned, upright), strict=True):
        path.write_bytes(content)
    return paths
