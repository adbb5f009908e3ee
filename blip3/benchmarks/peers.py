# SPDX-License-Identifier: Apache-2.0
"""A prefill of one, four and eight images against Idefics3, with the same tower and language model.

    own views      images of 1920x1080, each model by its own rule: 5 views of ours, 128 tokens each; 13 of Idefics3,
                   whose rule is asked of its image processor, 81 tokens each
    equal views    2 x 2 tiles and the global view for both; ours with its latents, and with half of them

    parts          at equal views, one image: the same prefill divided into tower, connector (our resampler), language
                   model and the rest, by the time between a part's beginning and its end

The tokens that mark rows and columns of tiles in Idefics3's prompts are left out, in its favour.

With equal views Idefics3 makes fewer image tokens than ours does with all latents, so it has less to read. Its own
rule cuts the same image into more views than ours.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from . import candidates
from .bench import Bench
from .candidates import IDEFICS, OURS, SQUARE, Sizes, count_image_tokens, prefill, tiling
from .clock import Candidate, Comparison, synchronize, timed
from .images import our_processor
from .tokens import idefics_grid

COUNTS = (1, 4, 8)
IMAGE_SIZE = (1080, 1920)  # (height, width)
PARTS, REST = ("vision tower", "connector", "language model"), "the rest"
HALF, IDEFICS_OWN = f"{OURS}, half the latents", f"{IDEFICS}, own views"


def measure_peers(bench: Bench) -> list[Comparison]:
    """Measure all four in turn, for each number of images."""
    dtype = bench.dtypes[0]
    layouts = make_layouts(bench.sizes)
    models = {name: candidates.build(kind, sizes, dtype, bench.device) for name, (kind, sizes, _) in layouts.items()}
    found = []
    for count in COUNTS:
        runners: dict[str, Candidate] = {}
        for name, (kind, sizes, grid) in layouts.items():
            inputs = candidates.make_inputs(kind, sizes, [count], bench.device, dtype, grid=grid)
            runners[name] = timed(partial(prefill, models[name], inputs), bench.device)
        facts = {"images": count, "dtype": dtype, **_describe(layouts)}
        # no round is left out as too long: each count decides a target, and smaller ones have warmed up larger ones
        units = {"seconds": ("", "ms", 1000.0)}
        found += bench.compare(name_of(count, dtype), runners, units, facts, least=bench.least, is_warm=count > 1)
    return found + _measure_parts(bench, dtype, layouts, models)


def _measure_parts(
    bench: Bench, dtype: str, layouts: Mapping[str, Any], models: Mapping[str, Any]
) -> list[Comparison]:
    """Divide a prefill of one image among the parts of each model, at equal views and with all our latents."""
    runners: dict[str, Candidate] = {}
    for name in (OURS, IDEFICS):
        kind, sizes, grid = layouts[name]
        inputs = candidates.make_inputs(kind, sizes, [1], bench.device, dtype, grid=grid)
        runners[name] = divided(parts_of(models[name]), partial(prefill, models[name], inputs), bench.device)
    units = {part: (f", {part}", "ms", 1000.0) for part in (*PARTS, REST)}
    return bench.compare(name_of_parts(dtype), runners, units, {"dtype": dtype}, least=bench.least)


def parts_of(model: Any) -> dict[str, torch.nn.Module]:
    """The parts of ours or of Idefics3, under one name each."""
    names = ("vision_tower", "resampler", "language_model")
    if not hasattr(model.model, names[0]):
        names = ("vision_model", "connector", "text_model")
    return {part: getattr(model.model, name) for part, name in zip(PARTS, names, strict=True)}


def divided(parts: Mapping[str, torch.nn.Module], work: Callable[[], Any], device: str) -> Candidate:
    """Make a candidate of work: the seconds it spends in each part, all calls together, and in the rest."""
    seconds: dict[str, float] = {}
    clock = timed(work, device, "all")

    def begin(part: str, *_: Any) -> None:
        synchronize(device)
        seconds[part] -= time.perf_counter()

    def end(part: str, *_: Any) -> None:
        synchronize(device)
        seconds[part] += time.perf_counter()

    def run() -> dict[str, float]:
        seconds.update(dict.fromkeys(parts, 0.0))
        hooks = [module.register_forward_pre_hook(partial(begin, part)) for part, module in parts.items()]
        hooks += [module.register_forward_hook(partial(end, part)) for part, module in parts.items()]
        whole = clock()["all"]
        for hook in hooks:
            hook.remove()
        return {**seconds, REST: whole - sum(seconds.values())}

    return run


def name_of_parts(dtype: str) -> str:
    """Name of the comparison of parts."""
    return f"parts of a prefill, 1 image, equal views, {dtype}"


def name_of(count: int, dtype: str) -> str:
    """Name of a comparison."""
    return f"prefill, {count} image{'s' * (count > 1)} of 1920x1080, {dtype}"


def make_layouts(sizes: Sizes) -> dict[str, tuple[str, Sizes, tuple[int, int]]]:
    """Kind, sizes and grid of each candidate, for an image of `IMAGE_SIZE`.

    Raises:
        ValueError: if our rule does not choose the grid of the equal views, which would then be no longer our own.
    """
    side = sizes.tile_size
    ours = tuple(our_processor(side).grid_of(*IMAGE_SIZE))
    if ours != SQUARE:
        raise ValueError(
            f"Our rule cuts {IMAGE_SIZE} pixels into {ours} tiles but equal views are {SQUARE}. The released grids "
            "probably changed: choose an image size that is cut so."
        )
    half = dataclasses.replace(sizes, num_latents=sizes.num_latents // 2)
    return {
        OURS: (OURS, sizes, ours),
        HALF: (OURS, half, ours),
        IDEFICS: (IDEFICS, sizes, SQUARE),
        IDEFICS_OWN: (IDEFICS, sizes, idefics_grid(*IMAGE_SIZE, side)),
    }


def _describe(layouts: Mapping[str, tuple[str, Sizes, tuple[int, int]]]) -> dict[str, Any]:
    return {
        "views": {name: tiling.count_views(grid) for name, (_, _, grid) in layouts.items()},
        "image_tokens": {name: count_image_tokens(*layout) for name, layout in layouts.items()},
    }
