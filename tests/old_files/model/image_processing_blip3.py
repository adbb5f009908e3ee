# SPDX-License-Identifier: Apache-2.0
"""Pictures to tiles: `pixel_values` and `image_sizes` of BLIP-3 (arXiv:2408.08872, section 3.1 "any-resolution").

    picture (H, W) --- resize, ignoring aspect --------------------------> global view, tile 0
         |
         +-- choose_grid -> (R, C) -- resize, keeping aspect -- pad black --> R * C tiles, row by row

Letters: I pictures of the whole batch in reading order, T the constant number of tile slots (1 + the largest grid),
S the tile's side in pixels, R x C the grid chosen for one picture. `pixel_values` is (I, T, 3, S, S), slots a picture
does not use are zero; `image_sizes` is (I, 2), original (height, width). Which slots are used is never stored: it is
`count_tiles(image_size, tile_grids, tile_size)` wherever it is needed.
"""

import base64
import difflib
import inspect
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL import __version__ as pillow_version
from transformers import image_utils
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .configuration_blip3 import RELEASED_TILE_GRIDS, check_tile_grids, expose_in_package

logger = logging.get_logger(__name__)

GLOBAL_VIEW_ONLY = (0, 0)  # the `image_sizes` row of a picture given as its global view alone
RESIZE_BACKENDS = ("pil", "torch")
URL_TIMEOUT_SECONDS = 60


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
            f"Cannot choose among {len(tile_grids)} tile grids for a picture of {height} x {width} pixels (height x "
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


def count_tiles(image_size: tuple[int, int], tile_grids: Sequence[Sequence[int]], tile_size: int) -> int:
    """Count the tiles of a picture, its global view included; 1 without grids or for the size `GLOBAL_VIEW_ONLY`.

    >>> count_tiles((300, 900), tile_grids=[(1, 2), (1, 3)], tile_size=384), count_tiles((0, 0), [(1, 2)], 384)
    (4, 1)
    """
    rows, columns = grid_of(image_size, tile_grids, tile_size)
    return 1 + rows * columns


def fit_inside(image_size: tuple[int, int], box_size: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) with the picture's aspect inside a box of (height, width) pixels, rounded up."""
    height, width = image_size
    box_height, box_width = box_size
    scale_height, scale_width = box_height / height, box_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), box_height), box_width
    return box_height, min(math.ceil(width * scale_height), box_width)


