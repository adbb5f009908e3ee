# SPDX-License-Identifier: Apache-2.0
"""The images of a record: a file, bytes or a drawing, opened only when they are needed."""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..images import size_of, turn_upright, turns_upright
from .canvas import Drawing

Value = TypeVar("Value")


class RecordError(ValueError):
    """A record that does not follow the schema, with the place and the field at fault."""

    def __init__(self, place: str, name: str, given: str, expected: str, cause: str, action: str):
        super().__init__(f"{place}, field {name}: {given}, but {expected}. {cause} {action}")
        self.place = place
        """File and line, or the record's id."""
        self.field = name
        """Path of the field inside the record, such as `turns[1].role`."""


def _explain_undecoded(source: io.BytesIO | Path, error: Exception) -> str:
    reason = re.sub(r" ?<[^<>]* object at 0x[^<>]*>", "", str(error))
    if isinstance(source, io.BytesIO):
        return f"{len(source.getbuffer())} bytes, {reason}"
    if os.path.isdir(source):
        return "it is a folder"
    if os.path.isfile(source):
        return f"{source.stat().st_size} bytes, {reason}"
    return reason


@dataclass(frozen=True)
class ImageSource:
    """One image, read or painted only when it is opened; exactly one of the three sources is set."""

    path: str | None = None
    """File, absolute or relative to the folder given to `open`."""
    data: bytes | None = field(default=None, repr=False)
    """Encoded file, such as PNG or JPEG."""
    drawing: Drawing | None = field(default=None, repr=False)
    """What our code renders: complete, so the same drawing gives the same pixels."""

    def __post_init__(self) -> None:
        sources = [name for name in ("path", "data", "drawing") if getattr(self, name)]
        if len(sources) != 1:
            raise RecordError(
                "An image",
                "images",
                f"it has {len(sources)} sources ({', '.join(sources) or 'none'})",
                "it needs exactly one of path, data and drawing",
                "The row's image was probably empty or not downloaded.",
                "Fill in one source, or drop the row.",
            )

    def open(self, folder: str | Path = "", upright: bool = True) -> Image.Image:
        """Read or paint the image as RGB.

        Args:
            folder: where a relative `path` starts.
            upright: turn the image as its EXIF tag says; False gives it as stored.

        Raises:
            FileNotFoundError: if `path` is missing.
            ValueError: if the file is no image.
        """
        if self.drawing is not None:
            return self.drawing.paint()
        return self._read(folder, lambda image: (turn_upright(image) if upright else image).convert("RGB"))

    def size(self, folder: str | Path = "", upright: bool = True) -> tuple[int, int]:
        """Give (height, width) in pixels without decoding the image; arguments and errors are those of `open`."""
        if self.drawing is not None:
            return self.drawing.size
        return self._read(folder, lambda image: size_of(image, upright))

    def _read(self, folder: str | Path, use: Callable[[Image.Image], Value]) -> Value:
        source = io.BytesIO(self.data) if self.data is not None else Path(folder, self.path or "")
        try:
            with Image.open(source) as image:
                return use(image)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"The image {str(source)!r} does not exist (no such file), but a record names it. The image folder "
                f"is probably another one: pass the folder that {self.path!r} starts from."
            ) from None
        except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
            raise ValueError(
                f"The image {repr(str(source)) if self.data is None else 'in memory'} cannot be decoded: "
                f"{_explain_undecoded(source, error)}. It must be an image file that Pillow reads. It was probably "
                "cut off in a download: fetch it again or drop the row."
            ) from error

    def to_json(self) -> Any:
        """Give the JSON form: a path, or `{"drawing": ...}`.

        Raises:
            ValueError: for an image in memory, which JSON does not hold.
        """
        if self.data is not None:
            raise ValueError(
                f"An image of {len(self.data)} bytes in memory has no JSON form; only paths and drawings do. The "
                "records were probably read from parquet: write parquet again, or save the images to files first."
            )
        return self.path if self.drawing is None else {"drawing": self.drawing.to_json()}


def open_images(images: Iterable[ImageSource], processor: Any) -> list[Image.Image]:
    """Open images as RGB, upright unless the model's processor forbids it with `do_exif_transpose` False.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is no image.
    """
    upright = turns_upright(processor)
    return [image.open(upright=upright) for image in images]
