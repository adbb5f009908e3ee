# SPDX-License-Identifier: Apache-2.0
"""Drawings: complete descriptions of images in a few JSON values, painted with Pillow when they are opened.

    Drawing(size, background, marks) -> paint() -> RGB image
    marks: Shape (a thing in one colour), Text, Line, Box; painted in order

Coordinates here are pixels, (x1, y1, x2, y2) for boxes.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from ..refusals import check_fields
from .fonts import load_font
from .things import THINGS, render_mask

PixelBox = tuple[float, float, float, float]
MAX_SIDE = 8192  # of a drawing, in pixels
_MASK_SIDE = 256
_GRAIN_SIDE = 512


@dataclass(frozen=True)
class Shape:
    """A thing in one colour."""

    name: ClassVar[str] = "shape"
    thing: str
    """Key of `THINGS`."""
    colour: str
    """`#rrggbb`."""
    corner: tuple[int, int]
    """(x1, y1) in pixels."""
    side: int
    """Of its square, in pixels."""
    angle: int = 0
    """Degrees, counter-clockwise."""

    def paint(self, image: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """Paint onto `image`."""
        image.paste(self.colour, self.corner, _scaled_mask(self.thing, self.side, self.angle))


@dataclass(frozen=True)
class Text:
    """One line of text."""

    name: ClassVar[str] = "text"
    text: str
    font: str
    """Key of `fonts.FACES`."""
    points: int
    """Font size in pixels."""
    colour: str
    """`#rrggbb`."""
    origin: tuple[int, int]
    """(x, y) in pixels of the left end of the baseline."""

    def paint(self, image: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """Paint onto `image`."""
        pen.text(self.origin, self.text, fill=self.colour, font=load_font(self.font, self.points), anchor="ls")


@dataclass(frozen=True)
class Line:
    """A straight line."""

    name: ClassVar[str] = "line"
    ends: tuple[int, int, int, int]
    """(x1, y1, x2, y2) in pixels."""
    colour: str
    width: int = 1
    """In pixels."""

    def paint(self, image: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """Paint onto `image`."""
        pen.line(self.ends, fill=self.colour, width=self.width)


@dataclass(frozen=True)
class Box:
    """A rectangle, filled and outlined as wished."""

    name: ClassVar[str] = "box"
    box: tuple[int, int, int, int]
    """(x1, y1, x2, y2) in pixels."""
    fill: str | None = None
    outline: str | None = None
    width: int = 1
    """Of the outline, in pixels."""

    def paint(self, image: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """Paint onto `image`."""
        pen.rectangle(self.box, fill=self.fill, outline=self.outline, width=self.width)


Mark = Shape | Text | Line | Box
_MARKS: dict[str, Any] = {mark.name: mark for mark in (Shape, Text, Line, Box)}


@dataclass(frozen=True)
class Drawing:
    """An image as a description."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    background: tuple[str, ...]
    """(`plain`, colour), (`grain`, colour), (`across`, left, right) or (`down`, top, bottom)."""
    marks: tuple[Mark, ...]
    """In painting order."""

    def paint(self) -> Image.Image:
        """Paint the image as RGB."""
        image = _paint_background(self.size, self.background)
        pen = ImageDraw.Draw(image)
        for mark in self.marks:
            mark.paint(image, pen)
        return image

    def to_json(self) -> dict[str, Any]:
        """Give the JSON form."""
        marks = [[mark.name, *mark.__dict__.values()] for mark in self.marks]
        return {"size": list(self.size), "background": list(self.background), "marks": marks}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Drawing":
        """Read the JSON form.

        Raises:
            ValueError: for sizes, things, fonts or marks that cannot be painted.
        """
        height, width = values["size"]
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (height, width)):
            raise ValueError(f"size is {values['size']} but must be (height, width) of 1 to {MAX_SIDE} pixels")
        kind, *colours = values["background"]
        if len(colours) != _BACKGROUNDS.get(kind, -1) or not all(isinstance(colour, str) for colour in colours):
            raise ValueError(
                f"background is {values['background']} but must be one of {_BACKGROUNDS} with its colours"
            )
        marks = []
        for name, *fields in values["marks"]:
            if name not in _MARKS:
                raise ValueError(f"a mark is {name!r} but must be one of {', '.join(_MARKS)}")
            marks.append(_MARKS[name](*(tuple(field) if isinstance(field, list) else field for field in fields)))
            check_fields(f"a {name} has", marks[-1], _MARK_BOUNDS)
            if name == "shape" and marks[-1].thing not in THINGS:
                raise ValueError(f"a shape is {marks[-1].thing!r} but must be one of {', '.join(THINGS)}")
        return Drawing((height, width), (kind, *colours), tuple(marks))


