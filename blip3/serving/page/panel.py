# SPDX-License-Identifier: Apache-2.0
"""What the model sees of an uploaded image: its size, grid, tokens and tiles; nothing but uploads is opened."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...hub import model_code
from ...images import turns_upright
from ..decode import check_file, decode_image
from ..limits import Deadline, ImageLimits

SEEN_TITLE = "What the model sees"


@dataclasses.dataclass(frozen=True)
class ImageView:
    """What an image became: its size in pixels, grid of (rows, columns), image tokens, global view and tiles."""

    height: int
    width: int
    grid: tuple[int, int]
    num_tokens: int
    tiles: tuple[Image.Image, ...]


def fetch_images(paths: Sequence[Path], uploads: Path, limits: ImageLimits, upright: bool = True) -> list[Image.Image]:
    """Open uploaded images as the endpoint opens those of a request: checked before they are decoded, and in time.

    Args:
        paths: where the page put them.
        uploads: the only folder they may lie in.
        limits: of one conversation.
        upright: turn them as their EXIF tag says.

    Raises:
        ValueError: naming the image, if it lies elsewhere, is gone, is no image or takes too long.
    """
    images: list[Image.Image] = []
    deadline, num_pixels = Deadline(limits.total_seconds), 0
    for index, path in enumerate(paths):
        which = f"Image {index + 1} of {len(paths)}"
        if not path.resolve().is_relative_to(uploads.resolve()):
            raise ValueError(f"{which}: it was not uploaded here, and nothing else is opened. Upload it.")
        try:
            file = check_file(path.read_bytes(), limits, limits.max_total_pixels - num_pixels)
            images.append(decode_image(file, limits, deadline, upright))
        except FileNotFoundError:
            raise ValueError(
                f"{which}: it is no longer kept. The page was probably left open for long: start a new conversation."
            ) from None
        except ValueError as error:
            raise ValueError(f"{which}: {error}") from None
        num_pixels += images[-1].height * images[-1].width
    return images


def image_arguments(processor: Any, splits: bool) -> dict[str, Any]:
    """What the processor is told about images, for prompts and for the panel alike."""
    return {"do_image_splitting": splits, "do_exif_transpose": turns_upright(processor)}


def describe_images(processor: Any, images: Sequence[Image.Image], splits: bool) -> list[ImageView]:
    """Say what each image becomes.

    Args:
        processor: the model's.
        images: of `fetch_images`.
        splits: whether tiles are cut, or the global view is all.

    Raises:
        ValueError: naming the image that cannot be read.
    """
    if not images:
        return []
    tiler, count_views = processor.image_processor, model_code("tiling_blip3.count_views")
    inputs = tiler(list(images), return_tensors="pt", **image_arguments(processor, splits))
    views = []
    for index, image in enumerate(images):
        grid = tiler.grid_of(image.height, image.width, splits)
        shown = tiler.tiles_to_images(inputs["pixel_values"][index, : count_views(grid)])
        num_tokens = processor.count_image_tokens(tuple(inputs["image_sizes"][index].tolist()))
        views.append(ImageView(image.height, image.width, grid, num_tokens, tuple(shown)))
    return views


def panel_html(views: Sequence[ImageView]) -> str:
    """Lay out what the model sees of each image."""
    if not views:
        return panel_note("Add an image to see its global view, its tiles and its tokens.")
    total = sum(view.num_tokens for view in views)
    blocks = []
    for index, view in enumerate(views):
        rows, columns = view.grid
        layout = f"grid {rows} x {columns}, and the global view" if rows else "global view alone"
        tiles = "".join(_img(tile, f"tile {place + 1}") for place, tile in enumerate(view.tiles[1:]))
        grid = (
            f'<figure class="tiles{" tall" if rows > columns else ""}">'
            f'<div style="grid-template-columns: repeat({columns}, 1fr)">{tiles}</div>'
            f"<figcaption>{rows * columns} tiles</figcaption></figure>"
        )
        blocks.append(
            f'<section><h4>Image {index + 1} <span class="count">{view.num_tokens} tokens</span></h4>'
            f"<p>{view.height} x {view.width} pixels (height x width), {layout}</p>"
            f'<div class="parts"><figure class="global"><div>{_img(view.tiles[0], "global view")}</div>'
            f"<figcaption>global view</figcaption></figure>{grid if rows else ''}</div></section>"
        )
    title = f"{len(views)} image{'s' if len(views) > 1 else ''}, {total} image tokens"
    return f'<div class="seen"><h3>{SEEN_TITLE} <small>{title}</small></h3>{"".join(blocks)}</div>'


def panel_note(text: str, is_error: bool = False) -> str:
    """The panel when there is nothing to lay out."""
    kind = "error" if is_error else "empty"
    return f'<div class="seen"><h3>{SEEN_TITLE}</h3><p class="{kind}">{html.escape(text)}</p></div>'


def _img(tile: Image.Image, title: str) -> str:
    buffer = io.BytesIO()
    tile.save(buffer, "WEBP", quality=90)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{title}" title="{title}" src="data:image/webp;base64,{encoded}">'
