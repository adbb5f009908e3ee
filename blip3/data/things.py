# SPDX-License-Identifier: Apache-2.0
"""Thirty things as silhouettes of our own, in strokes on a unit square: no font or icon file needed.

A stroke is (operation, numbers, [ink]): `polygon` x1 y1 x2 y2 ..., `ellipse`, `box` and `round` x1 y1 x2 y2, `pie`
x1 y1 x2 y2 from to in degrees clockwise from the right, `line` x1 y1 ... width. Strokes without ink cut out.
"""

import math

from PIL import Image, ImageDraw

Stroke = tuple[str, tuple[float, ...], bool]
_OVERSAMPLING = 4


def _regular(corners: int, radius: float = 0.48, inner: float | None = None, turn: float = -90) -> tuple[float, ...]:
    """Corners of a regular polygon, or of a star when `inner` is the radius of its notches."""
    count = corners * (2 if inner else 1)
    points: list[float] = []
    for index in range(count):
        reach = inner if inner and index % 2 else radius
        angle = math.radians(turn + 360 * index / count)
        points += [0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle)]
    return tuple(points)


def _heart() -> tuple[float, ...]:
    points: list[float] = []
    for step in range(60):
        t = 2 * math.pi * step / 60
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points += [0.5 + x / 35, 0.46 - y / 35]
    return tuple(points)


def _petals() -> list[Stroke]:
    strokes: list[Stroke] = []
    for index in range(6):
        x, y = (0.5 + 0.29 * math.cos(math.pi * index / 3), 0.5 + 0.29 * math.sin(math.pi * index / 3))
        strokes.append(("ellipse", (x - 0.17, y - 0.17, x + 0.17, y + 0.17), True))
    return [*strokes, ("ellipse", (0.3, 0.3, 0.7, 0.7), True), ("ellipse", (0.37, 0.37, 0.63, 0.63), False)]


