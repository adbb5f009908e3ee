# SPDX-License-Identifier: Apache-2.0
"""The images of a record: a file, bytes or a drawing, opened only when they are needed."""

import io
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..images import size_of, turn_upright, turns_upright
from .canvas import Drawing
from .shards import ImageShard, read_image

Value = TypeVar("Value")


class RecordError(ValueError):
    """A record that does not follow the schema, with the place and the field at fault."""

    def __init__(self, place: str, name: str, given: str, expected: str, cause: str, action: str):
        super().__init__(f"{place}, field {name}: {given}, but {expected}. {cause} {action}")
        self.place = place
        """File and line, or the record's id."""
        self.field = name
        """Path of the field inside the record, such as `turns[1].role`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error go from one process to another; its message may have been changed."""
        return _remade_error, (str(self), self.place, self.field)


def _remade_error(message: str, place: str, name: str) -> RecordError:
    error = RecordError(place, name, "", "", "", "")
    error.args = (message,)
    return error


def _explain_undecoded(source: io.BytesIO | Path, error: Exception) -> str:
    reason = re.sub(r" ?<[^<>]* object at 0x[^<>]*>", "", str(error)) or type(error).__name__
    if isinstance(source, io.BytesIO):
        return f"{len(source.getbuffer())} bytes, {reason}"
    return f"{source.stat().st_size} bytes, {reason}" if os.path.isfile(source) else reason


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What images of data may be: what data sets hold (MPO is what some telephones call JPEG). Pillow opens more, of which
some run programs (EPS) or have decoders that few have looked at."""
MAX_PIXELS = 2**27
"""Of an image: 400 MB as RGB. A file of a few kilobytes can claim more."""


@cache
def _known_formats() -> list[str]:
    """Give the formats that the installed Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _refuse(place: str, given: str, expected: str, cause: str, action: str) -> RecordError:
    return RecordError(place, "images", given, expected, cause, action)


def _paint(drawing: Drawing) -> Image.Image:
    try:
        return drawing.paint()
    except ImportError:  # a font that is not installed
        raise
    except Exception as error:  # Pillow raises whatever an impossible mark makes it meet
        raise _refuse(
            "A drawing",
            f"it cannot be painted ({type(error).__name__}: {error})",
            "it must be what Drawing.to_json gives",
            "It was probably edited or written by a later version.",
            "Build the records again.",
        ) from error


@dataclass(frozen=True)
class ImageSource:
    """One image, read or painted only when it is opened; exactly one of the three sources is set."""

    path: str | None = None
    """File, absolute or relative to the folder given to `open`; with `shard`, name or key in there."""
    data: bytes | None = field(default=None, repr=False)
    """Encoded file, such as PNG or JPEG."""
    drawing: Drawing | None = field(default=None, repr=False)
    """What our code renders: complete, so the same drawing gives the same pixels."""
    shard: ImageShard | None = None
    """What `path` lies in. Records in JSON have none, so what they hold is never fetched."""
    frame: int = 0
    """Of a file with several images, such as a TIFF of MINT-1T's PDF documents: the number of this one."""
    frames: int = 0
    """How many the file must have; 0 for any number."""

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
            RecordError: if `path` is missing, or the file is no image of `FORMATS` with at most `MAX_PIXELS`.
        """
        if self.drawing is not None:
            return _paint(self.drawing)
        return self._read(folder, lambda image: (turn_upright(image) if upright else image).convert("RGB"))

    def size(self, folder: str | Path = "", upright: bool = True) -> tuple[int, int]:
        """Give (height, width) in pixels without decoding the image; arguments and errors are those of `open`."""
        if self.drawing is not None:
            return self.drawing.size
        return self._read(folder, lambda image: size_of(image, upright))

    def _read(self, folder: str | Path, use: Callable[[Image.Image], Value]) -> Value:
        source = io.BytesIO(self.data) if self.data is not None else Path(folder, self.path or "")
        place = f"The image {repr(str(source)) if self.data is None else 'in memory'}"
        try:
            if self.shard is not None:
                place = f"The image {self.path!r} in {self.shard.url}"
                source = io.BytesIO(read_image(self.shard, self.path or ""))
            if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
                raise OSError("it is a folder" if source.is_dir() else "it is no ordinary file")
            with Image.open(source, formats=_known_formats()) as image:
                if self.frames and (count := getattr(image, "n_frames", 1)) != self.frames:
                    raise ValueError(f"it has {count} images, but its document names {self.frames}")
                if self.frame:
                    image.seek(self.frame)
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                return use(image)
        except FileNotFoundError:
            raise _refuse(
                place,
                "it does not exist (no such file)",
                "a record names it",
                "The image folder is probably another one:",
                f"pass the folder that {self.path!r} starts from.",
            ) from None
        except MemoryError:  # says more about the machine than about the file
            raise
        except Exception as error:  # decoders raise whatever a broken file makes them meet
            raise _refuse(
                place,
                f"it cannot be decoded: {_explain_undecoded(source, error)}",
                f"it must be an image file of {', '.join(FORMATS)}, of at most {MAX_PIXELS:,} pixels",
                "It was probably cut off in a download.",
                "Fetch it again or drop the row.",
            ) from error

    def to_json(self) -> Any:
        """Give the JSON form: a path, or `{"drawing": ...}`.

        Raises:
            ValueError: for an image in memory, which JSON does not hold.
        """
        if self.data is not None or self.shard is not None or self.frame:
            lies = f"in {self.shard.url}" if self.shard is not None else "in memory"
            what = f"of {len(self.data)} bytes in memory" if self.data is not None else lies
            raise ValueError(
                f"An image {what} has no JSON form; only paths and drawings do. The "
                "records were probably read from parquet: write parquet again, or save the images to files first."
            )
        return self.path if self.drawing is None else {"drawing": self.drawing.to_json()}


def open_images(images: Iterable[ImageSource], processor: Any) -> list[Image.Image]:
    """Open images as RGB, upright unless the model's processor forbids it with `do_exif_transpose` False.

    Raises:
        RecordError: if a file is missing or no image.
    """
    upright = turns_upright(processor)
    return [image.open(upright=upright) for image in images]
