# SPDX-License-Identifier: Apache-2.0
"""Cost against number of images, views an image, rows, text tokens and workers: lines through the medians, and slopes.

    image    1 to 64 images of 5 views in one row, as far as a run takes ten seconds; ours to 16
    part     1 to 13 views of one image: the release's grids and, with models that know them, those of up to 12 tiles
    row      1 to 16 rows with an image each
    token    256 to 4,096 tokens of text; ours has a sliding window of 2,048, the peers have none
    worker   images processed by no worker of a loader, one and two, and on the caller's threads: samples a second

Beside the lines stands an image of 1920x1080 as the release's grids cut it, those of up to 4 tiles and up to 12.
Points that are predicted to run too long are left out by name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from . import candidates
from .bench import Bench
from .candidates import GLOBAL, IDEFICS, LLAVA, OURS, SQUARE, Sizes, our_config, prefill, tiling
from .clock import Candidate, Comparison, slope, summarize, timed
from .loader import BY_WORKERS, WORKERS, measure_workers, workers_name

KINDS = (OURS, LLAVA, IDEFICS)
IMAGES, ROWS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096)
GRIDS = (GLOBAL, (1, 1), (2, 1), (1, 3), SQUARE, (2, 3), (3, 3), (3, 4))  # 1 to 13 views with the global one
MOST_TILES = 12
IMAGE_SIZE = (1080, 1920)  # (height, width)
BY_GRIDS = "prefill, 1 image of 1920x1080, by the grids that there are"
SLOPE = "a further"
MANY_IMAGES = 16  # of ours are measured however long they are predicted to take
SLACK = 1.1  # times what the first two points foretell: above it a line is no longer one


@dataclasses.dataclass(frozen=True)
class Point:
    """One place on a line."""

    place: int
    """On the line: the number of images, views, rows or tokens."""
    rows: tuple[int, ...]
    """Images of each row."""
    grid: tuple[int, int] = SQUARE
    """Of every image."""
    text_tokens: int = 0
    """Of a row; 0 takes those of the sizes."""


def measure_scaling(bench: Bench) -> list[Comparison]:
    """Measure the prefill along four lines and an image by its grids, and image processing by workers."""
    dtype, most = bench.dtypes[0], 4 if bench.is_quick else 64
    sizes = dataclasses.replace(bench.sizes, most_tiles=MOST_TILES)
    models = {kind: candidates.build(kind, sizes, dtype, bench.device) for kind in KINDS}
    lines = {
        "image": [Point(count, (count,)) for count in IMAGES if count <= most],
        "part": [Point(tiling.count_views(grid), (1,), grid) for grid in GRIDS],  # the name that results have
        "row": [Point(count, (1,) * count) for count in ROWS if count <= most],
        "token": [Point(count, (0,), text_tokens=count) for count in (TOKENS[:2] if bench.is_quick else TOKENS)],
    }
    found = []
    for what, points in lines.items():
        found += _line(bench, models, dtype, what, points)
    del models
    return [*found, *_measure_grids(bench, dtype), *_line_of_workers(bench)]


def _line(bench: Bench, models: Mapping[str, Any], dtype: str, what: str, points: Sequence[Point]) -> list[Comparison]:
    """Measure points; the last comparison holds the slopes."""
    found = []
    for point in points:
        runners: dict[str, Candidate] = {}
        left_out = {}
        sizes = _sizes_at(bench.sizes, point)
        for kind, model in models.items():
            reason = dataclasses.replace(bench, sizes=sizes).too_long(kind, dtype, point.rows, point.grid)
            if point.grid == GLOBAL and kind == LLAVA:
                reason = "LLaVA-NeXT has no global view alone"
            if kind == OURS and what == "image" and point.place == MANY_IMAGES:
                reason = ""
            if reason:
                left_out[kind] = reason
                continue
            inputs = candidates.make_inputs(kind, sizes, point.rows, bench.device, dtype, grid=point.grid)
            runners[kind] = timed(partial(prefill, model, inputs), bench.device)
        facts = {"what": what, "place": point.place, "dtype": dtype}
        name = f"prefill, {point.place} {what}{'s' * (point.place > 1)}, {dtype}"
        found += bench.compare(name, runners, {"seconds": ("", "ms", 1000.0)}, facts, left_out)
    return [*found, fit(found, what, dtype)]


def _sizes_at(sizes: Sizes, point: Point) -> Sizes:
    return dataclasses.replace(sizes, text_tokens=point.text_tokens or sizes.text_tokens)


def _measure_grids(bench: Bench, dtype: str) -> list[Comparison]:
    """Measure one image as three lists of grids cut it, in as many slots as the processor makes for each."""
    runners: dict[str, Candidate] = {}
    facts: dict[str, Any] = {"dtype": dtype, "grid": {}, "image_tokens": {}}
    for name, most_tiles in (("the release's", 0), ("up to 4 tiles", 4), ("up to 12 tiles", MOST_TILES)):
        sizes = dataclasses.replace(bench.sizes, most_tiles=most_tiles)
        grids = our_config(sizes).tile_grids
        grid = tiling.grid_of(IMAGE_SIZE, grids, sizes.tile_size)
        inputs = candidates.make_inputs(OURS, sizes, [1], bench.device, dtype, grid=grid)
        pixels = inputs["pixel_values"]
        empty = pixels.new_zeros(1, tiling.count_view_slots(grids) - pixels.shape[1], *pixels.shape[2:])
        inputs |= {"pixel_values": torch.cat([pixels, empty], dim=1)}
        model = candidates.build(OURS, sizes, dtype, bench.device)
        runners[name] = timed(partial(prefill, model, inputs), bench.device)
        facts["grid"][name] = list(grid)
        facts["image_tokens"][name] = candidates.count_image_tokens(OURS, sizes, grid)
    return bench.compare(f"{BY_GRIDS}, {dtype}", runners, {"seconds": ("", "ms", 1000.0)}, facts)


def _line_of_workers(bench: Bench) -> list[Comparison]:
    (measured,) = measure_workers(bench)
    if not measured.values:
        return [measured]
    medians = {float(count): summarize(measured.values[workers_name(count)])["median"] for count in WORKERS}
    line = {"samples_a_second": slope(medians)[0], "samples_a_second_at_0": slope(medians)[1]}
    lines = {"lines": {BY_WORKERS: line}}
    return [measured, Comparison(f"{SLOPE} worker", "samples/s", {BY_WORKERS: [slope(medians)[0]]}, lines)]


def fit(comparisons: Sequence[Comparison], what: str, dtype: str) -> Comparison:
    """Fit a line through each candidate's medians, and another through its points up to half of the way.

    A cost that grows faster than linearly shows as a first slope above the second.
    """
    lines: dict[str, dict[str, float]] = {}
    kinds = [kind for kind in KINDS if sum(kind in comparison.values for comparison in comparisons) > 1]
    for kind in kinds:
        points = {
            float(comparison.facts["place"]): summarize(comparison.values[kind])["median"]
            for comparison in comparisons
            if kind in comparison.values
        }
        near = dict(list(points.items())[: max(2, len(points) // 2 + 1)])
        lines[kind] = {"ms": slope(points)[0], "ms_at_0": slope(points)[1], "ms_in_the_first_half": slope(near)[0]}
    values = {kind: [line["ms"]] for kind, line in lines.items()}
    return Comparison(f"{SLOPE} {what}, {dtype}", "ms", values, {"lines": lines})


def end_of_line(points: Mapping[float, float]) -> tuple[float, float] | None:
    """Find where a cost stops being linear: the first point more than a tenth above the line through the first two.

    Args:
        points: place -> cost, by place.

    Returns:
        the place, and how many times the foretold cost it takes; None if all points are on the line.

    >>> end_of_line({1: 3.0, 2: 5.0, 4: 9.0, 8: 34.0})
    (8, 2.0)
    >>> end_of_line({1: 3.0, 2: 5.0, 4: 9.0})
    """
    first, second, *rest = points
    step = (points[second] - points[first]) / (second - first)
    for place in rest:
        foretold = points[first] + step * (place - first)
        if points[place] > SLACK * foretold:
            return place, points[place] / foretold
    return None
