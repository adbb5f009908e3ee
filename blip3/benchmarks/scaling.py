# SPDX-License-Identifier: Apache-2.0
"""Cost against number of images, parts an image and rows: a line through the medians, and its slope."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from .candidates import GLOBAL, IDEFICS, LLAVA, OURS, SQUARE, prefill, tiling
from .clock import Candidate, Comparison, slope, summarize, timed
from .parts import Bench

KINDS = (OURS, LLAVA, IDEFICS)
GRIDS = (GLOBAL, (2, 1), (1, 3), SQUARE)  # 1, 3, 4 and 5 parts with the global view
SLOPE = "a further"


def measure_scaling(bench: Bench) -> list[Comparison]:
    """Measure the prefill along three lines."""
    dtype = bench.dtypes[0]
    models = {kind: bench.build(kind, dtype) for kind in KINDS}
    most = 4 if bench.is_quick else 16
    images = [count for count in (1, 2, 4, 8, 16) if count <= most]
    found = _line(bench, models, dtype, "image", [([count], SQUARE, count) for count in images])
    parts = [([1], grid, tiling.count_views(grid)) for grid in GRIDS]
    found += _line(bench, models, dtype, "part", parts)
    batches = [count for count in (1, 2, 4, 8) if count <= most]
    found += _line(bench, models, dtype, "row", [([1] * count, SQUARE, count) for count in batches])
    return found


def _line(
    bench: Bench, models: dict[str, Any], dtype: str, what: str, points: Sequence[tuple[list[int], tuple, int]]
) -> list[Comparison]:
    """Measure points (rows, grid, place on the line); the last comparison holds the slopes."""
    found = []
    for rows, grid, place in points:
        runners: dict[str, Candidate] = {}
        left_out = {}
        for kind, model in models.items():
            reason = bench.too_long(kind, dtype, rows, grid)
            if grid == GLOBAL and kind == LLAVA:
                reason = "LLaVA-NeXT has no global view alone"
            if reason:
                left_out[kind] = reason
                continue
            runners[kind] = timed(partial(prefill, model, bench.inputs(kind, dtype, rows, grid=grid)), bench.device)
        facts = {"what": what, "place": place, "dtype": dtype}
        name = f"prefill, {place} {what}{'s' * (place > 1)}, {dtype}"
        found += bench.compare(name, runners, {"seconds": ("", "ms", 1000.0)}, facts, left_out)
    return [*found, fit(found, what, dtype)]


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
