# SPDX-License-Identifier: Apache-2.0
"""What image processor and model must both know: where tiles lie, how many tokens they take, how bytes are scaled.

    image (H, W) -- choose_grid --> (R, C) tiles -- letterbox --> R * C tiles, row by row
         |                                                             |
         +-- global view: the whole image as one tile, always first ---+--> 1 + R * C views
                                                                               | visible_patches
                                                                      one resampler call per group of patches,
                                                                      Q image tokens each: count_image_tokens

A view is the global view or a tile. Letters: S the side of a tile in pixels, R x C the grid chosen for one image,
P = p * p patches per view, Q latents. Sizes are (height, width), grids (rows, columns). The grid (0, 0) and the image
size (0, 0) both mean a global view alone.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

GLOBAL_VIEW_ONLY = (0, 0)  # the `image_sizes` row of an image given as its global view alone

# -- the grid and its counts ------------------------------------------------------------------------------------------


def choose_grid(image_size: tuple[int, int], tile_grids: Sequence[Sequence[int]], tile_size: int) -> tuple[int, int]:
    """Pick the tile grid that keeps the most image detail.

    Args:
        image_size: (height, width) in pixels.
        tile_grids: allowed layouts, (rows, columns) in tiles.
        tile_size: side of a square tile, in pixels.

    Returns:
        (rows, columns). Detail is the number of source pixels that survive the resize; on a tie the grid with less
        padding wins, then the one listed first (LLaVA-NeXT's `select_best_resolution`).

    Raises:
        ValueError: if a side is not positive or `tile_grids` is empty.

    >>> choose_grid((300, 900), tile_grids=[(2, 1), (1, 2), (2, 2), (1, 3)], tile_size=384)
    (1, 3)
    """
    height, width = image_size
    if height < 1 or width < 1 or not tile_grids:
        raise ValueError(
            f"Cannot choose among {len(tile_grids)} tile grids for an image of {height} x {width} pixels (height x "
            "width); both sides must be positive and at least one grid listed. The size was probably swapped with "
            "another tensor or the configuration has no tile_grids: pass the original (height, width)."
        )
    best, best_rank = (1, 1), (-1, 0)
    for rows, columns in tile_grids:
        grid_height, grid_width = rows * tile_size, columns * tile_size
        scale = min(grid_width / width, grid_height / height)
        detail = min(int(width * scale) * int(height * scale), width * height)
        rank = (detail, detail - grid_height * grid_width)
        if rank > best_rank:
            best, best_rank = (rows, columns), rank
    return best


def grid_of(image_size: tuple[int, int], tile_grids: Sequence[Sequence[int]], tile_size: int) -> tuple[int, int]:
    """(rows, columns) of the tiles beside the global view; (0, 0) without grids or for the size `GLOBAL_VIEW_ONLY`."""
    if not tile_grids or tuple(image_size) == GLOBAL_VIEW_ONLY:
        return (0, 0)
    return choose_grid(image_size, tile_grids, tile_size)


def count_views(grid: tuple[int, int]) -> int:
    """Count the views of an image cut into (rows, columns) tiles: these and the global view."""
    rows, columns = grid
    return 1 + rows * columns


def count_view_slots(tile_grids: Sequence[Sequence[int]]) -> int:
    """Count the views of the largest grid: the slots of `pixel_values`, constant so that any two batches concatenate.

    >>> count_view_slots([(1, 2), (2, 2)]), count_view_slots([])
    (5, 1)
    """
    return max((count_views((rows, columns)) for rows, columns in tile_grids), default=1)


def count_image_tokens(grid: tuple[int, int], num_latents: int, token_sampling: str) -> int:
    """Count the image tokens of an image cut into (rows, columns) tiles; (0, 0) for its global view alone.

    Args:
        grid: what `grid_of` gives.
        num_latents: image tokens per resampler call.
        token_sampling: `patch` resamples each view by itself, `fixed` the whole image in one call.

    >>> [count_image_tokens(grid, 128, "patch") for grid in [(2, 2), (0, 0)]], count_image_tokens((2, 2), 128, "fixed")
    ([640, 128], 128)
    """
    return num_latents * (1 if token_sampling == "fixed" else count_views(grid))


def list_image_token_counts(
    tile_grids: Sequence[Sequence[int]], num_latents: int, token_sampling: str
) -> tuple[int, ...]:
    """List the numbers of image tokens an image may take under any of the grids, smallest first.

    >>> list_image_token_counts([(2, 1), (1, 2), (2, 2)], 128, "patch"), list_image_token_counts([], 128, "patch")
    ((384, 640), (128,))
    """
    grids = [(rows, columns) for rows, columns in tile_grids] or [(0, 0)]
    return tuple(sorted({count_image_tokens(grid, num_latents, token_sampling) for grid in grids}))


# -- where an image lies on its tiles ---------------------------------------------------------------------------------


def fit_inside(image_size: tuple[int, int], box_size: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) with the image's aspect inside a box of (height, width) pixels, rounded up."""
    height, width = image_size
    box_height, box_width = box_size
    scale_height, scale_width = box_height / height, box_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), box_height), box_width
    return box_height, min(math.ceil(width * scale_height), box_width)