class Blip3ImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What may be set per call or at `from_pretrained`, beside transformers' own image arguments.

    Attributes:
        tile_grids: `from_pretrained` only, together with the model's.
        do_image_splitting: False gives the global view alone.
        do_exif_transpose: True turns every image upright as its EXIF tag says, False none, None those opened here.
        resize_backend: `pil` or `torch`.
        max_image_pixels: larger pictures are refused.
    """

    tile_grids: list[list[int]] | None
    do_image_splitting: bool | None
    do_exif_transpose: bool | None
    resize_backend: str | None
    max_image_pixels: int | None


class _PictureError(ValueError):
    """What is wrong with one picture; `preprocess` says which one it is."""


class Blip3ImageProcessor(BaseImageProcessor):
    """Cuts pictures into a global view and tiles.

    A picture is a path, an open file, bytes of a file, an http(s) or data URL, a base64 string, a {"bytes", "path"}
    cell of `datasets`, a PIL image of any mode, or a numpy array or torch tensor, (H, W), (H, W, C) or (C, H, W) with
    1, 3 or 4 channels. Where both ends of a shape could be channels, arrays are taken as (H, W, C) and tensors as
    (C, H, W); `input_data_format` decides otherwise. Transparent pictures are laid on white, 16-bit ones reduced to 8;
    PIL modes I and I;16 count as 16-bit. Arrays of integers hold 0 to 255 (uint16: 0 to 65535), arrays of floats 0 to
    1, or 0 to 255 when a value reaches 2. What is opened here, that is all but PIL images, arrays and tensors, is
    turned upright as its EXIF tag says.

    Args:
        size: {"height": S, "width": S}, the tile in pixels; the vision tower's `image_size`.
        tile_grids: candidate layouts, (rows, columns) in tiles; must equal the model's `config.tile_grids`.
        do_image_splitting: False gives each picture as its global view alone and marks it by `image_sizes` (0, 0).
        resize_backend: `pil` is bit-exact with the released checkpoints' preprocessing; `torch` resizes with
            antialiased uint8 interpolation, faster and 1/255 away on under 1 % of a photograph's values (2/255 on
            noise).
        resample: PIL filter; the torch backend knows bicubic and bilinear.
        do_rescale: scale 8-bit values by `rescale_factor`.
        rescale_factor: the factor, 1/255.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: one number per channel, or one for all.
        image_std: one number per channel, or one for all.
        do_convert_rgb: kept for transformers; pictures are always converted to RGB.
        do_exif_transpose: turn images upright as their EXIF tag says. None turns what is opened here and leaves PIL
            images as given, as the released preprocessing does; True turns PIL images as well; False turns nothing.
        max_image_pixels: larger pictures are refused before they are decoded (decompression bombs).

    Raises:
        ValueError: on a misspelt argument or a value that cannot work.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Blip3ImageProcessorKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        tile_grids: Sequence[Sequence[int]] | None = RELEASED_TILE_GRIDS,
        do_image_splitting: bool = True,
        resize_backend: str = "pil",
        resample: int = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        do_convert_rgb: bool = True,
        do_exif_transpose: bool | None = None,
        max_image_pixels: int = 178_956_970,
        **kwargs: Any,
    ):
        _refuse_misspelt(kwargs)
        super().__init__(**kwargs)
        self.size = {"height": 384, "width": 384} if size is None else _copy(size)
        self.tile_grids = _copy(() if tile_grids is None else tile_grids)
        self.do_image_splitting = do_image_splitting
        self.resize_backend = resize_backend
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(0.5 if image_mean is None else image_mean)
        self.image_std = _per_channel(0.5 if image_std is None else image_std)
        self.do_convert_rgb = do_convert_rgb
        self.do_exif_transpose = do_exif_transpose
        self.max_image_pixels = max_image_pixels
        _check_settings(dict(vars(self)))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Hand overrides to the constructor, which checks them; transformers 4.57 would set them afterwards."""
        own = {name: kwargs.pop(name) for name in _SETTINGS & kwargs.keys()}
        _refuse_misspelt(kwargs)
        return super().from_dict({**image_processor_dict, **own}, **kwargs)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.size["height"]

    @property
    def num_tile_slots(self) -> int:
        """T, tiles of the largest grid and the global view: constant, so that any two batches concatenate."""
        return 1 + max((rows * columns for rows, columns in self.tile_grids), default=0)

    def grid_of(self, height: int, width: int, do_image_splitting: bool | None = None) -> tuple[int, int]:
        """(rows, columns) of the tiles a picture of (height, width) pixels is cut into; (0, 0) without tiles."""
        image_size = self.image_size_for_model(height, width, do_image_splitting)
        return grid_of(image_size, self.tile_grids, self.tile_size)

    def image_size_for_model(self, height: int, width: int, do_image_splitting: bool | None = None) -> tuple[int, int]:
        """The `image_sizes` row of a picture of (height, width) pixels."""
        splits = self.do_image_splitting if do_image_splitting is None else do_image_splitting
        return (height, width) if splits else GLOBAL_VIEW_ONLY

    def fetch_images(self, images: Any) -> Any:
        """Open paths, files, bytes, URLs, base64 strings and `datasets` cells, keeping the nesting.

        Images opened here are neither decoded nor turned yet: `preprocess` does both, whose arguments may forbid it.
        Other entries pass through.

        Raises:
            ValueError: if an entry cannot be opened as a picture.
        """
        entries = _entries_of(images)
        if entries is not None:
            return [self.fetch_images(image) for image in entries]
        if not _is_source(images):
            return images
        try:
            image = _open(images)
        except Exception as error:  # decoders raise whatever a broken file makes them meet
            raise ValueError(_explain_unopened(images, error)) from error
        setattr(image, _OPENED_HERE, True)
        return image

    def open_image(self, image: Any) -> Image.Image:
        """Open one image as `preprocess` reads it: decoded, RGB, turned upright where `do_exif_transpose` says so.

        Raises:
            ValueError: if it cannot be opened or decoded, or is too large.
        """
        opened = self.fetch_images(image)
        try:
            return self._to_rgb(opened, self._options({}))
        except Exception as error:  # decoders raise whatever a broken file makes them meet
            raise ValueError(f"Picture 1 of 1: {_explain(error)}") from error

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = None, **kwargs: Any) -> BatchFeature:
        """Turn pictures into model inputs.

        Args:
            images: one picture or a list, nested or not; read in order.
            return_tensors: "pt" for torch; "np" or None for numpy.
            **kwargs: any argument of the class except `size` and `tile_grids`, for this call; and transformers'
                `input_data_format` and `device`.

        Returns:
            `pixel_values` (I, T, 3, S, S) float32 and `image_sizes` (I, 2) int64.

        Raises:
            ValueError: naming the picture at fault, or an argument that cannot be honoured.
        """
        options = self._options(kwargs)
        pictures = _flatten(self.fetch_images(images))
        if not pictures:
            raise ValueError(
                "images is empty but at least one picture is needed. A text-only prompt was probably given an empty "
                "list: leave images out or pass None."
            )
        pixel_values = torch.empty(len(pictures), self.num_tile_slots, 3, self.tile_size, self.tile_size)
        image_sizes = torch.zeros(len(pictures), 2, dtype=torch.long)
        for index, picture in enumerate(pictures):
            try:
                image = self._to_rgb(picture, options)
            except Exception as error:  # decoders raise whatever a broken file makes them meet
                raise ValueError(f"Picture {index + 1} of {len(pictures)}: {_explain(error)}") from error
            image_size = self.image_size_for_model(image.height, image.width, options["do_image_splitting"])
            image_sizes[index] = torch.tensor(image_size)
            self._fill_tiles(pixel_values[index], image, grid_of(image_size, self.tile_grids, self.tile_size), options)
        return self._package(pixel_values, image_sizes, return_tensors, options)

    def _package(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, return_tensors: Any, options: dict
    ) -> BatchFeature:
        if return_tensors in ("pt", TensorType.PYTORCH):
            device = options["device"]
            return BatchFeature({"pixel_values": pixel_values.to(device), "image_sizes": image_sizes.to(device)})
        data = {"pixel_values": pixel_values.numpy(), "image_sizes": image_sizes.numpy()}
        return BatchFeature(data, tensor_type=return_tensors)

    def _options(self, kwargs: dict) -> dict:
        """Merge call arguments over the attributes and refuse what cannot be honoured per call."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        options |= {"device": None, "input_data_format": None}
        for name, value in kwargs.items():
            if value is None:
                continue
            if name in ("size", "tile_grids"):
                if _copy(value) == options[name]:
                    continue
                raise ValueError(
                    f"{name} was given for one call ({value!r}) but the model counts tiles from its own configuration "
                    f"({options[name]!r}) and both must agree. To change it, pass {name} to from_pretrained of the "
                    "processor and the matching value to the model's configuration."
                )
            if name in options:
                options[name] = _per_channel(value) if name in ("image_mean", "image_std") else value
            elif name not in self.valid_kwargs.__annotations__:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Known arguments: {', '.join(sorted(options))}."
                raise ValueError(
                    f"The image processor was called with the unknown argument {name!r} ({value!r}); expected one of "
                    f"its own. It is probably misspelt. {hint}"
                )
            elif name in _UNSUPPORTED and value != _UNSUPPORTED[name]:
                logger.warning_once(f"Blip3ImageProcessor ignores {name}={value!r}: tiling fixes size and layout.")
        _check_settings(options)
        if options["input_data_format"] not in (None, *ChannelDimension):
            raise ValueError(
                f"input_data_format is {options['input_data_format']!r} but must be 'channels_first' or "
                "'channels_last'. It is probably misspelt: leave it out to have arrays and tensors told apart."
            )
        return options

    def _to_rgb(self, picture: Any, options: dict) -> Image.Image:
        """Decode and convert one picture to an RGB image of 8 bits per channel."""
        if not isinstance(picture, Image.Image):
            picture = _array_to_image(picture, options["input_data_format"])
        if picture.width < 1 or picture.height < 1:
            raise _PictureError(
                f"it is {picture.height} x {picture.width} pixels (height x width) but both sides must be positive. "
                "It was probably cropped to nothing: check the crop or drop the picture."
            )
        if picture.width * picture.height > options["max_image_pixels"]:
            raise _PictureError(
                f"it has {picture.width * picture.height} pixels but at most {options['max_image_pixels']} are "
                "decoded. It is probably a decompression bomb or a scan: downscale it, or raise max_image_pixels if "
                "you trust it."
            )
        turns = options["do_exif_transpose"]
        if getattr(picture, _OPENED_HERE, False) if turns is None else turns:
            picture = _turn_upright(picture)
        return _flatten_to_rgb(picture)

    def _fill_tiles(
        self, pixel_values: torch.Tensor, image: Image.Image, grid: tuple[int, int], options: dict
    ) -> None:
        """Write one picture's global view and (rows, columns) of tiles into its (T, 3, S, S) slots."""
        side = self.tile_size
        rows, columns = grid
        num_tiles = 1 + rows * columns
        sizes = [(side, side)]
        if num_tiles > 1:
            sizes.append(fit_inside((image.height, image.width), (rows * side, columns * side)))
        resize = _resize_with_torch if options["resize_backend"] == "torch" else _resize_with_pil
        resized = resize(image, sizes, options["resample"])
        pixel_values[0] = torch.from_numpy(resized[0]).permute(2, 0, 1)
        if num_tiles > 1:
            (height, width), canvas = sizes[1], np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
            top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
            canvas[top : top + height, left : left + width] = resized[1]
            tiles = torch.from_numpy(canvas).view(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3)
            pixel_values[1:num_tiles].view(rows, columns, 3, side, side).copy_(tiles)  # (R, C, 3, S, S)
        pixel_values[num_tiles:] = 0
        for tile in pixel_values[:num_tiles]:  # one tile at a time stays in the processor's cache
            self._normalize(tile, options)

    def _normalize(self, tile: torch.Tensor, options: dict) -> None:
        """Scale 8-bit values in place, in the order of operations of the release so that every bit agrees."""
        if options["do_rescale"]:
            factor = options["rescale_factor"]
            tile = tile.div_(255) if factor == 1 / 255 else tile.mul_(factor)
        if options["do_normalize"]:
            mean, std = (torch.tensor(options[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
            tile.sub_(mean).div_(std)


_SETTINGS = frozenset(inspect.signature(Blip3ImageProcessor.__init__).parameters) - {"self", "kwargs"}

# Arguments transformers may pass whose other values this processor does not honour.
_UNSUPPORTED = {
    "do_resize": True,
    "do_center_crop": False,
    "do_pad": True,
    "data_format": ChannelDimension.FIRST,
    "crop_size": None,
    "pad_size": None,
}

_PILLOW_CHOOSES_THE_ORDER = int(pillow_version.split(".")[0]) >= 13
_RESAMPLE_MODES = {PILImageResampling.BICUBIC: "bicubic", PILImageResampling.BILINEAR: "bilinear"}


def _resize_with_pil(image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int) -> list[np.ndarray]:
    """Resize to each (height, width); returns (height, width, 3) uint8 each.

    Pillow lets other threads run meanwhile, so where torch may use several, the sizes are made side by side.
    """
    resize = partial(_resize_once, image, resample=resample)
    if len(sizes) == 1 or torch.get_num_threads() == 1:
        return list(map(resize, sizes))
    with ThreadPoolExecutor(len(sizes)) as pool:  # none is kept: its threads would be missing after a fork
        return list(pool.map(resize, sizes))


def _resize_once(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.array(image.resize((size[1], size[0]), resample))


def _resize_with_torch(image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int) -> list[np.ndarray]:
    """Resize to each (height, width) with torch's antialiased 8-bit kernels; returns (height, width, 3) uint8 each."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
    return [_interpolate(pixels, size, _RESAMPLE_MODES[resample]) for size in sizes]


def _interpolate(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize (1, 3, H, W) to (height, width, 3) in two passes with 8 bits between them, in the order Pillow picks.

    Since 13.0 that is vertical first where height shrinks more (found by comparing 2,900 random sizes); the other
    order, which is torch's own, changes a quarter of the values.
    """
    (height, width), (new_height, new_width) = pixels.shape[-2:], size
    shrinks_in_height = height - new_height > max(0, 2 * (width - new_width))
    passes = [(new_height, width), size] if _PILLOW_CHOOSES_THE_ORDER and shrinks_in_height else [size]
    for pass_size in passes:
        pixels = torch.nn.functional.interpolate(pixels, pass_size, mode=mode, align_corners=False, antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


# -- Opening ----------------------------------------------------------------------------------------------------------

_OPENED_HERE = "is_opened_by_blip3"  # attribute of PIL images that `fetch_images` made
_MAX_PATH_CHARACTERS = 4096
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what shows the image upright


def list_images(images: Any) -> Any:
    """Turn whatever holds images (a `datasets` Column, an iterator, ...) into lists, row by row; read once, in order.

    >>> list_images(iter(["a.jpg", ("b.jpg", "c.jpg")]))
    ['a.jpg', ['b.jpg', 'c.jpg']]
    """
    entries = _entries_of(images)
    return images if entries is None else [list_images(entry) for entry in entries]


def check_not_swapped(images: Any, text: Any) -> None:
    """Refuse images given as text and text given as images, which positional arguments in the other order do.

    Raises:
        ValueError: saying what each argument holds.
    """
    if images is None or text is None:
        return
    image, prompt = _first_entry(images), _first_entry(text)
    is_image = isinstance(prompt, Image.Image | np.ndarray | torch.Tensor) or (
        _is_source(prompt) and not isinstance(prompt, str)
    )
    if is_image or (isinstance(image, str) and "<image>" in image):
        held = [
            f"a str {entry[:60]!r}" if isinstance(entry, str) else f"a {type(entry).__name__}"
            for entry in (image, prompt)
        ]
        raise ValueError(
            f"images holds {held[0]} and text holds {held[1]}, but images come first and text, with one <image> each, "
            "second. The two were probably swapped: write processor(images=..., text=...)."
        )


def _entries_of(images: Any) -> list | None:
    """List the entries of what holds images; None for what is one image, or nothing that could hold any."""
    if _is_source(images) or isinstance(images, Image.Image | Mapping | Set) or not isinstance(images, Iterable):
        return None
    is_numeric = getattr(getattr(images, "dtype", None), "kind", "O") in "biufc" or isinstance(images, torch.Tensor)
    return None if is_numeric or getattr(images, "ndim", 1) != 1 else list(images)


def _first_entry(images: Any) -> Any:
    while isinstance(images, list | tuple) and images:
        images = images[0]
    return images


def _is_source(image: Any) -> bool:
    """Whether this is something to open, rather than pixels."""
    if isinstance(image, Mapping):  # an undecoded image of `datasets`
        return not image.keys().isdisjoint(("bytes", "path"))
    return isinstance(image, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(image, "read")


def _open(source: Any) -> Image.Image:
    if isinstance(source, Mapping):  # either may be None
        source = source.get("bytes") or source.get("path")
        if source is None:
            raise _PictureError("it has neither bytes nor path")
    if isinstance(source, str):
        return _open_text(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source)


def _open_text(text: str) -> Image.Image:
    """Open a file name, URL or base64 text; a file name goes first, since base64 text may look like one."""
    if text.startswith(("http://", "https://")):
        return _open_url(text)
    if len(text) < _MAX_PATH_CHARACTERS and os.path.exists(text):
        return Image.open(text)
    is_data_url = text.startswith("data:")
    try:
        return Image.open(io.BytesIO(base64.b64decode(text.split(",", 1)[-1] if is_data_url else text)))
    except Exception as error:
        may_be_name = len(text) < _MAX_PATH_CHARACTERS or any(character in text for character in ".\\:~-_")
        if text and may_be_name and not is_data_url:
            raise FileNotFoundError(text) from error
        raise


def _open_url(url: str) -> Image.Image:
    """Download an image with the client of transformers' own loader, which would turn every image upright.

    Raises:
        ValueError: if the server's answer is not a file.
    """
    if hasattr(image_utils, "httpx"):  # transformers 5
        response = image_utils.httpx.get(url, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True)
    else:
        response = image_utils.requests.get(url, timeout=URL_TIMEOUT_SECONDS)
    if response.status_code != 200:
        raise _PictureError(f"its server answered with status {response.status_code}")
    return Image.open(io.BytesIO(response.content))


def _explain_unopened(source: Any, error: Exception) -> str:
    """Say what was to be opened, why it could not be, and what to do about it."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or dict(source)
    is_path = isinstance(source, str | os.PathLike) and len(str(source)) < _MAX_PATH_CHARACTERS
    if isinstance(error, FileNotFoundError):
        reason = "no such file, nor base64 text of an image" if isinstance(source, str) else "no such file"
        advice = "The name is probably misspelt or starts in another folder: correct it, or pass the whole path."
    elif is_path and os.path.isdir(source):
        reason, advice = "it is a folder", "Its files were probably meant: name them one by one."
    elif is_path and os.path.isfile(source) and not os.path.getsize(source):
        reason, advice = "the file is empty", "It was probably cut off in a download: fetch it again or drop it."
    elif isinstance(error, _PictureError):
        reason, advice = str(error), "It was probably moved or never stored: look where it comes from, or drop it."
    else:
        reason = f"{type(error).__name__}: {re.sub(r' ?<[^<>]* object at 0x[^<>]*>', '', str(error))[:200]}"
        advice = "It is probably damaged, of another type or out of reach: check that PIL.Image.open reads it."
    return (
        f"{_name_source(source)} could not be opened as a picture ({reason}). Expected an image file, its bytes, a "
        f"URL or a base64 string. {advice}"
    )


def _name_source(source: Any) -> str:
    """Name what was to be opened; texts longer than a file's name may be are cut."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if isinstance(text, str) and len(text) > 255:
        return f"{text[:80]!r}... ({len(text)} characters)"
    return repr(text)[:600]


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF tag says. `ImageOps.exif_transpose` fails on tags that have nothing to do with it."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which says nothing about the pixels
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


# -- Pixels -----------------------------------------------------------------------------------------------------------


def _flatten(images: Any) -> list:
    """Flatten nested lists and (N, ...) arrays of pictures into one list."""
    if isinstance(images, list | tuple):
        return [picture for image in images for picture in _flatten(image)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _flatten_to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: transparency onto white, 16 bits to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32 if image.mode == "F" else np.int32)
        if isinstance(image.info.get("transparency"), int):  # a 16-bit PNG may name one grey as transparent
            values = np.where(values == image.info["transparency"], 65535, values)
        return _array_to_image(values, None, bits=16)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _array_to_image(array: Any, input_data_format: Any, bits: int = 8) -> Image.Image:
    """Convert a numpy array or torch tensor to an 8-bit PIL image."""
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy lacks bfloat16 and float8
    if not isinstance(array, np.ndarray):
        raise _PictureError(
            f"it is a {type(array).__name__} but pictures are paths, bytes, URLs, PIL images, numpy arrays or torch "
            "tensors. A list of numbers was probably passed: wrap it in np.array."
        )
    array = _channels_last(array, input_data_format, prefer_first=is_tensor)
    pixels = _to_uint8(array, bits)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _flatten_to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _channels_last(array: np.ndarray, input_data_format: Any, prefer_first: bool) -> np.ndarray:
    """View a picture as (H, W, C). Where both ends could be channels, tensors are taken as (C, H, W), arrays not."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise _PictureError(
            f"it has {array.ndim} dimensions {array.shape} but a picture has 2, (height, width), or 3, with channels "
            "first or last. It is probably one value of a batch too deep: index it or squeeze it."
        )
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if input_data_format is not None:
        is_first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        first, last = first and is_first, last and not is_first
    if not first and not last:
        where = "neither end is" if input_data_format is None else f"{input_data_format!r} does not find"
        raise _PictureError(
            f"it has the shape {array.shape}, where {where} a channel count of 1, 3 or 4. It is probably a stack of "
            "feature maps or multispectral: pass grey, RGB or RGBA."
        )
    return array.transpose(1, 2, 0) if first and (prefer_first or not last) else array


def _to_uint8(array: np.ndarray, bits: int) -> np.ndarray:
    """Scale values to 0..255. Integers are 8-bit (uint16, or `bits` 16: 16-bit), floats 0..1 or 0..255."""
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise _PictureError(
            f"its values are of type {array.dtype} (shape {array.shape}) but must be integers or floats. It was "
            "probably read as text or transformed to frequencies: pass the original pixels."
        )
    low, high = float(array.min()), float(array.max())
    is_float = array.dtype.kind == "f"
    is_16_bit = not is_float and (bits == 16 or (array.dtype.kind, array.dtype.itemsize) == ("u", 2))
    limit, slack = 65535 if is_16_bit else 255, 1e-3 if is_float else 0  # arithmetic leaves floats a hair outside
    if not (low >= -slack and high <= limit + slack):  # also catches NaN
        raise _PictureError(
            f"its values run from {low:g} to {high:g} but must be within 0 to {limit}"
            f"{' or 0 to 1' if is_float else ''}, without NaN. It was probably normalised already or is not a "
            "picture: pass the original pixels."
        )
    if is_float and 1 + slack < high < 2:
        raise _PictureError(
            f"its values run from {low:g} to {high:g}, where 0 to 1 and 0 to 255 cannot be told apart. It was "
            "probably scaled to 0 to 1 by a filter that overshoots: clip it to 1, or pass uint8."
        )
    if is_16_bit:
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    if is_float:
        array = (array * 255 if high <= 1 + slack else array).clip(0, 255)
    return array.round().astype(np.uint8)


def _explain(error: Exception) -> str:
    """The message of one of our own errors as it is; a decoder's error with what to do about it."""
    if isinstance(error, _PictureError):
        return str(error)
    return (
        f"it could not be decoded ({type(error).__name__}: {str(error)[:200]}). Expected a complete image file. It is "
        "probably truncated or corrupted: open it in a viewer, replace it or drop it."
    )


def _copy(value: Any) -> Any:
    """Copy sizes and grids, tuples to lists as JSON gives them back; leave the rest for the checks to refuse."""
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return dict(value) if isinstance(value, dict) else value


def _per_channel(value: Any) -> Any:
    """Spread one number over the channels."""
    return [value] * 3 if isinstance(value, int | float) else _copy(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse values that would fail later or give wrong pixels.

    Raises:
        ValueError: naming the setting at fault.
    """
    size, tile_grids = settings["size"], settings["tile_grids"]
    is_square = isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]
    if not is_square or not _is_count(size["height"]):
        raise ValueError(
            f'size is {size!r} but tiles are square: expected {{"height": S, "width": S}} with S the vision '
            "tower's image_size in pixels. A grid was probably given as size: list grids in tile_grids instead."
        )
    check_tile_grids(tile_grids)
    backend, resample = settings["resize_backend"], settings["resample"]
    if backend not in RESIZE_BACKENDS:
        raise ValueError(
            f"resize_backend is {backend!r} but must be 'pil' (bit-exact) or 'torch' (faster). It is probably "
            "misspelt: use 'pil' when in doubt."
        )
    known = sorted(int(mode) for mode in (_RESAMPLE_MODES if backend == "torch" else PILImageResampling))
    if resample not in known:
        raise ValueError(
            f"resample is {resample!r} but the {backend} backend knows {known} only, 3 being bicubic. It was probably "
            "given by name or chosen for the other backend: pass the number, and resize_backend='pil' for all of them."
        )
    _check_numbers(settings)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for name in ("image_mean", "image_std"):
        values = settings[name]
        is_triple = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not is_triple or (name == "image_std" and 0 in values):
            raise ValueError(
                f"{name} is {values!r} but must be three finite numbers (none 0 for image_std), one per channel. It "
                "was probably copied from a model with other channels: use [0.5, 0.5, 0.5] for SigLIP."
            )
    if not _is_number(settings["rescale_factor"]):
        raise ValueError(
            f"rescale_factor is {settings['rescale_factor']!r} but must be a finite number. It was probably left "
            "empty: use 1/255, or do_rescale=False to keep values from 0 to 255."
        )
    if not _is_count(settings["max_image_pixels"]):
        raise ValueError(
            f"max_image_pixels is {settings['max_image_pixels']!r} but must be a positive integer. It was probably "
            "meant to switch the limit off: write a number larger than any picture you trust."
        )


def _refuse_misspelt(kwargs: dict) -> None:
    """Refuse names close to a setting; transformers carries other names along without using them."""
    for name, value in kwargs.items():
        close = difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.8)
        if close and name not in Blip3ImageProcessorKwargs.__annotations__:
            raise ValueError(
                f"The image processor was given the unknown setting {name!r} ({value!r}); it would be ignored. It is "
                f"probably misspelt. Did you mean {close[0]!r}?"
            )


expose_in_package(__name__)

__all__ = ["Blip3ImageProcessor"]
