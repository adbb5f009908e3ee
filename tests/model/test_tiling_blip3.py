# SPDX-License-Identifier: Apache-2.0
"""Grids, views, tokens and visible patches: against the release's way, and in every place that counts or places."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip3.hub import model_code
from support import SHARED, needs_reference

RELEASED_TILE_GRIDS = model_code("configuration_blip3.RELEASED_TILE_GRIDS")
TWELVE_TILE_GRIDS = model_code("configuration_blip3.TWELVE_TILE_GRIDS")
GLOBAL_VIEW_ONLY = model_code("tiling_blip3.GLOBAL_VIEW_ONLY")
choose_grid = model_code("tiling_blip3.choose_grid")
count_image_tokens = model_code("tiling_blip3.count_image_tokens")
count_view_slots = model_code("tiling_blip3.count_view_slots")
count_views = model_code("tiling_blip3.count_views")
fit_inside = model_code("tiling_blip3.fit_inside")
grid_of = model_code("tiling_blip3.grid_of")
letterbox = model_code("tiling_blip3.letterbox")
list_image_token_counts = model_code("tiling_blip3.list_image_token_counts")
view_places = model_code("tiling_blip3.view_places")
visible_patches = model_code("tiling_blip3.visible_patches")

FIXTURES = SHARED / "reference" / "fixtures"
SIZES = [(1, 1), (7, 10), (384, 384), (480, 640), (640, 480), (100, 900), (900, 100), (50, 600), (2000, 3), (11, 616)]
SIDE = 27
TILE = 28

# -- grids and counts -------------------------------------------------------------------------------------------------


@needs_reference
def test_grids_and_visible_patches_equal_the_reference_on_300_sizes():
    rows = json.loads((FIXTURES / "grid_table_384.json").read_text())["rows"]
    assert len(rows) == 300
    for width, height, grid_width, grid_height, visible, *groups in rows:
        grid = choose_grid((height, width), RELEASED_TILE_GRIDS, 384)
        assert grid == (grid_height // 384, grid_width // 384), (height, width)
        own = visible_patches((height, width), grid, 27, "patch", "stripes")
        assert [len(indices) for indices in own] == [729, *groups], (height, width)
        assert sum(groups) == visible


@pytest.mark.parametrize("grids", [RELEASED_TILE_GRIDS, TWELVE_TILE_GRIDS, ((1, 1), (1, 2)), ()])
@pytest.mark.parametrize("sampling", ["patch", "fixed"])
@pytest.mark.parametrize("size", [*SIZES, GLOBAL_VIEW_ONLY])
def test_tokens_are_the_latents_of_each_group_of_patches(size, sampling, grids):
    grid = grid_of(size, grids, 384)
    groups = visible_patches(size, grid, SIDE, sampling, "stripes")
    num_tokens = count_image_tokens(grid, 8, sampling)
    assert num_tokens == 8 * len(groups)
    assert size == GLOBAL_VIEW_ONLY or num_tokens in list_image_token_counts(grids, 8, sampling)
    assert count_views(grid) <= count_view_slots(grids)


def test_the_numbers_of_tokens_an_image_may_take_are_listed():
    assert list_image_token_counts(RELEASED_TILE_GRIDS, 128, "patch") == (384, 512, 640)
    assert list_image_token_counts(RELEASED_TILE_GRIDS, 128, "fixed") == (128,)
    assert list_image_token_counts([], 128, "patch") == (128,)


# -- where an image lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "box_size", "wanted"),
    [
        ((300, 900), (384, 1152), (384, 1152)),
        ((1, 20000), (384, 1152), (1, 1152)),
        ((20000, 1), (1152, 384), (1152, 1)),
        ((480, 640), (768, 768), (576, 768)),
        ((3, 1), (768, 384), (768, 256)),
    ],
)
def test_fit_inside_keeps_the_aspect_and_at_least_one_pixel(image_size, box_size, wanted):
    assert fit_inside(image_size, box_size) == wanted


side = st.integers(1, 2000)


@given(height=side, width=side, rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_letterbox_and_places_agree_to_a_pixel(height, width, rows, columns):
    box = (rows * TILE, columns * TILE)
    (top, bottom), (left, right) = letterbox((height, width), box)
    assert (bottom - top, right - left) == fit_inside((height, width), box)
    whole, *tiles = view_places((height, width), (rows, columns), TILE)
    assert whole == (TILE / width, TILE / height, 0, 0)
    assert len(tiles) == rows * columns
    for index, (scale_x, scale_y, x, y) in enumerate(tiles):
        row, column = divmod(index, columns)
        assert scale_x == scale_y
        assert abs(x + column * TILE - left) <= 1
        assert abs(y + row * TILE - top) <= 1
        assert abs(x + column * TILE + scale_x * width - right) <= 1
        assert abs(y + row * TILE + scale_y * height - bottom) <= 1


# -- which patches the resampler sees ---------------------------------------------------------------------------------


def stitched_with_mask(image_size, grid, side):
    """The release's way, literally: number the patches, stitch the tiles, blank the padding."""
    rows, columns = grid
    numbers = np.arange(rows * columns * side * side).reshape(rows, columns, side, side) + side * side
    stitched = np.block([[numbers[r, c] for c in range(columns)] for r in range(rows)])
    height, width = stitched.shape
    mask = np.ones_like(stitched)
    if image_size[1] / image_size[0] > width / height:
        new_height = int(image_size[0] * (width / image_size[1]))
        padding = (height - new_height) // 2
        mask[:padding] = 0
        mask[height - padding :] = 0
    else:
        new_width = int(image_size[1] * (height / image_size[0]))
        padding = (width - new_width) // 2
        mask[:, :padding] = 0
        mask[:, width - padding :] = 0
    return stitched, mask


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("grids", [RELEASED_TILE_GRIDS, TWELVE_TILE_GRIDS, ((1, 1), *RELEASED_TILE_GRIDS)])
def test_stripes_are_raster_runs_of_the_stitched_map(image_size, grids):
    grid = choose_grid(image_size, grids, 384)
    stitched, mask = stitched_with_mask(image_size, grid, SIDE)
    expected = zip(stitched.reshape(-1, SIDE * SIDE), mask.reshape(-1, SIDE * SIDE), strict=True)
    groups = visible_patches(image_size, grid, SIDE, "patch", "stripes")
    assert groups[0].tolist() == list(range(SIDE * SIDE))
    assert [group.tolist() for group in groups[1:]] == [numbers[m == 1].tolist() for numbers, m in expected]


