# SPDX-License-Identifier: Apache-2.0
"""What a rendered record shows, view by view: the names under each patch, and a caption.

    record --regions_of--> names with boxes --label_patches--> (P, K) of 0 and 1 for a view, which of K names lie where
                                            --caption_of-----> 'red square, blue moon "7K"'

A view is the global view or a tile. Names are things, colours, characters, and the row and column of the patch: K
depends on the patches along a side of a view, which the model's configuration gives.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from ...data.canvas import Drawing, Text, text_box
from ...data.fonts import load_font
from ...data.records import Record
from ...data.things import THINGS
from ...world.settings import COLOURS

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
KINDS: dict[str, tuple[str, ...]] = {
    "thing": tuple(THINGS),
    "colour": tuple(COLOURS),
    "character": tuple(CHARACTERS),
}
MIN_OVERLAP = 0.35
MIN_HEIGHT = 8  # pixels of the view; smaller things and characters are not named

Region = tuple[tuple[str, ...], tuple[float, float, float, float]]  # names, (x1, y1, x2, y2) in pixels of the image
Place = tuple[float, float, float, float]  # (scale x, scale y, offset x, offset y): view = scale * image + offset


@cache
def patch_kinds(per_side: int) -> dict[str, slice]:
    """Where each kind of name stands in `patch_names`.

    Args:
        per_side: patches along a side of a view.
    """
    sizes = {kind: len(names) for kind, names in KINDS.items()} | {"row": per_side, "column": per_side}
    ends = np.cumsum(list(sizes.values())).tolist()
    return {kind: slice(end - size, end) for (kind, size), end in zip(sizes.items(), ends, strict=True)}


def patch_names(per_side: int) -> list[str]:
    """Everything a patch can be named after, kind by kind; a resumed run relies on the order.

    Args:
        per_side: patches along a side of a view.
    """
    places = [f"{kind} {step + 1}" for kind in ("row", "column") for step in range(per_side)]
    return [name for names in KINDS.values() for name in names] + places


@cache
def name_index(per_side: int) -> dict[str, int]:
    """Position of each name in `patch_names`."""
    return {name: index for index, name in enumerate(patch_names(per_side))}


def drawing_of(record: Record) -> Drawing:
    """Give the drawing of a record's first image.

    Raises:
        ValueError: if that image is no drawing.
    """
    drawing = record.images[0].drawing
    if drawing is None:
        raise ValueError(
            f"Record {record.id!r} has an image that is no drawing, but labels are computed from where things were "
            "drawn. It was probably read from a file: use a task of the rendered world."
        )
    return drawing


def regions_of(record: Record, drawing: Drawing) -> list[Region]:
    """Give each thing of a rendered record with its colour, and each character, with boxes in pixels."""
    height, width = drawing.size
    regions: list[Region] = []
    for thing in record.annotations["pictures"][0]["objects"]:
        x1, y1, x2, y2 = thing["box"]
        regions.append(((thing["thing"], thing["colour"]), (x1 * width, y1 * height, x2 * width, y2 * height)))
    for mark in drawing.marks:
        if isinstance(mark, Text):
            regions += character_regions(mark)
    return regions


def character_regions(mark: Text) -> list[Region]:
    """Give each character of a line of text with its box in pixels."""
    font = load_font(mark.font, mark.points)
    _, top, _, bottom = text_box(mark.text, mark.font, mark.points)
    x, y = mark.origin
    ends = [x + font.getlength(mark.text[: index + 1]) for index in range(len(mark.text))]
    starts = [float(x), *ends[:-1]]
    return [
        ((character,), (start_x, y + top, end_x, y + bottom))
        for character, start_x, end_x in zip(mark.text, starts, ends, strict=True)
        if character in CHARACTERS
    ]


def _boxes_in(regions: Sequence[Region], place: Place) -> np.ndarray:
    """Boxes (R, 4) of regions in the pixels of a view."""
    scale_x, scale_y, left, top = place
    boxes = np.array([box for _, box in regions]).reshape(-1, 4)
    return boxes * (scale_x, scale_y, scale_x, scale_y) + (left, top, left, top)


def label_patches(regions: Sequence[Region], place: Place, tile_size: int, per_side: int) -> np.ndarray:
    """Mark which names lie under which patch of a view.

    A region lies under a patch when they share at least `MIN_OVERLAP` of the smaller of the two.

    Args:
        regions: of the image.
        place: of the view.
        tile_size: side of a view in pixels.
        per_side: patches along a side of a view.

    Returns:
        (P, K) of 0 and 1, patches row by row, K names as in `patch_names`.
    """
    names = name_index(per_side)
    labels = np.zeros((per_side, per_side, len(names)), dtype=np.float32)
    steps = np.arange(per_side)
    labels[steps, :, [names[f"row {step + 1}"] for step in steps]] = 1
    labels[:, steps, [names[f"column {step + 1}"] for step in steps]] = 1
    if regions:
        boxes, side = _boxes_in(regions, place), tile_size / per_side
        edges = steps * side
        shared = [
            np.clip(np.minimum(high[:, None], edges + side) - np.maximum(low[:, None], edges), 0, None)
            for low, high in ((boxes[:, 1], boxes[:, 3]), (boxes[:, 0], boxes[:, 2]))
        ]
        area = np.minimum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), side * side)
        is_under = shared[0][:, :, None] * shared[1][:, None, :] >= MIN_OVERLAP * area[:, None, None]
        is_under &= (boxes[:, 3] - boxes[:, 1] >= MIN_HEIGHT)[:, None, None]
        for (labels_of_region, _), under in zip(regions, is_under, strict=True):
            for name in labels_of_region:
                labels[under, names[name]] = 1
    return labels.reshape(per_side * per_side, -1)


def richest_views(
    regions: Sequence[Region],
    places: Sequence[Place],
    tile_size: int,
    rng: np.random.Generator,
) -> list[int]:
    """Order an image's views: tiles that show most first, the global view at random before or after them."""
    counts = [len(shown_names(regions, place, tile_size)) for place in places]
    tiles = sorted(range(1, len(places)), key=lambda view: (-counts[view], rng.random()))
    return [0, *tiles] if rng.random() < 0.5 else [*tiles, 0]


def shown_names(regions: Sequence[Region], place: Place, tile_size: int) -> list[tuple[str, ...]]:
    """Names of the regions that a view shows at least half of, in the order they were rendered."""
    if not regions:
        return []
    boxes = _boxes_in(regions, place)
    inside = np.clip(boxes, 0, tile_size)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    seen = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1]) >= 0.5 * area
    return [names for (names, _), is_seen in zip(regions, seen, strict=True) if is_seen]


def caption_of(regions: Sequence[Region], place: Place, tile_size: int) -> str:
    """Name what a view shows: coloured things, then characters, in the order they were rendered."""
    shown = shown_names(regions, place, tile_size)
    things = [f" {colour} {thing}" for thing, colour in (names for names in shown if len(names) == 2)]
    text = "".join(names[0] for names in shown if len(names) == 1)
    return (f"{','.join(things)}" + (f' "{text}"' if text else "")).strip() or "nothing"