def letterbox(image_size: tuple[int, int], box_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns [first, last) of a box of (height, width) pixels that show the image, resized to fit.

    >>> letterbox((100, 200), (768, 768))
    ((192, 576), (0, 768))
    """
    height, width = fit_inside(image_size, box_size)
    top, left = (box_size[0] - height) // 2, (box_size[1] - width) // 2
    return (top, top + height), (left, left + width)


def view_places(
    image_size: tuple[int, int], grid: tuple[int, int], tile_size: int
) -> list[tuple[float, float, float, float]]:
    """Give, for the global view and each tile, how an image's pixels map to it, before rounding to whole pixels.

    Args:
        image_size: (height, width) of the image.
        grid: (rows, columns) in tiles; (0, 0) for a global view alone.
        tile_size: S.

    Returns:
        (scale x, scale y, offset x, offset y) each: view pixel = scale * image pixel + offset.
    """
    (height, width), (rows, columns) = image_size, grid
    places = [(tile_size / width, tile_size / height, 0.0, 0.0)]
    if rows * columns:
        scale = min(rows * tile_size / height, columns * tile_size / width)
        left, top = (columns * tile_size - width * scale) / 2, (rows * tile_size - height * scale) / 2
        places += [
            (scale, scale, left - column * tile_size, top - row * tile_size)
            for row in range(rows)
            for column in range(columns)
        ]
    return places


# -- which patches the resampler sees ---------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def visible_patches(
    image_size: tuple[int, int],
    grid: tuple[int, int],
    patches_per_side: int,
    token_sampling: str,
    tile_grouping: str,
    hide_padding: bool = True,
) -> tuple[torch.Tensor, ...]:
    """List the patch tokens that show the image and not padding, group by group.

    The release stitches an image's tiles to one map, hides the rows or columns of padding, and cuts the map into
    stripes of one tile's length each (`stripes`), which are tiles only when the grid has one column. The resampler
    has no positions of its own, so leaving a hidden patch out equals masking it.

    Args:
        image_size: original (height, width) in pixels; (0, 0) for an image given as its global view alone.
        grid: (rows, columns) in tiles; (0, 0) for a global view alone.
        patches_per_side: p, so that a view has p * p patches.
        token_sampling: `patch` or `fixed`, see `Blip3ResamplerConfig`.
        tile_grouping: `stripes` or `tiles`, see `Blip3ResamplerConfig`.
        hide_padding: whether patches of padding are left out; the first family reads them.

    Returns:
        One tensor of indices per group into the image's patch tokens, flattened from (1 + rows * columns, P). A
        group may be empty: its latents then only read each other.
    """
    rows, columns = grid
    patches = patches_per_side**2
    global_view = torch.arange(patches)
    if rows * columns == 0:
        return (global_view,)
    # index of the patch token at each place of the stitched map
    tiles = torch.arange(patches, count_views(grid) * patches).view(rows, columns, patches_per_side, patches_per_side)
    stitched = tiles.transpose(1, 2).reshape(rows * patches_per_side, columns * patches_per_side)
    is_visible = torch.full_like(stitched, not hide_padding, dtype=torch.bool)
    (top, bottom), (left, right) = _unpadded_region(image_size, (stitched.shape[0], stitched.shape[1]))
    is_visible[top:bottom, left:right] = True
    if token_sampling == "fixed":
        return (torch.cat([global_view, stitched[is_visible]]),)
    if tile_grouping == "tiles":
        stitched, is_visible = (
            each.view(rows, patches_per_side, columns, patches_per_side).transpose(1, 2)
            for each in (stitched, is_visible)
        )
    groups = zip(stitched.reshape(-1, patches), is_visible.reshape(-1, patches), strict=True)
    return (global_view, *(indices[mask] for indices, mask in groups))


def _unpadded_region(
    image_size: tuple[int, int], map_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns [first, last) of a letterboxed map of patches that show the image.

    This is LLaVA's `unpad_image`, with which the released weights were trained. It rounds otherwise than `letterbox`.
    """
    (height, width), (map_height, map_width) = image_size, map_size
    if width / height > map_width / map_height:
        padding = (map_height - int(height * (map_width / width))) // 2
        return (padding, map_height - padding), (0, map_width)
    padding = (map_width - int(width * (map_height / height))) // 2
    return (0, map_height), (padding, map_width - padding)


# -- how bytes are scaled ---------------------------------------------------------------------------------------------


def scale_pixels(
    pixels: Any, rescale_factor: float | None, image_mean: list[float] | None, image_std: list[float] | None
) -> Any:
    """Scale float32 pixels of 0 to 255 in place, in the order of operations of the release so that every bit agrees.

    Args:
        pixels: (..., 3, height, width), a numpy array or a tensor on any device.
        rescale_factor: to multiply by; None for not at all. 1/255 divides by 255, as the release does.
        image_mean: to subtract from each channel then; None for not at all.
        image_std: to divide by last; goes with `image_mean`.

    Returns:
        `pixels`.
    """
    # tensors of the same device: by a number, a GPU multiplies with its reciprocal
    like = pixels.new_tensor if isinstance(pixels, torch.Tensor) else partial(np.asarray, dtype=pixels.dtype)
    if rescale_factor == 1 / 255:
        pixels /= like(255.0)
    elif rescale_factor is not None:
        pixels *= like(rescale_factor)
    if image_mean is not None:
        pixels -= like(image_mean).reshape(-1, 1, 1)
        pixels /= like(image_std).reshape(-1, 1, 1)
    return pixels