THINGS: dict[str, list[Stroke]] = {
    "circle": [("ellipse", (0.04, 0.04, 0.96, 0.96), True)],
    "square": [("box", (0.1, 0.1, 0.9, 0.9), True)],
    "triangle": [("polygon", (0.5, 0.06, 0.96, 0.92, 0.04, 0.92), True)],
    "star": [("polygon", _regular(5, 0.5, 0.2), True)],
    "heart": [("polygon", _heart(), True)],
    "diamond": [("polygon", (0.5, 0.02, 0.84, 0.5, 0.5, 0.98, 0.16, 0.5), True)],
    "cross": [("box", (0.36, 0.05, 0.64, 0.95), True), ("box", (0.05, 0.36, 0.95, 0.64), True)],
    "hexagon": [("polygon", _regular(6, 0.48, turn=0), True)],
    "ring": [("ellipse", (0.04, 0.04, 0.96, 0.96), True), ("ellipse", (0.3, 0.3, 0.7, 0.7), False)],
    "moon": [("ellipse", (0.06, 0.04, 0.98, 0.96), True), ("ellipse", (0.32, -0.08, 1.14, 0.74), False)],
    "arrow": [("polygon", (0.03, 0.36, 0.52, 0.36, 0.52, 0.1, 0.97, 0.5, 0.52, 0.9, 0.52, 0.64, 0.03, 0.64), True)],
    "cloud": [
        ("ellipse", (0.03, 0.42, 0.43, 0.82), True),
        ("ellipse", (0.2, 0.2, 0.66, 0.66), True),
        ("ellipse", (0.52, 0.34, 0.97, 0.82), True),
        ("box", (0.22, 0.56, 0.76, 0.82), True),
    ],
    "house": [
        ("polygon", (0.5, 0.05, 0.98, 0.5, 0.02, 0.5), True),
        ("box", (0.14, 0.5, 0.86, 0.95), True),
        ("box", (0.41, 0.63, 0.59, 0.95), False),
    ],
    "tree": [
        ("polygon", (0.5, 0.02, 0.8, 0.42, 0.2, 0.42), True),
        ("polygon", (0.5, 0.22, 0.92, 0.78, 0.08, 0.78), True),
        ("box", (0.42, 0.78, 0.58, 0.98), True),
    ],
    "flower": _petals(),
    "fish": [
        ("ellipse", (0.03, 0.26, 0.74, 0.76), True),
        ("polygon", (0.64, 0.51, 0.97, 0.24, 0.97, 0.78), True),
        ("ellipse", (0.18, 0.4, 0.28, 0.5), False),
    ],
    "cup": [
        ("ellipse", (0.52, 0.26, 0.97, 0.7), True),
        ("ellipse", (0.62, 0.36, 0.87, 0.6), False),
        ("polygon", (0.08, 0.14, 0.74, 0.14, 0.66, 0.88, 0.16, 0.88), True),
    ],
    "car": [
        ("polygon", (0.2, 0.48, 0.32, 0.24, 0.68, 0.24, 0.82, 0.48), True),
        ("round", (0.02, 0.45, 0.98, 0.72), True),
        ("ellipse", (0.1, 0.56, 0.4, 0.86), False),
        ("ellipse", (0.6, 0.56, 0.9, 0.86), False),
        ("ellipse", (0.14, 0.6, 0.36, 0.82), True),
        ("ellipse", (0.64, 0.6, 0.86, 0.82), True),
        ("polygon", (0.31, 0.45, 0.37, 0.31, 0.48, 0.31, 0.48, 0.45), False),
        ("polygon", (0.53, 0.31, 0.64, 0.31, 0.71, 0.45, 0.53, 0.45), False),
    ],
    "key": [
        ("ellipse", (0.02, 0.28, 0.44, 0.7), True),
        ("ellipse", (0.13, 0.39, 0.33, 0.59), False),
        ("box", (0.4, 0.43, 0.98, 0.55), True),
        ("box", (0.86, 0.5, 0.97, 0.74), True),
        ("box", (0.68, 0.5, 0.78, 0.68), True),
    ],
    "umbrella": [
        ("pie", (0.03, 0.06, 0.97, 1.0, 180, 360), True),
        ("ellipse", (0.03, 0.46, 0.34, 0.62), False),
        ("ellipse", (0.34, 0.46, 0.66, 0.62), False),
        ("ellipse", (0.66, 0.46, 0.97, 0.62), False),
        ("box", (0.46, 0.4, 0.54, 0.86), True),
        ("pie", (0.28, 0.74, 0.54, 1.0, 0, 180), True),
        ("pie", (0.35, 0.8, 0.47, 0.92, 0, 180), False),
    ],
    "bell": [
        ("pie", (0.2, 0.1, 0.8, 0.8, 180, 360), True),
        ("polygon", (0.2, 0.44, 0.8, 0.44, 0.95, 0.8, 0.05, 0.8), True),
        ("ellipse", (0.4, 0.76, 0.6, 0.96), True),
        ("ellipse", (0.43, 0.02, 0.57, 0.16), True),
    ],
    "boat": [
        ("polygon", (0.03, 0.66, 0.97, 0.66, 0.78, 0.94, 0.22, 0.94), True),
        ("polygon", (0.47, 0.04, 0.47, 0.6, 0.12, 0.6), True),
        ("polygon", (0.54, 0.14, 0.88, 0.6, 0.54, 0.6), True),
    ],
    "balloon": [
        ("ellipse", (0.18, 0.02, 0.82, 0.72), True),
        ("polygon", (0.5, 0.68, 0.58, 0.8, 0.42, 0.8), True),
        ("line", (0.5, 0.78, 0.5, 0.99, 0.035), True),
    ],
    "drop": [("ellipse", (0.16, 0.34, 0.84, 0.98), True), ("polygon", (0.5, 0.02, 0.8, 0.52, 0.2, 0.52), True)],
    "bolt": [("polygon", (0.6, 0.02, 0.16, 0.56, 0.46, 0.56, 0.34, 0.98, 0.84, 0.4, 0.52, 0.4), True)],
    "mushroom": [
        ("pie", (0.03, 0.08, 0.97, 1.0, 180, 360), True),
        ("round", (0.36, 0.5, 0.64, 0.96), True),
        ("ellipse", (0.26, 0.24, 0.42, 0.4), False),
        ("ellipse", (0.58, 0.28, 0.74, 0.44), False),
    ],
    "apple": [
        ("ellipse", (0.06, 0.26, 0.62, 0.96), True),
        ("ellipse", (0.38, 0.26, 0.94, 0.96), True),
        ("line", (0.5, 0.34, 0.54, 0.12, 0.06), True),
        ("ellipse", (0.55, 0.03, 0.82, 0.17), True),
    ],
    "clock": [
        ("ellipse", (0.04, 0.04, 0.96, 0.96), True),
        ("ellipse", (0.14, 0.14, 0.86, 0.86), False),
        ("line", (0.5, 0.53, 0.5, 0.23, 0.08), True),
        ("line", (0.48, 0.5, 0.72, 0.5, 0.08), True),
    ],
    "flag": [
        ("box", (0.12, 0.04, 0.22, 0.98), True),
        ("polygon", (0.22, 0.08, 0.94, 0.08, 0.76, 0.32, 0.94, 0.56, 0.22, 0.56), True),
    ],
    "crown": [
        ("polygon", (0.04, 0.24, 0.28, 0.5, 0.5, 0.12, 0.72, 0.5, 0.96, 0.24, 0.88, 0.72, 0.12, 0.72), True),
        ("box", (0.12, 0.77, 0.88, 0.88), True),
    ],
}

PLURALS = {"cross": "crosses", "fish": "fish"}
"""Plurals that are not made with an s."""


def plural(thing: str) -> str:
    """Give the plural of a thing.

    >>> plural("star"), plural("cross")
    ('stars', 'crosses')
    """
    return PLURALS.get(thing, f"{thing}s")


def render_mask(thing: str, side: int) -> Image.Image:
    """Render the silhouette of a thing: an L image of `side` x `side` pixels, 255 where there is ink."""
    large = side * _OVERSAMPLING
    mask = Image.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    for operation, numbers, has_ink in THINGS[thing]:
        fill = 255 if has_ink else 0
        if operation == "polygon":
            pen.polygon([number * large for number in numbers], fill=fill)
        elif operation == "line":
            pen.line([number * large for number in numbers[:-1]], fill=fill, width=round(numbers[-1] * large))
        elif operation == "pie":
            pen.pieslice([number * large for number in numbers[:4]], numbers[4], numbers[5], fill=fill)
        else:
            box = [number * large for number in numbers]
            if operation == "round":
                pen.rounded_rectangle(box, radius=0.1 * large, fill=fill)
            else:
                {"ellipse": pen.ellipse, "box": pen.rectangle}[operation](box, fill=fill)
    return mask.resize((side, side), Image.Resampling.BOX)