@pytest.mark.parametrize("image_size", SIZES)
def test_tiles_grouping_keeps_each_tiles_own_patches(image_size):
    grid = choose_grid(image_size, RELEASED_TILE_GRIDS, 384)
    groups = visible_patches(image_size, grid, SIDE, "patch", "tiles")
    stripes = visible_patches(image_size, grid, SIDE, "patch", "stripes")
    for tile, group in enumerate(groups):
        assert set((group // SIDE**2).tolist()) <= {tile}
    assert sorted(torch.cat(groups).tolist()) == sorted(torch.cat(stripes).tolist())


@pytest.mark.parametrize("image_size", SIZES)
def test_fixed_sampling_reads_all_of_an_image_in_one_call(image_size):
    grid = choose_grid(image_size, RELEASED_TILE_GRIDS, 384)
    stitched, mask = stitched_with_mask(image_size, grid, SIDE)
    (group,) = visible_patches(image_size, grid, SIDE, "fixed", "stripes")
    assert group.tolist() == [*range(SIDE * SIDE), *stitched[mask == 1].tolist()]


def test_a_global_view_alone_is_one_group():
    (group,) = visible_patches(GLOBAL_VIEW_ONLY, (0, 0), SIDE, "patch", "stripes")
    assert group.tolist() == list(range(SIDE * SIDE))
