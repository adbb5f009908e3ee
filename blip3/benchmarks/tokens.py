# SPDX-License-Identifier: Apache-2.0
"""Image tokens an image takes, by its size: counted, not timed."""

from typing import Any

import torch
from transformers import AutoImageProcessor

from ..hub import RELEASE, ROOT, model_code
from .bench import Bench
from .candidates import IDEFICS, LLAVA, OURS, TRUE, our_config
from .clock import Comparison
from .images import IMAGE_SIZES

tiling = model_code("tiling_blip3")


def measure_tokens(bench: Bench) -> list[Comparison]:
    """Count at the release's tile size, each peer with its own way of cutting an image up."""
    config = our_config(TRUE)
    image_processor = AutoImageProcessor.from_pretrained(ROOT, subfolder=RELEASE, trust_remote_code=True)
    rows = []
    for height, width in IMAGE_SIZES:
        values = {
            OURS: [float(_count_ours(config, image_processor, height, width))],
            LLAVA: [float(_count_llava(config, height, width))],
            IDEFICS: [float(_count_idefics(height, width))],
        }
        rows.append(Comparison(f"{width}x{height}", "tokens", values, {"height": height, "width": width}))
        bench.say(f"  {rows[-1].name}: " + ", ".join(f"{who} {found[0]:.0f}" for who, found in values.items()))
    return rows


def _count_ours(config: Any, image_processor: Any, height: int, width: int) -> int:
    resampler = config.resampler_config
    grid = image_processor.grid_of(height, width)
    return tiling.count_image_tokens(grid, resampler.num_latents, resampler.token_sampling)


def _count_llava(config: Any, height: int, width: int) -> int:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side, patches = TRUE.tile_size, TRUE.patches_per_side
    pinpoints = [[rows * side, columns * side] for rows, columns in config.tile_grids]
    best_height, best_width = select_best_resolution((height, width), pinpoints)
    whole = torch.zeros(1, best_height // side * patches, best_width // side * patches)
    rows, columns = unpad_image(whole, (height, width)).shape[1:]
    return patches**2 + rows * (columns + 1)


def _count_idefics(height: int, width: int) -> int:
    num_views = tiling.count_views(idefics_grid(height, width, TRUE.tile_size))
    return num_views * (TRUE.patches_per_side // TRUE.patches_per_token) ** 2


def idefics_grid(height: int, width: int, side: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that Idefics3 cuts an image into by SmolVLM's own settings, asked of its processor.

    The longest side is resized to four tiles and both to whole tiles; the global view comes on top.
    """
    from transformers.models import idefics3

    is_transformers_5 = hasattr(idefics3, "Idefics3ImageProcessorPil")
    processor_class = idefics3.Idefics3ImageProcessorPil if is_transformers_5 else idefics3.Idefics3ImageProcessor
    processor = processor_class(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
    _, rows, columns = processor.get_number_of_image_patches(height, width, {})
    return rows, columns