_MARK_BOUNDS: dict[str, tuple[float, float | None]] = {  # in pixels
    **dict.fromkeys(("corner", "origin", "ends", "box"), (-MAX_SIDE, 2 * MAX_SIDE)),
    **dict.fromkeys(("side", "points", "width"), (0, MAX_SIDE)),
}
_BACKGROUNDS = {"plain": 1, "grain": 1, "across": 2, "down": 2}


def text_width(text: str, font: str, points: int) -> int:
    """Give the width in pixels that a text needs, with its side bearings."""
    left, _, right, _ = load_font(font, points).getbbox(text, anchor="ls")
    return math.ceil(right) - math.floor(left)


@lru_cache(maxsize=8192)
def text_box(text: str, font: str, points: int) -> tuple[int, int, int, int]:
    """Give the ink box of a text in pixels, relative to the left end of its baseline."""
    mask, (x, y) = load_font(font, points).getmask2(text, mode="L", anchor="ls")
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    return x + left, y + top, x + right, y + bottom


def place_text(text: str, font: str, points: int, colour: str, corner: tuple[int, int]) -> tuple[Text, PixelBox]:
    """Put the ink of a text at a corner (x1, y1); gives the mark and its box in pixels."""
    left, top, right, bottom = text_box(text, font, points)
    x, y = corner
    return Text(text, font, points, colour, (x - left, y - top)), (x, y, x + right - left, y + bottom - top)


def shape_box(shape: Shape) -> PixelBox:
    """Give the ink box of a shape in pixels."""
    left, top, right, bottom = _ink_box(shape.thing, shape.angle)
    x, y = shape.corner
    return x + left * shape.side, y + top * shape.side, x + right * shape.side, y + bottom * shape.side


def forget_masks() -> None:
    """Empty the caches of masks and backgrounds, so that what is painted next is computed anew."""
    for cached in (_mask, _turned_mask, _scaled_mask, _tiled_grain, _grain):
        cached.cache_clear()


@cache
def _mask(thing: str) -> Image.Image:
    return render_mask(thing, _MASK_SIDE)


@lru_cache(maxsize=1024)
def _turned_mask(thing: str, angle: int) -> Image.Image:
    return _mask(thing).rotate(angle, Image.Resampling.BICUBIC) if angle else _mask(thing)


@lru_cache(maxsize=1024)
def _ink_box(thing: str, angle: int) -> tuple[float, float, float, float]:
    box = _turned_mask(thing, angle).point(lambda value: 255 * (value > 127)).getbbox()
    if box is None:
        raise ValueError(
            f"The thing {thing!r} leaves nothing, but every thing must leave ink. Correct blip3/data/things.py."
        )
    return tuple(edge / _MASK_SIDE for edge in box)  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _scaled_mask(thing: str, side: int, angle: int) -> Image.Image:
    return _turned_mask(thing, angle).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)


@lru_cache(maxsize=1)
def _grain() -> Image.Image:
    grain = np.random.default_rng(0).integers(0, 14, (_GRAIN_SIDE, _GRAIN_SIDE), dtype=np.uint8)
    return Image.fromarray(grain)


@lru_cache(maxsize=64)
def _tiled_grain(height: int, width: int) -> Image.Image:
    return _grain().resize((width, height), Image.Resampling.NEAREST)


@lru_cache(maxsize=1)
def _ramp() -> Image.Image:
    return Image.linear_gradient("L")


def _paint_background(size: tuple[int, int], background: tuple[str, ...]) -> Image.Image:
    height, width = size
    kind, colour = background[:2]
    image = Image.new("RGB", (width, height), colour)
    if kind == "grain":
        image.paste("#606060", (0, 0), _tiled_grain(height, width))
    elif kind in ("across", "down"):
        ramp = _ramp() if kind == "down" else _ramp().transpose(Image.Transpose.TRANSPOSE)
        image.paste(background[2], (0, 0), ramp.resize((width, height), Image.Resampling.BILINEAR))
    return image
